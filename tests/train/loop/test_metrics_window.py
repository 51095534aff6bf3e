"""The step loop reads the device once per logged line, and under ZeRO, which reads the gradient
norm, in each step."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from repository import ROOT
from train_runs import train_here, write_inputs

READS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
)
STEPS = 8


def reads_of_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, every_steps: int, stage: str
) -> "Counter[tuple[str, str]]":
    """Return how often each function of train/ and of DeepSpeed read a tensor's value while steps
    ran."""
    from train.loop import loop

    counts: Counter[tuple[str, str]] = Counter()
    counting = False

    def counted(name: str) -> Any:
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
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    train = loop.train

    def watched(*arguments: Any) -> None:
        nonlocal counting
        counting = True
        try:
            train(*arguments)
        finally:
            counting = False

    monkeypatch.setattr(loop, "train", watched)
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda *_, **__: folder
    )  # a save reads everything, and may
    shards, recipe = write_inputs(folder)
    settings = (
        f"log.every_steps={every_steps}",
        "checkpoint.every_steps=1000",
        f"engine.zero_stage={stage}",
    )
    result = train_here(
        "--shards", shards, "--recipe", recipe, "--output", folder / "run", "--max-steps", STEPS,
        *(part for setting in settings for part in ("--set", setting)),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    del counts[
        "train/model/attention.py", "per_sequence"
    ]  # its bounds, where tensors lie in the memory of the host anyway
    return counts


@pytest.mark.parametrize(("every_steps", "windows"), [(1, 8), (4, 2), (8, 1)])
def test_one_rank_waits_for_the_device_once_per_logged_line(
    every_steps: int, windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither transformers nor DeepSpeed adds a read: not to find sequences in position_ids, not
    for a timer."""
    counts = reads_of_a_run(tmp_path, monkeypatch, every_steps=every_steps, stage="auto")
    assert counts == {("train/loop/metrics_window.py", "read"): windows}


@pytest.mark.parametrize(("stage", "reads"), [("1", 3), ("2", 3), ("3", 1)])
def test_under_zero_deepspeed_reads_the_norm_of_each_step(
    stage: str, reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides, its stage 3 looks at the order of the layers, in the first step only."""
    counts = reads_of_a_run(tmp_path, monkeypatch, every_steps=4, stage=stage)
    ours = {key: number for key, number in counts.items() if key[0].startswith("train/")}
    assert ours == {("train/loop/metrics_window.py", "read"): 2}
    assert counts["runtime/utils.py", "is_invalid_grad_norm"] == reads * STEPS
    assert counts["zero/utils.py", "get_lst_from_rank0"] < STEPS
