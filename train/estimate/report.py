"""A plan as lines for people and as one JSON object."""

import dataclasses
import json
from typing import Any

from train.estimate.plan import RunEstimate
from train.sizing.memory import GIB

_PARTS = {
    "weights": "weights",
    "optimizer": "optimizer states",
    "gradients": "gradients",
    "activations": "activations kept",
    "layer": "backward pass of a layer",
    "loss": "loss",
    "communication": "communication",
    "update": "update",
    "reserve": "reserve",
}
_TIGHT = 0.95  # of the room: beyond it the error of the estimate decides


def as_json(plan: RunEstimate) -> str:
    """Return the plan as an indented JSON object: sizes in GiB, times in hours."""
    return json.dumps(_figures(plan), indent=2)


def as_text(plan: RunEstimate) -> str:
    """Return the plan in lines."""
    request, forecast, order = plan.request, plan.forecast, plan.order
    lines = [
        (
            f"{plan.recipe.name} on {request.num_gpus} x {plan.gpu.name}, ZeRO stage"
            f" {plan.zero_stage}: {_verdict(plan)}"
        ),
        "",
        (
            f"model    {_count(plan.size.parameters)} parameters, {_count(plan.size.trained)} of"
            " them train"
        ),
        f"data     {_data(plan)}",
        *(f"         assumed: {assumption}" for assumption in plan.data.assumptions),
        (
            f"run      {forecast.steps:,} steps of {order.units_per_step:,} {order.unit}s,"
            f" {forecast.warmup_steps:,} of warm-up; {forecast.epochs:g} epochs"
        ),
        (
            f"         {forecast.tokens:,} tokens, {forecast.loss_tokens:,} loss tokens,"
            f" {forecast.flops:.3g} FLOPs"
        ),
        *_division_lines(plan),
        (
            f"time     {_hours(forecast.seconds)} at {request.mfu:.0%} MFU (stated): "
            f"{_tokens_per_second(plan):,.0f} tokens/s per GPU{_cost_text(plan)}"
        ),
        "",
        f"memory per GPU, GiB of {plan.gpu.memory_gib:.1f} that a program gets",
        *(f"  {title:26}{getattr(plan.memory, name) / GIB:8.1f}" for name, title in _PARTS.items()),
        f"  {'peak, in the ' + plan.memory.peak_in:26}{plan.memory.total / GIB:8.1f}",
        "",
        *_change_lines(plan),
        *(f"problem: {problem}" for problem in plan.problems),
        *([f"command: {plan.command}"] if not plan.problems else []),
    ]
    return "\n".join(lines)


def _figures(plan: RunEstimate) -> dict[str, Any]:
    request, forecast, division = plan.request, plan.forecast, plan.division
    totals = plan.data.totals
    return {
        "recipe": plan.recipe.name,
        "gpus": request.num_gpus,
        "gpu": plan.gpu.name,
        "zero_stage": plan.zero_stage,
        "verdict": {"runs": not plan.problems, "fits": plan.fits, "problems": list(plan.problems)},
        "model": {"parameters": plan.size.parameters, "trained": plan.size.trained},
        "data": {
            "shards": None if request.sizes is not None else str(request.train.shards),
            "packs": totals.packs,
            "sequences": totals.sequences,
            "tokens": totals.tokens,
            "loss_tokens": totals.loss_tokens,
            "max_seq_len": plan.data.max_seq_len,
            "squared_lengths": plan.data.squared_lengths,
            "assumptions": list(plan.data.assumptions),
        },
        "run": {
            "steps": forecast.steps,
            "warmup_steps": forecast.warmup_steps,
            "unit": plan.order.unit,
            "units_per_step": plan.order.units_per_step,
            "epochs": forecast.epochs,
            "tokens": forecast.tokens,
            "loss_tokens": forecast.loss_tokens,
            "flops": forecast.flops,
            "micro_batches": None if division is None else division.micro_batches,
            "waiting": None if division is None else division.waiting,
        },
        "time": {
            "mfu": request.mfu,
            "hours": forecast.seconds / 3600,
            "gpu_hours": _gpu_hours(plan),
            "tokens_per_second_per_gpu": _tokens_per_second(plan),
            "price_per_gpu_hour": request.price,
            "cost": _cost(plan),
        },
        "memory_gib": {
            **{name: getattr(plan.memory, name) / GIB for name in _PARTS},
            "total": plan.memory.total / GIB,
            "of": plan.gpu.memory_gib,
            "peak_in": plan.memory.peak_in,
        },
        "changes": [dataclasses.asdict(change) for change in plan.changes],
        "command": plan.command,
    }


def _verdict(plan: RunEstimate) -> str:
    total, room = plan.memory.total / GIB, plan.gpu.memory_gib
    memory = (
        "does not fit" if not plan.fits else "fits" if total <= _TIGHT * room else "fits barely"
    )
    text = f"{memory}, {total:.1f} of {room:.1f} GiB per GPU"
    return f"does not run, see below ({text})" if plan.problems else text


def _data(plan: RunEstimate) -> str:
    totals = plan.data.totals
    where = "stated" if plan.request.sizes is not None else str(plan.request.train.shards)
    return (
        f"{where}: {totals.sequences:,} sequences in {totals.packs:,} packs of"
        f" {plan.data.max_seq_len:,}, {totals.tokens:,} tokens, {totals.loss_tokens:,}"
        " loss tokens"
    )


def _division_lines(plan: RunEstimate) -> list[str]:
    if plan.division is None:
        return []
    per_rank = plan.forecast.tokens / plan.forecast.steps / plan.request.num_gpus
    return [
        f"ranks    {per_rank:,.0f} tokens of a rank in a step, at most"
        f" {plan.division.micro_batches} micro-batches; waiting for the slowest rank multiplies"
        f" time by {plan.division.waiting:.2f}"
    ]


def _change_lines(plan: RunEstimate) -> list[str]:
    if not plan.changes:
        return []
    head = "fits too, and computes nothing twice:" if plan.fits else "what would change it:"
    fits = {True: "fits", False: "does not fit"}
    host = {
        change.what: f" (and {change.host_gib:.0f} GiB of the host for each GPU)"
        for change in plan.changes
    }
    rows = [
        f"  {change.gib:7.1f} GiB {fits[change.fits]:12}"
        f" {change.what}{host[change.what] if change.host_gib else ''}"
        for change in plan.changes
    ]
    return [head, *rows, ""]


def _gpu_hours(plan: RunEstimate) -> float:
    return plan.forecast.seconds / 3600 * plan.request.num_gpus


def _cost(plan: RunEstimate) -> float | None:
    return None if plan.request.price is None else _gpu_hours(plan) * plan.request.price


def _cost_text(plan: RunEstimate) -> str:
    cost = _cost(plan)
    return (
        ""
        if cost is None
        else f"; {_gpu_hours(plan):,.0f} GPU hours at {plan.request.price:g} each: {cost:,.0f}"
    )


def _tokens_per_second(plan: RunEstimate) -> float:
    return plan.forecast.tokens / plan.forecast.seconds / plan.request.num_gpus


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
