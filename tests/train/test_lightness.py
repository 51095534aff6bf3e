"""What training does without: no tokenizer before the export, no reading of shards that it does not
train on."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from repository import ROOT
from shard_sets import random_packs, write_shard_set
from train_runs import VOCAB, train_here, write_inputs

from shared import config
from shared.hashing import digest, sha256_bytes
from shared.shard_format import COLUMNS, Manifest, fingerprint_of_manifest, npy_header
from shared.shard_reader import open_shard_set
from train.config import LossConfig
from train.data.loader import StepLoader
from train.data.step_order import Unit, make_order

GIB = 2**30


def forbid_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a tokenizer was made or called")

    for name in ("from_file", "from_str", "from_buffer", "from_pretrained"):
        monkeypatch.setattr(tokenizers.Tokenizer, name, forbidden)
    for cls in (transformers.PreTrainedTokenizerBase, transformers.AutoTokenizer):
        monkeypatch.setattr(cls, "from_pretrained", forbidden)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "__init__", forbidden)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "__call__", forbidden)


def test_no_tokenizer_is_made_or_called_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, recipe = write_inputs(tmp_path)
    call = ("--shards", shards, "--recipe", recipe, "--output", tmp_path / "run", "--max-steps", 3)
    with monkeypatch.context() as patched:
        forbid_tokenizers(patched)
        assert train_here(*call, "--stop-after", 2).exit_code == 75
        with pytest.raises(AssertionError, match="a tokenizer was made"):  # the trap works
            transformers.AutoTokenizer.from_pretrained(shards / "tokenizer")
    assert train_here(*call).exit_code == 0


def make_huge(
    path: Path, packs: list[list[tuple[list[int], list[int]]]], *, num_tokens: int
) -> Path:
    """Write `packs` as shard 0 and a second shard of `num_tokens` that is a hole in the file.

    Its manifest is true to its sizes; the digest of the hole is made up, as nothing but `verify`
    reads it.
    """
    write_shard_set(path, packs, max_seq_len=32, vocab_size=VOCAB)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["seal"]
    num_packs = num_tokens // 32
    rows = {
        "seq_offsets": num_packs + 1,
        "pack_offsets": num_packs + 1,
        "pack_loss_tokens": num_packs,
        "seq_origin": num_packs,
    }
    ends = {"seq_offsets": num_tokens, "pack_offsets": num_packs}
    folder, files = path / "shards" / "00001", {}
    folder.mkdir()
    for name, (dtype, tail) in COLUMNS.items():
        shape = (rows.get(name, num_tokens), *tail)
        header = npy_header(dtype, shape)
        size = len(header) + int(np.prod(shape)) * np.dtype(dtype).itemsize
        with (folder / f"{name}.npy").open("wb") as file:
            file.write(header)
            file.truncate(size)
            if name in ends:
                file.seek(size - 8)
                file.write(ends[name].to_bytes(8, "little"))
        files[f"{name}.npy"] = {"bytes": size, "sha256": sha256_bytes(header)}
    manifest["shards"].append(
        {
            "path": "shards/00001",
            "packs": num_packs,
            "sequences": num_packs,
            "tokens": num_tokens,
            "loss_tokens": 0,
            "files": files,
        }
    )
    for name, more in (("packs", num_packs), ("sequences", num_packs), ("tokens", num_tokens)):
        manifest["totals"][name] += more
    manifest["fingerprint"] = fingerprint_of_manifest(config.build(Manifest, manifest, "test"))
    assert manifest["inputs_digest"] == digest(manifest["inputs"])
    (path / "manifest.json").write_text(json.dumps({**manifest, "seal": digest(manifest)}))
    return path


PROBE = """
import resource, sys
from pathlib import Path
from shared.shard_reader import open_shard_set
from train.data.step_order import make_order
def read_chars():
    lines = open("/proc/self/io").read().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])
read, memory = read_chars(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shard_set = open_shard_set(Path(sys.argv[1]))
order = make_order(
    fingerprint=shard_set.manifest.fingerprint, seed=0, num_units=shard_set.num_packs,
    units_per_step=16, unit="pack", epochs=2, max_steps=None
)
order.step(0), order.step(order.total_steps - 1)
print(read_chars() - read, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
"""


def cost_of_opening(path: Path) -> tuple[int, int]:
    """Return the bytes read and the KiB of memory gained by opening a set and planning its first
    and last step."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    read, memory = done.stdout.split()
    return int(read), int(memory)


def test_opening_and_planning_cost_the_same_for_a_set_of_40_gigabytes(tmp_path: Path) -> None:
    packs = random_packs(num_packs=3, max_seq_len=32, vocab_size=VOCAB)
    small = write_shard_set(tmp_path / "small", packs, max_seq_len=32, vocab_size=VOCAB)
    huge = make_huge(tmp_path / "huge", packs, num_tokens=6 * GIB)
    assert sum(file.stat().st_size for file in huge.rglob("*.npy")) > 36 * GIB
    (small_read, small_memory), (huge_read, huge_memory) = (
        cost_of_opening(small),
        cost_of_opening(huge),
    )
    assert huge_read < small_read + 64 * 1024
    assert huge_memory < small_memory + 2 * 1024


@pytest.mark.parametrize("unit", ["pack", "conversation"])
def test_a_step_reads_the_pages_of_its_packs_only(unit: Unit, tmp_path: Path) -> None:
    """Feeding a few steps of a set of 200 MB makes the process touch a small part of it."""
    packs = random_packs(num_packs=3, max_seq_len=32, vocab_size=VOCAB)
    shard_set = open_shard_set(make_huge(tmp_path / "huge", packs, num_tokens=32 * 2**20))
    num_units = 3 if unit == "pack" else sum(map(len, packs))
    order = make_order(
        unit=unit,
        fingerprint=shard_set.manifest.fingerprint,
        seed=0,
        num_units=num_units,
        units_per_step=num_units,
        epochs=1,
        max_steps=None,
    )
    feed = StepLoader(
        shard_set=shard_set,
        order=order,
        loss=LossConfig(),
        rank=0,
        world_size=1,
        packs_per_micro_batch=1,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batch = feed.make(0)
    assert batch.num_loss_tokens == shard_set.manifest.totals.loss_tokens
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024


def test_the_trainer_maps_no_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind column is for people who look: a run does not touch it, so it may lie on slow
    storage."""
    from shared import shard_reader

    def forbidden(*_arguments: object) -> None:
        raise AssertionError("the kind column was read")

    monkeypatch.setattr(shard_reader.ShardSet, "kinds", forbidden)
    shards, recipe = write_inputs(tmp_path)
    call = (
        "--shards",
        shards,
        "--recipe",
        recipe,
        "--output",
        tmp_path / "run",
        "--max-steps",
        1,
        "--stop-after",
        1,
    )
    assert train_here(*call).exit_code == 0


def test_a_read_only_shard_set_trains(tmp_path: Path) -> None:
    shards, recipe = write_inputs(tmp_path)
    for folder, names, files in os.walk(shards, topdown=False):
        for name in (*names, *files):
            (Path(folder) / name).chmod(0o555)
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    call = ("--shards", shards, "--recipe", recipe, "--output", tmp_path / "run", "--max-steps", 1)
    assert train_here(*call).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*")} == before
