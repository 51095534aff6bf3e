"""The learning rate: a pure function of the step, equal to transformers.get_scheduler's."""

import math

from train.config import ScheduleConfig


def learning_rate(step: int, *, peak: float, schedule: ScheduleConfig, total_steps: int) -> float:
    """Return the rate of update `step`, counted from 0: it warms up from 0 to `peak`, then follows
    `schedule.kind`.

        rate  peak     /\\            linear: straight to 0 at total_steps
                      /   \\          cosine: half a cosine to 0 at total_steps
              0      /      \\        constant: stays at peak
              step   0  W      total

    The first update of a run with warm-up has rate 0, as in transformers.
    """
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return peak * (step / max(1, warmup))
    progress = (step - warmup) / max(1, total_steps - warmup)
    match schedule.kind:
        case "linear":
            return peak * max(0.0, 1.0 - progress)
        case "cosine":
            return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        case "constant":
            return peak


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Return the number of warm-up steps, ceil(warmup_ratio x total_steps)."""
    return math.ceil(schedule.warmup_ratio * total_steps)
