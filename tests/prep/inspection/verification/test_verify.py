"""Verify: a true set passes; whatever is changed in one, its position is reported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lettered_sets import Columns, write_lettered_set

from prep.inspection.verification.verify import verify
from shared.errors import ArtifactError, ChecksumError, IncompleteArtifactError
from shared.shard_format import EVAL_DIR

#                pack 0                                   pack 1
PACKS = [[("tutaaT", "000111"), ("tutAaT", "000111")], [("tstutraTt", "000001110")]]
MORE = [[("tuutaT", "000011")]]


def test_a_true_set_is_reported_line_by_line(tmp_path: Path) -> None:
    path = write_lettered_set(tmp_path / "set", [PACKS, MORE])
    lines = verify(path)
    assert lines[0] == f"{path}: holds"
    assert "11 loss tokens follow train_on = assistant, boundary = overlap" in lines[-1]


def test_the_eval_set_is_verified_too(tmp_path: Path) -> None:
    path = write_lettered_set(tmp_path / "set", [PACKS])
    inner = write_lettered_set(path / EVAL_DIR, [MORE])
    assert f"{inner}: holds" in verify(path)
    (inner / "manifest.json").unlink()
    with pytest.raises(IncompleteArtifactError, match="eval"):
        verify(path)


@pytest.mark.parametrize(
    "name", ["tokens", "loss_mask", "kind", "seq_offsets", "pack_offsets", "seq_origin"]
)
def test_a_flipped_byte_of_a_column_is_a_checksum_error_that_names_the_file(
    name: str, tmp_path: Path
) -> None:
    path = write_lettered_set(tmp_path / "set", [PACKS])
    file = path / "shards" / "00000" / f"{name}.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumError, match=f"{name}.npy"):
        verify(path)


def test_a_flipped_byte_of_the_tokenizer_is_a_checksum_error(tmp_path: Path) -> None:
    path = write_lettered_set(tmp_path / "set", [PACKS])
    (path / "tokenizer" / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(ChecksumError, match=r"tokenizer\.json"):
        verify(path)


def test_a_missing_or_short_column_is_incomplete(tmp_path: Path) -> None:
    path = write_lettered_set(tmp_path / "set", [PACKS])
    file = path / "shards" / "00000" / "kind.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IncompleteArtifactError, match=r"kind\.npy"):
        verify(path)
    file.unlink()
    with pytest.raises(IncompleteArtifactError, match=r"kind\.npy"):
        verify(path)


def test_a_manifest_that_was_rewritten_by_hand_is_a_checksum_error(tmp_path: Path) -> None:
    path = write_lettered_set(tmp_path / "set", [PACKS])
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(ChecksumError, match="not canonical JSON"):
        verify(path)


def _set(name: str, index: Any, value: Any) -> Callable[[Columns], None]:
    def spoil(columns: Columns) -> None:
        columns[name][index] = value

    return spoil


POSITION = r"shards/00000 pack {}, sequence {} \(chats row {}\), token {}: {}"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            _set("seq_offsets", 2, 5),
            r"shards/00000: seq_offsets\[2\] is not above the one before it",
        ),
        (
            _set("pack_offsets", 1, 0),
            r"shards/00000: pack_offsets\[1\] is not above the one before it",
        ),
        (
            _set("pack_offsets", 1, 3),
            r"shards/00000: pack_offsets\[2\] is not above the one before it",
        ),
        (
            _set("pack_loss_tokens", 1, 4),
            r"shards/00000 pack 1: pack_loss_tokens is 4, its loss mask sums to 3",
        ),
        (_set("tokens", 7, -1), POSITION.format(0, 1, 1, 1, "its id is not between 0 and")),
        (_set("tokens", 7, 300), POSITION.format(0, 1, 1, 1, "its id is not between 0 and 299")),
        (_set("loss_mask", 4, 2), POSITION.format(0, 0, 0, 4, "its loss mask is neither 0 nor 1")),
        (
            _set("loss_mask", 12, 1),
            POSITION.format(1, 0, 2, 0, "it is the first of its sequence, yet trained"),
        ),
        (
            _set("kind", 13, 9),
            POSITION.format(1, 0, 2, 1, "its kind is not one that the manifest lists"),
        ),
        (
            _set("seq_origin", (1, 0), 1),
            r"shards/00000 sequence 1: origin \[1, 1, 0\] is no row of a source",
        ),
        (
            _set("seq_origin", (1, 1), 5),
            r"shards/00000 sequence 1: origin \[0, 5, 0\] is no row of a source",
        ),
        (
            _set("seq_origin", (1, 2), -1),
            r"shards/00000 sequence 1: origin \[0, 1, -1\] is no row of a source",
        ),
        (
            _set("seq_origin", (1, 1), 0),
            r"source 'chats' row 0 is used 2 times; expected at most 1",
        ),
    ],
)
def test_a_broken_invariant_is_reported_with_its_position(
    spoil: Callable[[Columns], None], expected: str, tmp_path: Path
) -> None:
    path = write_lettered_set(tmp_path / "set", [PACKS], spoil=spoil)
    with pytest.raises(ArtifactError, match=expected):
        verify(path)


@pytest.mark.parametrize(
    ("declare", "expected"),
    [
        (lambda m: m.update(max_token_id=40), "max_token_id is 40, the largest id is 20"),
        (lambda m: m["totals"].update(density=0.5), "density is 0.5"),
        (
            lambda m: m["sources"][0].update(tokens=20),
            "source 'chats' has tokens = 20, its sequences hold 21",
        ),
        (
            lambda m: m["sources"][0].update(loss_tokens=1),
            "source 'chats' has loss_tokens = 1, its sequences hold 9",
        ),
        (
            lambda m: m["sources"][0].update(rows_used=2),
            "rows_used = 2, its sequences come from 3 rows",
        ),
        (lambda m: m["config"]["mask"].update(train_on="some"), "config.mask: train_on = 'some'"),
        (
            lambda m: m["config"].update(lengths={"min_loss_tokens": 4}),
            "its sequence has 3 loss tokens",
        ),
    ],
)
def test_a_manifest_that_says_something_else_than_the_columns_is_named(
    declare: Callable[[dict[str, Any]], None], expected: str, tmp_path: Path
) -> None:
    path = write_lettered_set(tmp_path / "set", [PACKS], declare=declare)
    with pytest.raises(ArtifactError, match=expected):
        verify(path)


def test_a_pack_above_the_capacity_is_named(tmp_path: Path) -> None:
    path = write_lettered_set(tmp_path / "set", [PACKS], max_seq_len=11)
    with pytest.raises(ArtifactError, match="shards/00000 pack 0 has 12 tokens; max_seq_len is 11"):
        verify(path)


def test_rows_may_repeat_as_often_as_epochs_say(tmp_path: Path) -> None:
    def repeat(columns: Columns) -> None:
        columns["seq_origin"][:] = [[0, 0, 0], [0, 0, 0], [0, 1, 0]]

    def declare(manifest: dict[str, Any]) -> None:
        manifest["sources"][0]["rows_used"] = 2

    for epochs, name in ((1.5, "holds"), (1.0, "fails")):
        details = {"epochs": epochs}
        write_lettered_set(tmp_path / name, [PACKS], spoil=repeat, declare=declare, details=details)
    assert verify(tmp_path / "holds")
    with pytest.raises(ArtifactError, match="row 0 is used 2 times; expected at most 1"):
        verify(tmp_path / "fails")


def test_a_mask_that_the_policy_does_not_give_is_named_with_its_token(tmp_path: Path) -> None:
    for name, mask, expected in (
        ("more", "001111", "is trained, but its kind and position say that it must not be"),
        ("less", "000101", "is not trained, but its kind and position say that it must be"),
    ):
        path = write_lettered_set(
            tmp_path / name,
            [[[("tutaaT", "000111"), ("tutaaT", mask)]]],
            details={"messages_untrained": 0},
        )
        token = 2 if name == "more" else 4
        with pytest.raises(ArtifactError, match=POSITION.format(0, 1, 1, token, expected)):
            verify(path)


def test_turns_left_out_by_their_messages_are_counted(tmp_path: Path) -> None:
    packs = [[("tutaaTtutaT", "00000000011")]]
    path = write_lettered_set(tmp_path / "set", [packs], details={"messages_untrained": 1})
    assert "1 turns left out, as `train: false` does" in verify(path)[-1]
    strict = write_lettered_set(tmp_path / "strict", [packs], details={"messages_untrained": 0})
    with pytest.raises(ArtifactError, match="must be"):
        verify(strict)


def test_a_set_without_a_policy_says_that_masks_are_not_checked(tmp_path: Path) -> None:
    assert "not checked" in verify(write_lettered_set(tmp_path / "set", [PACKS], settings={}))[-1]


def test_positions_are_right_beyond_the_first_block_and_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.inspection.verification.verify._BLOCK_TOKENS", 10)
    packs = [[("tutaaT", "000111"), ("tuaT", "0011")] for _ in range(5)]
    write_lettered_set(tmp_path / "true", [packs, packs])
    assert verify(tmp_path / "true")
    wrong = [*packs[:3], [("tutaaT", "000111"), ("tuaT", "0111")], packs[4]]
    write_lettered_set(tmp_path / "false", [packs, wrong])
    with pytest.raises(
        ArtifactError,
        match=r"shards/00001 pack 3, sequence 1 \(chats row 17\), token 1: is trained",
    ):
        verify(tmp_path / "false")
