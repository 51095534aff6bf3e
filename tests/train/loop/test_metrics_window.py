"""A window holds the sums of its good steps, however often it is read; one read makes a record.

Under ZeRO DeepSpeed reads the gradient norm in each step.
"""

import math
import random
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from repository import ROOT
from train_runs import train_here, write_inputs

from train.data.loader import StepBatch
from train.engine.process_group import Ranks
from train.loop.metrics_window import MetricsWindow, StepResult, open_window
from train.run.train_state import WindowSums

READS = ("item", "tolist", "cpu", "numpy", "nonzero")
READS += ("__bool__", "__float__", "__int__", "__index__")
STEPS = 8
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), control_group=None)
NUM_SOURCES = 2


def made_up_steps(seed: int) -> list[StepResult]:
    """Steps of which some were skipped, with NaN in their numbers, and some have no loss token.

    All numbers are multiples of 1/8, so that sums are exact in any order.
    """
    draw = random.Random(seed)
    steps = []
    for step in range(12):
        skipped, num_loss_tokens = draw.random() < 0.3, draw.choice([0, 5, 9])
        numbers = torch.randint(1, 80, (8,), generator=torch.manual_seed(draw.randrange(1000))) / 8
        numbers = torch.full((8,), math.nan) if skipped else numbers
        batch = StepBatch(
            step=step,
            unit="pack",
            ids=np.arange(2),
            micro_batches=[],
            num_tokens=100 + step,
            num_positions=110 + step,
            num_loss_tokens=num_loss_tokens,
            squared_lengths=1000 + step,
        )
        result = StepResult(
            batch=batch,
            losses=numbers[:2],
            source_totals=numbers[2:].double().reshape(2, 1 + NUM_SOURCES),
            balancing=numbers[:1],
            skipped=torch.tensor(skipped),
            grad_norm=numbers[3],
        )
        steps.append(result)
    return steps


def fill(window: MetricsWindow, steps: list[StepResult]) -> MetricsWindow:
    for step in steps:
        window.add(step, data_seconds=0.5)
    return window


def sums_of(steps: list[StepResult]) -> WindowSums:
    """The definition of a window's sums."""
    good = [step for step in steps if not step.skipped and step.batch.num_loss_tokens]
    totals = sum(step.source_totals for step in good) + torch.zeros(2, 1 + NUM_SOURCES)
    return WindowSums(
        losses=[step.losses.sum().item() for step in good],
        balancing=[step.losses[0].item() for step in good],
        source_losses=totals[0].tolist(),
        source_tokens=totals[1].tolist(),
        loss_tokens=sum(step.batch.num_loss_tokens for step in steps),
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_window_holds_the_sums_of_its_good_steps_whenever_it_is_read(seed: int) -> None:
    steps, cut = made_up_steps(seed), random.Random(seed).randrange(12)
    window = open_window(NUM_SOURCES, ALONE)
    skipped = []
    for part in (steps[:cut], steps[cut:]):
        sums, skipped_steps = fill(window, part).read(ALONE)
        skipped += [result.batch.step for result in skipped_steps]
    assert sums == sums_of(steps)
    assert skipped == [result.batch.step for result in steps if result.skipped]
    assert window.grad_norm == (None if steps[-1].skipped else steps[-1].grad_norm)
    good = [step for step in steps if not step.skipped and step.batch.num_loss_tokens]
    assert window.loss_steps == [result.batch.step + 1 for result in good]
    assert window.tokens == sum(result.batch.num_tokens for result in steps)


@pytest.mark.parametrize("seed", range(20))
def test_a_window_that_was_interrupted_anywhere_ends_with_the_same_sums(seed: int) -> None:
    """A speed is that of the steps of this call alone; a loss belongs to one of its steps too."""
    steps, cut = made_up_steps(seed), random.Random(seed).randrange(12)
    before, _ = fill(open_window(NUM_SOURCES, ALONE), steps[:cut]).read(ALONE)
    window = fill(open_window(NUM_SOURCES, ALONE, before), steps[cut:])
    assert window.read(ALONE)[0] == sums_of(steps)
    assert window.tokens == sum(result.batch.num_tokens for result in steps[cut:])
    assert len(window.losses) == len(window.loss_steps)


def reads_of_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, every_steps: int, stage: str
) -> "Counter[tuple[str, str]]":
    """Return how often each function of train/ and of DeepSpeed read a tensor while steps ran."""
    from train.loop import loop

    counts: Counter[tuple[str, str]] = Counter()
    counting = False

    def counting_reads(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if counting:
                frame: FrameType = sys._getframe(1)
                path = Path(frame.f_code.co_filename)
                is_product = path.is_relative_to(ROOT / "train")
                file = path.relative_to(ROOT) if is_product else Path(*path.parts[-2:])
                counts[file.as_posix(), frame.f_code.co_name] += 1
            return original(self, *arguments, **options)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counting_reads(name))
    train = loop.train

    def watched(*arguments: Any) -> None:
        nonlocal counting
        counting = True
        try:
            train(*arguments)
        finally:
            counting = False

    monkeypatch.setattr(loop, "train", watched)
    # A save may read everything.
    monkeypatch.setattr(loop, "save_checkpoint", lambda *_, **__: folder)
    shards, recipe = write_inputs(folder)
    call = ("--shards", shards, "--recipe", recipe, "--output", folder / "run")
    settings = ("--set", f"log.every_steps={every_steps}", "--set", f"engine.zero_stage={stage}")
    settings += ("--set", "checkpoint.every_steps=1000", "--max-steps", str(STEPS))
    result = train_here(*call, *settings)
    assert result.exit_code == 0, result.output
    # It reads the bounds of sequences, on a CPU only.
    del counts["train/model/attention.py", "per_sequence"]
    return counts


@pytest.mark.parametrize(("every_steps", "windows"), [(1, 8), (4, 2), (8, 1)])
def test_one_rank_waits_for_the_device_once_per_record(
    every_steps: int, windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither transformers nor DeepSpeed adds a read: to find sequences in position_ids, or for a
    timer."""
    counts = reads_of_a_run(tmp_path, monkeypatch, every_steps=every_steps, stage="auto")
    assert counts == {("train/loop/metrics_window.py", "read"): windows}


@pytest.mark.parametrize(("stage", "reads"), [("1", 3), ("2", 3), ("3", 1)])
def test_under_zero_deepspeed_reads_the_norm_of_each_step(
    stage: str, reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stage 3 also looks at the order of the layers, in the first step only."""
    counts = reads_of_a_run(tmp_path, monkeypatch, every_steps=4, stage=stage)
    ours = {key: number for key, number in counts.items() if key[0].startswith("train/")}
    assert ours == {("train/loop/metrics_window.py", "read"): 2}
    assert counts["runtime/utils.py", "is_invalid_grad_norm"] == reads * STEPS
    assert counts["zero/utils.py", "get_lst_from_rank0"] < STEPS
