"""The optimizer of one rank is torch's AdamW with clipping, with fp32 masters and sums for bf16
weights."""

import copy
import math

import pytest
import torch

from train.engine.single_rank_adamw import OneRankAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in ((5, 7), (7,))
    ]


def optimizer_of(
    parameters: list[torch.nn.Parameter],
    *,
    max_grad_norm: float = 0.5,
    stop_after_skip: bool = False,
) -> OneRankAdamW:
    groups = [
        {"params": [parameters[0]], "weight_decay": 0.1},
        {"params": [parameters[1]], "weight_decay": 0.0},
    ]
    return OneRankAdamW(
        groups, **SETTINGS, max_grad_norm=max_grad_norm, stop_after_skip=stop_after_skip
    )  # type: ignore[arg-type]


def was_skipped(optimizer: OneRankAdamW) -> bool:
    assert optimizer.skipped is not None
    return bool(optimizer.skipped)


def backward(parameters: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [(p.float() * torch.randn(p.shape, generator=generator)).sum() for p in parameters]
    (torch.stack(terms).sum() * scale).backward()


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 1e6])
def test_fp32_steps_are_those_of_adamw_on_clipped_gradients(max_grad_norm: float) -> None:
    ours, theirs = weights(), weights()
    optimizer = optimizer_of(ours, max_grad_norm=max_grad_norm)
    groups = [
        {"params": [p], "weight_decay": decay} for p, decay in zip(theirs, (0.1, 0.0), strict=True)
    ]
    reference = torch.optim.AdamW(groups, **SETTINGS)  # type: ignore[arg-type]
    for seed in range(5):
        backward(ours, seed)
        optimizer.step()
        backward(theirs, seed)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm or math.inf)
        assert float(optimizer._global_grad_norm) == pytest.approx(norm.item())
        reference.step()
        reference.zero_grad()
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_fp32_weights_are_their_own_masters() -> None:
    parameters = weights()
    optimizer = optimizer_of(parameters)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [
        id(p) for p in parameters
    ]


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """Of one large gradient and many small ones, a bf16 sum would lose all the small ones."""
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = OneRankAdamW(
        [{"params": [parameter]}], **SETTINGS, max_grad_norm=0.0, stop_after_skip=False
    )  # type: ignore[arg-type]
    (parameter * 1.0).sum().backward()
    for _ in range(256):
        (parameter * 2.0**-10).sum().backward()
    (master,) = optimizer.param_groups[0]["params"]
    assert master.grad.dtype == torch.float32
    assert master.grad.tolist() == [1.25] * 3
    assert parameter.grad is None
    assert (torch.tensor(1.0, dtype=torch.bfloat16) + 2.0**-10).item() == 1.0


def test_bf16_weights_follow_fp32_masters() -> None:
    """Updates far below the resolution of bf16 add up instead of being rounded away."""
    half, full = (
        weights(torch.bfloat16),
        [torch.nn.Parameter(p.detach().float()) for p in weights(torch.bfloat16)],
    )
    small, large = optimizer_of(half), optimizer_of(full)
    for group in (*small.param_groups, *large.param_groups):
        group["lr"] = 1e-5
    for seed in range(20):
        for parameters, optimizer in ((half, small), (full, large)):
            backward(parameters, seed)
            optimizer.step()
    masters = [p for group in small.param_groups for p in group["params"]]
    for weight, master, exact in zip(half, masters, full, strict=True):
        assert torch.equal(weight, master.bfloat16())
        torch.testing.assert_close(master, exact, rtol=1e-6, atol=2e-6)  # gradients came in bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype, bad: float) -> None:
    spoiled, clean = weights(dtype), weights(dtype)
    optimizers = [optimizer_of(spoiled), optimizer_of(clean)]
    for parameters, optimizer in zip((spoiled, clean), optimizers, strict=True):
        backward(parameters, 1)
        optimizer.step()
    backward(spoiled, 2, scale=bad)
    optimizers[0].step()
    assert was_skipped(optimizers[0])
    for parameters, optimizer in zip((spoiled, clean), optimizers, strict=True):
        backward(parameters, 3)
        optimizer.step()
        assert not was_skipped(optimizer)
    for actual, expected in zip(spoiled, clean, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_stop_after_skip_nothing_changes_after_a_skipped_step(dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    optimizer = optimizer_of(parameters, stop_after_skip=True)
    backward(parameters, 1)
    optimizer.step()
    assert not was_skipped(optimizer)
    before = [parameter.detach().clone() for parameter in parameters]
    for seed, scale in ((2, math.nan), (3, 1.0), (4, 1.0)):
        backward(parameters, seed, scale)
        optimizer.step()
        assert was_skipped(optimizer)
    for parameter, copied in zip(parameters, before, strict=True):
        assert torch.equal(parameter, copied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_resumes_exactly(dtype: torch.dtype) -> None:
    first, second = weights(dtype), weights(dtype)
    before, after = optimizer_of(first), optimizer_of(second)
    for seed in range(3):
        backward(first, seed)
        before.step()
    with torch.no_grad():
        for source, target in zip(first, second, strict=True):
            target.copy_(source)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for parameters, optimizer in ((first, before), (second, after)):
        backward(parameters, 9)
        optimizer.step()
    for actual, expected in zip(second, first, strict=True):
        assert torch.equal(actual, expected)
    masters = [
        [p for group in optimizer.param_groups for p in group["params"]]
        for optimizer in (before, after)
    ]
    for actual, expected in zip(*masters, strict=True):
        assert torch.equal(actual, expected)
