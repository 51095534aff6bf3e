"""Attention within the bounds of sequences equals dense attention under the mask that they mean."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, PrerequisiteError
from train.model import attention
from train.model.attention import choose_attention, per_sequence

CPU = torch.device("cpu")
HEAD_SIZE = 4


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    lengths: list[int],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Attention over the whole row, [1, N, H, D], with a mask written out pair by pair."""
    heads = query.shape[1]
    key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    owner = [number for number, length in enumerate(lengths) for _ in range(length)]
    mask = torch.tensor(
        [
            [
                owner[q] == owner[k] and k <= q and (window is None or q - k < window)
                for k in range(len(owner))
            ]
            for q in range(len(owner))
        ]
    )
    scores = (scale * query @ key.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)]),
    window=st.none() | st.integers(1, 10),
    scale=st.sampled_from([None, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
def test_each_sequence_attends_to_itself_alone(
    lengths: list[int], heads: tuple[int, int], window: int | None, scale: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    query, key, value = (
        torch.randn(1, count, num_tokens, HEAD_SIZE, generator=generator, dtype=torch.float64)
        for count in (heads[0], heads[1], heads[1])
    )
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    options = {"cu_seq_lens_q": bounds, "sliding_window": window, "scaling": scale}
    output, weights = per_sequence(torch.nn.Identity(), query, key, value, None, **options)
    expected = dense(
        query, key, value, lengths=lengths, window=window, scale=scale or HEAD_SIZE**-0.5
    )
    assert weights is None
    torch.testing.assert_close(output, expected)


ROW = torch.zeros(1, 1, 3, HEAD_SIZE)
BOUNDS = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize("kernel", ["per_sequence", "varlen", "flash"])
@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (None, {}, "does not pass sequence bounds"),
        (torch.ones(3, 3), {"cu_seq_lens_q": BOUNDS}, "needs a mask"),
        (None, {"cu_seq_lens_q": BOUNDS, "s_aux": torch.zeros(1)}, "attention sinks"),
        (None, {"cu_seq_lens_q": BOUNDS, "is_causal": False}, "attention to later tokens"),
    ],
)
def test_a_model_whose_attention_would_be_another_is_refused(
    kernel: str, mask: torch.Tensor | None, options: dict[str, Any], message: str
) -> None:
    function: Callable[..., Any] = attention.FUNCTIONS[kernel]
    with pytest.raises(ConfigError, match=message):
        function(torch.nn.Identity(), ROW, ROW, ROW, mask, **options)


@pytest.mark.parametrize(
    ("kernel", "option"),
    [
        ("per_sequence", {"softcap": 50.0}),
        ("varlen", {"softcap": 50.0}),
        ("varlen", {"dropout": 0.1}),
    ],
)
def test_a_kernel_that_lacks_a_feature_names_one_that_has_it(
    kernel: str, option: dict[str, float]
) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention = 'flash'"):
        attention.FUNCTIONS[kernel](
            torch.nn.Identity(), ROW, ROW, ROW, None, cu_seq_lens_q=BOUNDS, **option
        )


@pytest.mark.parametrize(
    ("device", "dtype", "has_flash", "kernel"),
    [
        ("cpu", torch.float32, True, "per_sequence"),
        ("cpu", torch.bfloat16, True, "per_sequence"),
        ("cuda", torch.float32, True, "per_sequence"),
        ("cuda", torch.bfloat16, False, "varlen"),
        ("cuda", torch.bfloat16, True, "flash"),
    ],
)
def test_auto_is_the_fastest_kernel_of_device_dtype_and_installation(
    device: str,
    dtype: torch.dtype,
    has_flash: bool,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda _name: object() if has_flash else None)
    assert choose_attention("auto", device=torch.device(device), dtype=dtype) == f"sft_{kernel}"


def test_a_kernel_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda _name: None)
    for kernel in ("flash", "varlen"):
        with pytest.raises(PrerequisiteError, match="needs a GPU and bf16"):
            choose_attention(kernel, device=CPU, dtype=torch.bfloat16)
    with pytest.raises(PrerequisiteError, match="needs the package flash-attn"):
        choose_attention("flash", device=torch.device("cuda"), dtype=torch.bfloat16)
