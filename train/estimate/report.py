"""An estimate of a run as lines for people and as one JSON object."""

import dataclasses
import json

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
# Above this share of a GPU's memory the error of the estimate decides.
_TIGHT = 0.95


def as_json(plan: RunEstimate) -> str:
    """Return the plan as an indented JSON object: sizes in GiB, times in hours."""
    request, forecast, division = plan.request, plan.forecast, plan.division
    totals = plan.data.totals
    figures = {
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
            "gpu_hours": plan.gpu_hours,
            "tokens_per_second_per_gpu": plan.tokens_per_second,
            "price_per_gpu_hour": request.price,
            "cost": plan.cost,
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
    return json.dumps(figures, indent=2)


def as_text(plan: RunEstimate) -> str:
    """Return the plan in lines."""
    request, forecast, totals = plan.request, plan.forecast, plan.data.totals
    total, room = plan.memory.total / GIB, plan.gpu.memory_gib
    fit = "does not fit"
    if plan.fits:
        fit = "fits" if total <= _TIGHT * room else "fits barely"
    verdict = f"{fit}, {total:.1f} of {room:.1f} GiB per GPU"
    if plan.problems:
        verdict = f"does not run, see below ({verdict})"
    source = "stated" if request.sizes is not None else str(request.train.shards)
    lines = [
        f"{plan.recipe.name} on {request.num_gpus} x {plan.gpu.name}, ZeRO stage {plan.zero_stage}:"
        f" {verdict}",
        "",
        f"model    {_count(plan.size.parameters)} parameters, {_count(plan.size.trained)} of them"
        " trained",
        f"data     {source}: {totals.sequences:,} sequences in {totals.packs:,} packs of"
        f" {plan.data.max_seq_len:,}, {totals.tokens:,} tokens, {totals.loss_tokens:,}"
        " loss tokens",
        *(f"         assumed: {assumption}" for assumption in plan.data.assumptions),
        f"run      {forecast.steps:,} steps of {plan.order.units_per_step:,} {plan.order.unit}s,"
        f" {forecast.warmup_steps:,} of warm-up; {forecast.epochs:g} epochs",
        f"         {forecast.tokens:,} tokens, {forecast.loss_tokens:,} loss tokens,"
        f" {forecast.flops:.3g} FLOPs",
    ]
    if plan.division is not None:
        per_rank = forecast.tokens / forecast.steps / request.num_gpus
        lines.append(
            f"ranks    {per_rank:,.0f} tokens of a rank in a step, at most"
            f" {plan.division.micro_batches} micro-batches; waiting for the slowest rank multiplies"
            f" time by {plan.division.waiting:.2f}"
        )
    # A short run in minutes: 0.0 hours would say nothing.
    hours = forecast.seconds / 3600
    duration = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    cost = ""
    if plan.cost is not None:
        price = f"{plan.gpu_hours:,.0f} GPU hours at {request.price:g} each"
        cost = f"; {price}: {plan.cost:,.0f}"
    lines += [
        f"time     {duration} at {request.mfu:.0%} MFU (stated): {plan.tokens_per_second:,.0f}"
        f" tokens/s per GPU{cost}",
        "",
        f"memory per GPU, GiB of {room:.1f} that a program gets",
        *(f"  {title:26}{getattr(plan.memory, name) / GIB:8.1f}" for name, title in _PARTS.items()),
        f"  {'peak, in the ' + plan.memory.peak_in:26}{total:8.1f}",
        "",
    ]
    if plan.changes:
        lines.append("faster, and fits too:" if plan.fits else "what would change it:")
        for change in plan.changes:
            fit = "fits" if change.fits else "does not fit"
            host = f" (and {change.host_gib:.0f} GiB of the host for each GPU)"
            suffix = host if change.host_gib else ""
            lines.append(f"  {change.gib:7.1f} GiB {fit:12} {change.what}{suffix}")
        lines.append("")
    lines += [f"problem: {problem}" for problem in plan.problems]
    if not plan.problems:
        lines.append(f"command: {plan.command}")
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
