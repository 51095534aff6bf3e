"""A shard file that changes under a running job ends it with an error that names the file, before a
page of it is read."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from shard_sets import random_packs, write_shard_set
from train_runs import RECIPE, VOCAB, status, train_here, write_inputs

from shared.errors import ArtifactError
from shared.shard_reader import open_shard_set
from train.loop.schedule import learning_rate


def truncate(file: Path) -> None:
    os.truncate(file, 128)


def replace(file: Path) -> None:
    """Replace it by another file of the same size, as building the set again does."""
    shutil.copyfile(file, file.with_name("other"))
    os.replace(file.with_name("other"), file)


def write_into(file: Path) -> None:
    content = file.read_bytes()
    os.utime(file, ns=(1, 1))
    assert file.read_bytes() == content


CHANGES = {
    truncate: "it has 128 bytes, it had",
    replace: "another file has its name",
    write_into: "it was written to",
    os.remove: "it cannot be found any more",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("column", ["tokens", "loss_mask", "seq_offsets", "pack_loss_tokens"])
def test_a_changed_file_is_named(change: Any, column: str, tmp_path: Path) -> None:
    packs = random_packs(num_packs=6, max_seq_len=32, vocab_size=VOCAB)
    shards = write_shard_set(
        tmp_path / "set", packs, max_seq_len=32, vocab_size=VOCAB, packs_per_shard=2
    )
    shard_set = open_shard_set(shards)
    shard_set.check_unchanged()
    change(shards / "shards" / "00001" / f"{column}.npy")
    shard_set.check_unchanged([0, 2])
    message = f"00001/{column}.npy was changed while it was in use: {CHANGES[change]}"
    with pytest.raises(ArtifactError, match=message):
        shard_set.check_unchanged([1])
    with pytest.raises(ArtifactError, match="put the shard set back as it was"):
        shard_set.check_unchanged()


def test_the_shards_of_a_step_are_those_that_hold_its_packs_or_sequences(tmp_path: Path) -> None:
    import numpy as np

    packs = random_packs(num_packs=6, max_seq_len=32, vocab_size=VOCAB)
    shards = write_shard_set(
        tmp_path / "set", packs, max_seq_len=32, vocab_size=VOCAB, packs_per_shard=2
    )
    shard_set = open_shard_set(shards)
    assert shard_set.shards_of(np.array([5, 0, 1]), "pack") == [0, 2]
    first_of_second = len(packs[0]) + len(packs[1])
    assert shard_set.shards_of(np.array([first_of_second - 1]), "conversation") == [0]
    assert shard_set.shards_of(np.array([first_of_second]), "conversation") == [1]


@pytest.mark.parametrize("batch", ["packs_per_step = 4", "conversations_per_step = 8"])
@pytest.mark.parametrize("change", [truncate, replace])
def test_a_run_ends_with_the_name_of_the_file_and_resumes_when_it_is_back(
    change: Any, batch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, recipe = write_inputs(tmp_path, recipe=RECIPE.replace("packs_per_step = 4", batch))
    file, backup = shards / "shards" / "00000" / "tokens.npy", tmp_path / "backup"
    shutil.copyfile(file, backup)

    def rate_and_change(step: int, **options: Any) -> float:
        is_first = os.path.samestat(opened, file.stat())
        if step == 3 and is_first and status(run)["state"] == "running":
            change(file)
        return learning_rate(step, **options)

    run, opened = tmp_path / "run", file.stat()
    call = ("--shards", shards, "--recipe", recipe, "--output", run, "--max-steps", 8)
    with monkeypatch.context() as patched:
        patched.setattr("train.loop.loop.learning_rate", rate_and_change)
        result = train_here(*call)
    assert result.exit_code == 5
    assert "tokens.npy was changed while it was in use" in result.stderr
    assert status(run)["exit_code"] == 5
    shutil.copyfile(backup, file)
    assert train_here(*call).exit_code == 0
