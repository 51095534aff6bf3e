"""Two ranks that share rows learn what one rank learns, and keep the sequences of a pack apart."""

from pathlib import Path

import pytest
import torch
from train_runs import losses, train_apart, train_here, weights, write_inputs

NO_DROPOUT = ("--set", "model.config.attention_dropout=0.0")


@pytest.mark.slow
def test_two_ranks_that_share_rows_learn_what_one_rank_learns(tmp_path: Path) -> None:
    """With ZeRO-3, odd rows, and fewer key heads than ranks. DeepSpeed's own attention would leak
    between sequences, and that would show."""
    shards, recipe = write_inputs(tmp_path)
    arguments = (
        "--shards",
        shards,
        "--recipe",
        recipe,
        "--set",
        "engine.zero_stage=3",
        *NO_DROPOUT,
    )
    heads = ("--set", "model.config.num_key_value_heads=1")
    assert train_here(*arguments, *heads, "--output", tmp_path / "one").exit_code == 0
    shared = (
        "--nproc-per-node",
        2,
        "--set",
        "engine.sequence_parallel=2",
        "--output",
        tmp_path / "two",
    )
    done = train_apart(*arguments, *heads, *shared, "--set", "model.mlp_tiles=3")
    assert done.returncode == 0, done.stderr
    for (step, one), (other, two) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True
    ):
        assert step == other
        assert two == pytest.approx(one, rel=1e-5)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, rtol=0, atol=2e-3
        )  # AdamW turns rounding into steps of lr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("engine.sequence_parallel=0",), "sequence_parallel = 0; expected 1 or more"),
        (("engine.sequence_parallel=2",), "engine.sequence_parallel = 2 does not divide 1 ranks"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(
    settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    shards, recipe = write_inputs(tmp_path)
    done = train_here(
        "--shards", shards, "--recipe", recipe, *(part for s in settings for part in ("--set", s))
    )
    assert done.exit_code == 3
    assert message in done.output
