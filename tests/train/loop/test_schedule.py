"""The learning rate equals transformers.get_scheduler's at every step."""

import pytest
import torch
from transformers import get_scheduler

from train.config import ScheduleConfig
from train.loop.schedule import learning_rate, warmup_steps

NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    ("total", "ratio"), [(1, 0.0), (1, 0.03), (7, 0.5), (100, 0.03), (101, 0.03), (10, 1.0)]
)
def test_equals_the_scheduler_of_transformers(kind: str, total: int, ratio: float) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_ratio=ratio)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    theirs = get_scheduler(
        NAMES[kind],
        optimizer,
        num_warmup_steps=warmup_steps(schedule, total),
        num_training_steps=total,
    )
    for step in range(total):
        ours = learning_rate(step, peak=2e-5, schedule=schedule, total_steps=total)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-20)
        optimizer.step()
        theirs.step()


def test_warm_up_is_rounded_up() -> None:
    assert warmup_steps(ScheduleConfig(warmup_ratio=0.03), 101) == 4
    assert warmup_steps(ScheduleConfig(warmup_ratio=0.0), 101) == 0
