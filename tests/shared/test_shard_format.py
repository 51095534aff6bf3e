"""The manifest and FORMAT.md: golden identities, strict reading, and the worked example of the
specification."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from repository import ROOT

from shared import atomic, config
from shared.errors import ArtifactError, ChecksumError, FormatVersionError
from shared.hashing import canonical_json, digest, sha256_bytes
from shared.shard_format import (
    COLUMNS,
    FORMAT_VERSION,
    KIND_MASK,
    MANIFEST_NAME,
    STRADDLES,
    FileEntry,
    Kind,
    ShardEntry,
    fingerprint_of,
    manifest_from_json,
    npy_header,
    sealed,
)
from shared.shard_reader import check_hashes, open_shard_set
from shared.shard_writer import write_shard

SPECIFICATION = (ROOT / "shared" / "FORMAT.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """Return the fenced block `name` of FORMAT.md."""
    found = re.findall(rf"^```{name}\n(.*?)^```$", SPECIFICATION, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, name
    return str(found[0])


def example_columns() -> dict[str, npt.NDArray[Any]]:
    columns = {}
    for line in block("columns").splitlines():
        found = re.fullmatch(r"(\w+) +(\S+) +\((.*?)\) +(.*)", line)
        assert found, line
        name, dtype, shape, values = found.groups()
        sizes = [int(size) for size in shape.split(",") if size.strip()]
        columns[name] = np.array([int(value) for value in values.split()], dtype).reshape(sizes)
    return columns


def example_manifest() -> dict[str, Any]:
    manifest = json.loads(block("manifest"))
    assert isinstance(manifest, dict)
    return manifest


def write_example(root: Path) -> ShardEntry:
    """Write the example as a reader of FORMAT.md would, with our writer for the columns."""
    entry = write_shard(root, 0, example_columns())
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_bytes(b"{}\n")
    (root / MANIFEST_NAME).write_text(block("manifest"), encoding="utf-8")
    return entry


# --- the worked example of FORMAT.md


def test_the_example_has_every_column_as_specified() -> None:
    columns = example_columns()
    assert list(columns) == list(COLUMNS)
    assert {name: (array.dtype.str, array.shape[1:]) for name, array in columns.items()} == COLUMNS


def test_the_example_is_what_the_writer_writes(tmp_path: Path) -> None:
    entry = write_example(tmp_path)
    assert config.to_plain(entry) == example_manifest()["shards"][0]


def test_the_hex_dump_is_the_file(tmp_path: Path) -> None:
    write_example(tmp_path)
    dumped = b""
    for line in block("hex").splitlines():
        offset, data, text = line.split("  ", 1)[0], line[10:58], line[60:].strip("|")
        assert int(offset, 16) == len(dumped)
        row = bytes.fromhex(data)
        assert text == "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        dumped += row
    assert dumped == (tmp_path / "shards/00000/pack_offsets.npy").read_bytes()


def test_the_example_manifest_is_canonical_and_opens(tmp_path: Path) -> None:
    write_example(tmp_path)
    assert canonical_json(example_manifest()) == block("manifest").encode()
    check_hashes(tmp_path)
    shards = open_shard_set(tmp_path)
    first, second = shards.pack(0), shards.pack(1)
    assert first.tokens.tolist() == [1, 17, 5, 21, 22, 2, 40, 2]
    assert first.loss_mask.tolist() == [0, 0, 1, 1, 1, 1, 0, 1]
    assert first.seq_offsets.tolist() == [0, 6, 8]
    assert first.seq_origin.tolist() == [[0, 0, 0], [0, 2, 0]]
    assert second.tokens.tolist() == [30, 31, 32, 33, 2]
    assert second.seq_offsets.tolist() == [0, 5]
    assert second.seq_origin.tolist() == [[1, 0, 8]]
    assert shards.kinds(0).tolist()[2] == Kind.ASSISTANT | STRADDLES == 131
    assert shards.loss_tokens(np.array([1, 0])).tolist() == [4, 5]


def test_the_pack_picture_shows_the_columns() -> None:
    columns = example_columns()
    rows = re.findall(r"^(?:pack \d|loss) +\|(.*)\|", SPECIFICATION, re.MULTILINE)
    words = [row.replace("|", " ").split() for row in rows]
    tokens = [int(word) for row in words[0::2] for word in row]
    mask = [".x".index(word) for row in words[1::2] for word in row]
    assert tokens == columns["tokens"].tolist()
    assert mask == columns["loss_mask"].tolist()


def test_the_example_keeps_the_invariants_of_the_specification() -> None:
    columns = example_columns()
    starts = columns["seq_offsets"][:-1]
    assert columns["loss_mask"][starts].tolist() == [0, 0, 0]
    bounds = columns["seq_offsets"][columns["pack_offsets"]]
    assert (
        np.add.reduceat(columns["loss_mask"], bounds[:-1]).tolist()
        == columns["pack_loss_tokens"].tolist()
    )
    assert np.diff(bounds).max() <= example_manifest()["max_seq_len"]
    assert columns["tokens"].max() == example_manifest()["max_token_id"]


def test_the_fingerprint_of_the_example_is_the_hash_of_the_object_shown() -> None:
    shown = block("fingerprint").encode()
    fingerprint = example_manifest()["fingerprint"]
    assert canonical_json(json.loads(shown)) == shown
    assert sha256_bytes(shown) == fingerprint
    assert f"its sha256 is `{fingerprint}`" in SPECIFICATION


def test_the_specification_lists_the_kinds_and_the_columns() -> None:
    kinds = re.findall(r"^\| (\d) \| `(\w+)` \|", SPECIFICATION, re.MULTILINE)
    assert {name: int(number) for number, name in kinds} == {
        kind.name.lower(): int(kind) for kind in Kind
    }
    assert example_manifest()["kinds"] == {kind.name.lower(): int(kind) for kind in Kind}
    columns = re.findall(r"^\| `(\w+)\.npy` \| `(\S+)` \[", SPECIFICATION, re.MULTILINE)
    assert {name: dtype.replace("\\|", "|") for name, dtype in columns} == {
        name: dtype for name, (dtype, _) in COLUMNS.items()
    }
    assert f"format version {FORMAT_VERSION}" in SPECIFICATION.splitlines()[0]


def test_the_straddle_bit_lies_outside_the_kinds() -> None:
    assert STRADDLES & KIND_MASK == 0
    assert all(kind <= KIND_MASK for kind in Kind)


# --- identities


def a_fingerprint(**changes: Any) -> str:
    entry = FileEntry(bytes=1, sha256="0" * 64)
    shard = ShardEntry(
        path="shards/00000", packs=1, sequences=1, tokens=1, loss_tokens=0, files={"a.npy": entry}
    )
    values: dict[str, Any] = {
        "max_seq_len": 8,
        "tokenizer_files": {"tokenizer.json": entry},
        "template_sha256": "1" * 64,
        "source_names": ["a", "b"],
        "shards": [shard],
    }
    return fingerprint_of(**{**values, **changes})


def test_the_fingerprint_is_golden() -> None:
    """If this fails, every shard set in the world has another identity: bump FORMAT_VERSION."""
    assert a_fingerprint() == "42a5a65c39d3cb91805ca1401d80cd690e0355f368574170463db92595660633"


OTHER = FileEntry(bytes=1, sha256="f" * 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_seq_len": 9},
        {"tokenizer_files": {"tokenizer.json": OTHER}},
        {"template_sha256": "2" * 64},
        {"source_names": ["b", "a"]},
        {"shards": []},
    ],
)
def test_the_fingerprint_depends_on_all_that_training_sees(changes: dict[str, Any]) -> None:
    assert a_fingerprint(**changes) != a_fingerprint()


@pytest.mark.parametrize("key", ["name", "recipe", "config"])
def test_the_fingerprint_does_not_depend_on_names(key: str) -> None:
    data = example_manifest()
    data[key] = {"other": 1} if key == "config" else "other"
    reseal(data)
    assert manifest_from_json(data, "here").fingerprint == example_manifest()["fingerprint"]


# the padding of a header is hashed, so it may not change with numpy's
@pytest.mark.parametrize(
    "shape", [(0,), (13,), (134217728,), (9223372036854775807,), (0, 3), (2, 3), (10**18, 3)]
)
@pytest.mark.parametrize("dtype", ["<i4", "|u1", "<i8"])
def test_a_header_has_128_bytes_that_numpy_reads(
    dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    header = npy_header(dtype, shape)
    assert len(header) == 128
    (tmp_path / "file").write_bytes(header)
    with (tmp_path / "file").open("rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == (shape, False, np.dtype(dtype))


# --- strict reading


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, [2]])
def test_another_version_is_refused_before_anything_else(version: Any) -> None:
    with pytest.raises(FormatVersionError, match="this program reads 2") as caught:
        manifest_from_json({"format_version": version, "nonsense": True}, "here")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("data", [None, [], 1, {}])
def test_what_is_no_manifest_has_no_version(data: Any) -> None:
    with pytest.raises(FormatVersionError):
        manifest_from_json(data, "here")


def redigest(data: dict[str, Any]) -> None:
    """Make the fingerprint and the seal fit the changed manifest, so that another check must refuse
    it."""
    data["fingerprint"] = digest(
        {
            "format_version": 2,
            "max_seq_len": data["max_seq_len"],
            "tokenizer": {
                name: entry["sha256"] for name, entry in data["tokenizer"]["files"].items()
            },
            "template": data["chat_template"]["sha256"],
            "sources": [source["name"] for source in data["sources"]],
            "shards": [
                {name: entry["sha256"] for name, entry in shard["files"].items()}
                for shard in data["shards"]
            ],
        }
    )
    reseal(data)


def reseal(data: dict[str, Any]) -> None:
    data.pop("seal", None)
    with contextlib.suppress(ValueError):  # NaN: nothing can be sealed
        data["seal"] = digest(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(extra=1), "unknown key 'extra'"),
        (
            lambda data: data["totals"].update(pack=1),
            "unknown key 'totals.pack'; did you mean 'packs'",
        ),
        (lambda data: data.pop("kinds"), "missing key 'kinds'"),
        (lambda data: data.update(max_seq_len="8"), "max_seq_len = '8'; expected a whole number"),
        (
            lambda data: data.update(format_version=2.0),
            "format_version = 2.0; expected a whole number",
        ),
        (lambda data: data["totals"].update(density=float("nan")), "is no manifest"),
        (lambda data: data["totals"].update(tokens=14), "totals.tokens is 14, the shards hold 13"),
        (lambda data: data["totals"].update(packs=3), "totals.packs is 3, the shards hold 2"),
        (
            lambda data: data["shards"][0].update(path="/etc"),
            "shards.0.path is '/etc'; expected 'shards/00000'",
        ),
        (lambda data: data["shards"][0]["files"].pop("kind.npy"), "shard 0 lists"),
        (
            lambda data: data["shards"][0]["files"].update({"x": {"bytes": 1, "sha256": ""}}),
            "shard 0 lists",
        ),
    ],
)
def test_a_manifest_that_is_not_exactly_a_manifest_is_refused(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    data = example_manifest()
    change(data)
    redigest(data)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        manifest_from_json(data, "here")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a//b", ".", "", "a\\b", "./a"]
)
def test_a_tokenizer_file_outside_its_folder_is_refused(name: str) -> None:
    data = example_manifest()
    data["tokenizer"]["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    redigest(data)
    with pytest.raises(ArtifactError, match="is not a plain relative path"):
        manifest_from_json(data, "here")


def test_a_manifest_changed_by_hand_is_refused() -> None:
    data = example_manifest()
    data["max_seq_len"] = 16
    with pytest.raises(ChecksumError, match="seal is "):
        manifest_from_json(data, "here")
    reseal(data)
    with pytest.raises(ChecksumError, match="fingerprint is "):
        manifest_from_json(data, "here")
    data = example_manifest()
    data["inputs"]["seed"] = 1
    reseal(data)
    with pytest.raises(ChecksumError, match="inputs_digest is "):
        manifest_from_json(data, "here")


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = manifest_from_json(example_manifest(), "here")
    atomic.write_json(tmp_path / MANIFEST_NAME, sealed(manifest))
    assert (tmp_path / MANIFEST_NAME).read_text(encoding="utf-8") == block("manifest")
