"""`sft-train which` prints the rows that a step trained on, in the order of each rank's loader."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from train_runs import RECIPE, train_here, write_inputs

from shared import config
from shared.shard_reader import ShardSet, open_shard_set
from train.config import TrainConfig
from train.data.loader import StepLoader
from train.results.which import _mark
from train.run.prepare import make_run_order


def make_run(folder: Path, *, world_size: int, batch: str) -> Path:
    """Train on one rank, and write into config.json that there were `world_size`."""
    shards, recipe = write_inputs(folder, recipe=RECIPE.replace("packs_per_step = 4", batch))
    run = folder / "run"
    call = ("--shards", shards, "--recipe", recipe, "--output", run)
    assert train_here(*call, "--stop-after", 1).exit_code == 75
    description = json.loads((run / "config.json").read_text())
    assert description["world_size"] == 1
    (run / "config.json").write_text(json.dumps({**description, "world_size": world_size}))
    return run


def show(run: Path, *options: object) -> Result:
    return train_here("which", run, *options)


def shown(run: Path, *options: object) -> list[dict[str, Any]]:
    """Return the JSON objects that the command prints."""
    return [json.loads(line) for line in show(run, *options, "--json").stdout.splitlines()]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("batch", ["packs_per_step = 4", "conversations_per_step = 7"])
def test_the_rows_are_those_that_each_rank_trains_on(
    world_size: int, batch: str, tmp_path: Path
) -> None:
    """Tokens and mask are compared through what the loader gives the model: ids, and positions with
    a weight."""
    run = make_run(tmp_path, world_size=world_size, batch=batch)
    description = json.loads((run / "config.json").read_text())
    shard_set = open_shard_set(Path(description["shards"]["path"]))
    recipe = config.build(TrainConfig, description["recipe"], "test")
    order = make_run_order(recipe, shard_set.manifest)
    for step in (1, order.total_steps):
        for rank in range(world_size):
            loader = StepLoader(
                shard_set=shard_set,
                order=order,
                loss=recipe.loss,
                rank=rank,
                world_size=world_size,
                packs_per_micro_batch=1,
            )
            batch_of_rank = loader.make(step - 1)
            rows = shown(run, "--step", step, "--rank", rank)
            micro_batches = [m for m in batch_of_rank.micro_batches if m.weights.any()]
            ids_of_loader = torch.cat([micro.input_ids.flatten() for micro in micro_batches])
            ids = [sequence_ids(shard_set, item["row"]) for item in rows]
            assert np.concatenate(ids).tolist() == ids_of_loader.tolist()
            assert [item["tokens"] for item in rows] == [len(item) for item in ids]
            assert {item["rank"] for item in rows} == {rank}
        all_rows = shown(run, "--step", step)
        assert sum(item["loss_tokens"] for item in all_rows) == batch_of_rank.num_loss_tokens
        assert sum(item["tokens"] for item in all_rows) == batch_of_rank.num_tokens


def sequence_ids(shard_set: ShardSet, row: int) -> np.ndarray:
    """Return the tokens of the one sequence of a row."""
    origins = np.concatenate([columns["seq_origin"] for columns in shard_set.shards])
    (index,) = np.flatnonzero(origins[:, 1] == row).tolist()
    return np.asarray(shard_set.sequence(index).tokens)


def test_people_see_the_beginning_of_each_row_with_its_trained_pieces_marked(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, world_size=1, batch="packs_per_step = 4")
    lines = show(run, "--step", 1).stdout.splitlines()
    items = shown(run, "--step", 1)
    assert len(lines) == 2 * len(items)
    for head, text, item in zip(lines[::2], lines[1::2], items, strict=True):
        assert (
            head
            == f"rank 0 micro-batch {item['micro_batch']}  made-up:{item['row']}  {item['tokens']}"
            f" tokens, {item['loss_tokens']} trained"
        )
        assert text.count("[[") == sum(trained for _, trained in item["pieces"])
    assert any(item["loss_tokens"] for item in items)


def test_text_is_cut_and_can_do_nothing_to_a_terminal() -> None:
    pieces = [("ask\n\x1b[2J", False), ("answer " * 100, True), ("end", False)]
    short = _mark(pieces, full=False, colour=False)
    assert short.startswith("ask\\n\\x1b[2J[[answer answer")
    assert short.endswith("]] ...")
    assert len(short) < 220
    assert _mark(pieces, full=True, colour=True).startswith("ask\n    \\x1b[2J\x1b[32manswer")
    assert _mark(pieces, full=True, colour=False).endswith("]]end")
    assert _mark([("a" * 200, False)], full=False, colour=False) == "a" * 200


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--step", 0), 3, "expected 1 to 8"),
        (("--step", 9), 3, "expected 1 to 8"),
        (("--step", 1, "--rank", 1), 3, "ran on 1 ranks; expected 0 to 0"),
        (("--step", 1, "--shards", "nowhere"), 5, "give its path with --shards"),
    ],
)
def test_a_step_or_rank_that_is_not_there_is_an_error(
    options: tuple[object, ...], code: int, message: str, cached_run: Path
) -> None:
    result = show(cached_run, *options)
    assert result.exit_code == code
    assert message in result.stderr


@pytest.fixture(scope="module")
def cached_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("cached"), world_size=1, batch="packs_per_step = 4")


def test_a_set_that_moved_is_found_and_another_set_is_refused(
    cached_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(cached_run.parent / "set", tmp_path / "moved")
    moved = show(cached_run, "--step", 1, "--shards", tmp_path / "moved")
    assert moved.stdout == show(cached_run, "--step", 1).stdout
    other, _ = write_inputs(tmp_path / "other", num_packs=5)
    result = show(cached_run, "--step", 1, "--shards", other)
    assert result.exit_code == 5
    assert "the run was trained on" in result.stderr
    assert show(tmp_path, "--step", 1).exit_code == 5


def test_no_torch_is_needed() -> None:
    code = "import sys, train.results.which; print({'torch', 'tokenizers'} & {*sys.modules})"
    words = [sys.executable, "-P", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
