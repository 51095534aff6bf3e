"""The loss without logits of the whole row equals plain torch: in chunks, weighted, and by Liger's
kernel."""

import os
import subprocess
import sys

import pytest
import torch
from repository import ROOT

from train.model import loss as loss_module
from train.model.loss import chunked_cross_entropy, weighted_cross_entropy

ROWS, HIDDEN, VOCAB = 37, 24, 91

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    head = torch.randn(VOCAB, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return hidden, head, targets, torch.rand(ROWS, generator=generator)


def with_gradients(
    function: object, hidden: torch.Tensor, head: torch.Tensor, *rest: object
) -> list[torch.Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    if function is chunked_cross_entropy:
        rest = (*rest, torch.empty(len(hidden)))
    loss = function(hidden, head, *rest)  # type: ignore[operator]
    (loss * 3.0).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return [loss.detach(), hidden.grad, head.grad]


def plain(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(
        (hidden @ head.t()).double(), targets, reduction="none"
    )
    return (losses * weights).sum()


@pytest.mark.parametrize("multiple", [1, 4, 32])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 36, 37, 1000])
def test_chunks_equal_plain_torch(
    rows_per_chunk: int, multiple: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_LOGITS_PER_CHUNK", rows_per_chunk * VOCAB)
    monkeypatch.setattr(loss_module, "_MIN_ROWS_PER_CHUNK", 1)
    monkeypatch.setattr(loss_module, "_ROW_MULTIPLE", multiple)
    for actual, expected in zip(
        with_gradients(chunked_cross_entropy, *case), with_gradients(plain, *case), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-6, atol=2e-6)


def test_large_logits_do_not_overflow(case: Case) -> None:
    hidden, head, targets, weights = case
    big = (hidden * 1e3, head, targets, weights)
    for actual, expected in zip(
        with_gradients(chunked_cross_entropy, *big), with_gradients(plain, *big), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-4)


def test_bf16_sums_in_fp32(case: Case) -> None:
    hidden, head, targets, weights = case
    half = (hidden.bfloat16(), head.bfloat16(), targets, weights)
    exact = with_gradients(plain, half[0].double(), half[1].double(), targets, weights)
    for actual, expected in zip(with_gradients(chunked_cross_entropy, *half), exact, strict=True):
        scale = expected.abs().max()
        assert ((actual.double() - expected).abs().max() / scale).item() < 0.02


@pytest.mark.parametrize("loss_tokens", [119, 327, 1021])
def test_the_weight_of_a_step_reaches_bf16_gradients_unrounded(
    loss_tokens: int, case: Case
) -> None:
    """Rounding each element once moves it to either side; a rounded factor moves all of them the
    same way, here by 0.2 % and more."""
    hidden, head, targets, _ = case
    hidden, head, ones = hidden.bfloat16(), head.bfloat16(), torch.ones(ROWS)

    def gradients(factor: float) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
        (chunked_cross_entropy(*leaves, targets, ones, torch.empty(ROWS)) * factor).backward()
        return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]

    for unscaled, scaled in zip(gradients(1.0), gradients(1 / loss_tokens), strict=True):
        factor = (scaled * unscaled).sum() / unscaled.square().sum()
        assert factor.item() == pytest.approx(1 / loss_tokens, rel=5e-4)


def test_only_gradients_that_are_needed_are_computed(case: Case) -> None:
    hidden, head, targets, weights = case
    assert not chunked_cross_entropy(
        hidden, head, targets, weights, torch.empty(ROWS)
    ).requires_grad
    frozen_head = hidden.clone().requires_grad_()
    chunked_cross_entropy(frozen_head, head, targets, weights, torch.empty(ROWS)).backward()
    assert frozen_head.grad is not None


def test_an_evaluation_computes_no_gradient_of_the_head(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even under no_grad an autograd function is told which inputs require a gradient."""
    hidden, head, targets, weights = case
    monkeypatch.setattr(loss_module, "_add_product", lambda *_: pytest.fail("computed a gradient"))
    with torch.no_grad():
        weighted_cross_entropy(
            hidden, head.clone().requires_grad_(), targets, weights, uniform=None
        )


def test_memory_holds_one_chunk_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has more than about _LOGITS_PER_CHUNK elements: none is [rows, vocabulary]."""
    monkeypatch.setattr(loss_module, "_LOGITS_PER_CHUNK", 32 * 4000)
    monkeypatch.setattr(loss_module, "_MIN_ROWS_PER_CHUNK", 1)
    hidden = torch.randn(1000, 8, requires_grad=True)
    head = torch.randn(4000, 8, requires_grad=True)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        row_losses = torch.empty(1000)
        chunked_cross_entropy(
            hidden, head, torch.zeros(1000, dtype=torch.int64), torch.ones(1000), row_losses
        ).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * 32 * 4000 * 2
    assert 10 * largest < 4 * 1000 * 4000


LIGER = """
import torch
from train.model.loss import chunked_cross_entropy, liger_cross_entropy
generator = torch.Generator().manual_seed(0)
data = torch.randn(48, 32, generator=generator), torch.randn(128, 32, generator=generator)
targets = torch.randint(0, 128, (48,), generator=generator)
results = []
quarters = torch.full((48,), 0.25)
for function in (lambda h, w, rows: liger_cross_entropy(h, w, targets, rows) * 0.25,
                 lambda h, w, rows: chunked_cross_entropy(h, w, targets, quarters, rows)):
    hidden, head = (tensor.clone().requires_grad_() for tensor in data)
    row_losses = torch.empty(48)
    loss = function(hidden, head, row_losses)
    (loss * 3.0).backward()
    results.append((loss.detach(), hidden.grad, head.grad, row_losses))
hidden, head = data[0].clone().requires_grad_(), data[1].clone()  # a frozen head
liger_cross_entropy(hidden, head, targets, torch.empty(48)).backward()
torch.testing.assert_close(hidden.grad * 0.75, results[0][1], rtol=2e-6, atol=2e-6)
liger_cross_entropy(*data, targets, row_losses := torch.empty(48))  # no gradient at all
torch.testing.assert_close(row_losses, results[0][3])
for liger, ours in zip(*results, strict=True):
    torch.testing.assert_close(liger, ours, rtol=2e-6, atol=2e-6)
print("equal")
"""


@pytest.mark.slow
def test_ligers_kernel_under_tritons_interpreter_equals_the_cpu_loss() -> None:
    """In a separate process, since the interpreter is chosen when triton is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", LIGER],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == "equal\n", done.stderr
