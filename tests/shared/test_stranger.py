"""A reader written from FORMAT.md alone, with the standard library and none of our code, agrees
with ours."""

import array
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from shard_sets import random_packs, write_shard_set

from shared.shard_reader import open_shard_set

TYPES = {
    "tokens": ("i", "<i4"),
    "loss_mask": ("B", "|u1"),
    "kind": ("B", "|u1"),
    "seq_offsets": ("q", "<i8"),
    "pack_offsets": ("q", "<i8"),
    "pack_loss_tokens": ("i", "<i4"),
    "seq_origin": ("q", "<i8"),
}


def canonical(value: Any) -> bytes:
    return (
        json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_manifest(root: Path) -> dict[str, Any]:
    raw = (root / "manifest.json").read_bytes()
    manifest = dict(json.loads(raw))
    assert canonical(manifest) == raw
    content = {
        "format_version": 2,
        "max_seq_len": manifest["max_seq_len"],
        "tokenizer": {
            name: entry["sha256"] for name, entry in manifest["tokenizer"]["files"].items()
        },
        "template": manifest["chat_template"]["sha256"],
        "sources": [source["name"] for source in manifest["sources"]],
        "shards": [
            {name: entry["sha256"] for name, entry in shard["files"].items()}
            for shard in manifest["shards"]
        ],
    }
    assert sha256(canonical(content)) == manifest["fingerprint"]
    unsealed = {key: value for key, value in manifest.items() if key != "seal"}
    assert sha256(canonical(unsealed)) == manifest["seal"]
    assert sha256(canonical(manifest["inputs"])) == manifest["inputs_digest"]
    return manifest


def read_shard(folder: Path, shard: dict[str, Any]) -> dict[str, list[int]]:
    tokens, sequences, packs = shard["tokens"], shard["sequences"], shard["packs"]
    rows_of = {
        "seq_offsets": sequences + 1,
        "pack_offsets": packs + 1,
        "pack_loss_tokens": packs,
        "seq_origin": sequences,
    }
    columns = {}
    for name, (code, dtype) in TYPES.items():
        data = (folder / f"{name}.npy").read_bytes()
        assert shard["files"][f"{name}.npy"] == {"bytes": len(data), "sha256": sha256(data)}
        rows = rows_of.get(name, tokens)
        shape = f"({rows}, 3)" if name == "seq_origin" else f"({rows},)"
        text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
        assert data[:128] == b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"
        values = array.array(code)
        values.frombytes(data[128:])
        columns[name] = values.tolist()
    return columns


def check_shard(columns: dict[str, list[int]], shard: dict[str, Any], max_seq_len: int) -> None:
    seq, pack, mask = columns["seq_offsets"], columns["pack_offsets"], columns["loss_mask"]
    assert (seq[0], seq[-1], pack[0], pack[-1]) == (0, shard["tokens"], 0, shard["sequences"])
    assert seq == sorted(set(seq))
    assert pack == sorted(set(pack))
    assert set(mask) <= {0, 1}
    assert not any(mask[start] for start in seq[:-1])
    bounds = [seq[position] for position in pack]
    assert all(end - start <= max_seq_len for start, end in itertools.pairwise(bounds))
    assert columns["pack_loss_tokens"] == [sum(mask[a:b]) for a, b in itertools.pairwise(bounds)]
    assert sum(mask) == shard["loss_tokens"]


@pytest.mark.parametrize("packs_per_shard", [1, 3, 100])
def test_a_reader_made_from_the_specification_reads_the_same_packs(
    tmp_path: Path, packs_per_shard: int
) -> None:
    packs = random_packs(num_packs=7, max_seq_len=64, vocab_size=300)
    root = write_shard_set(
        tmp_path / "set", packs, max_seq_len=64, vocab_size=300, packs_per_shard=packs_per_shard
    )
    manifest, ours = read_manifest(root), open_shard_set(root)
    pack_id = 0
    for number, shard in enumerate(manifest["shards"]):
        assert shard["path"] == f"shards/{number:05d}"
        columns = read_shard(root / shard["path"], shard)
        check_shard(columns, shard, manifest["max_seq_len"])
        for first, last in zip(columns["pack_offsets"], columns["pack_offsets"][1:], strict=False):
            start, end = columns["seq_offsets"][first], columns["seq_offsets"][last]
            pack = ours.pack(pack_id)
            assert pack.tokens.tolist() == columns["tokens"][start:end]
            assert pack.loss_mask.tolist() == columns["loss_mask"][start:end]
            assert (pack.seq_offsets + start).tolist() == columns["seq_offsets"][first : last + 1]
            assert pack.seq_origin.ravel().tolist() == columns["seq_origin"][3 * first : 3 * last]
            assert ours.kinds(pack_id).tolist() == columns["kind"][start:end]
            pack_id += 1
    assert pack_id == manifest["totals"]["packs"] == ours.num_packs
