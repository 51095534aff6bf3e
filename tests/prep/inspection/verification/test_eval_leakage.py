"""What two sides of a build share: no row, and of the prompts those that read the same."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lettered_sets import kinds_of, write_lettered_set
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows

from prep.inspection.verification.eval_leakage import check_eval_leakage, prompts_of
from prep.inspection.verification.verify import verify
from prep.rendering.control.markers import required_markers
from shared import atomic
from shared.errors import ArtifactError
from shared.hashing import digest
from shared.shard_format import ASSISTANT_KINDS, EVAL_DIR, KIND_MASK, Kind
from shared.shard_reader import open_shard_set


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture
def tables(tokenizer: Path, tmp_path: Path) -> dict[str, Any]:
    """Forty questions, each with three answers; about a quarter of the questions is held out."""
    rows = [chat(f"What is {n % 40}?", f"The answer is {n}.") for n in range(120)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return mixture_of([file], tokenizer, eval={"fraction": 0.25})


@pytest.mark.parametrize(
    ("letters", "length"),
    [
        ("tutaaT", 3),
        ("tstutraTt", 5),
        ("tataTutaT", 7),
        ("uT", 1),
        ("tttaaT", None),
        ("tuut", None),
        ("tuotcT", 4),
    ],
)
def test_a_prompt_ends_where_the_first_answer_to_something_begins(
    letters: str, length: int | None, tmp_path: Path
) -> None:
    mask = "0" * len(letters)
    path = write_lettered_set(
        tmp_path / "set", [[[("uaT", "000"), (letters, mask), ("utaT", "0000")]]], max_seq_len=99
    )
    columns = dict(open_shard_set(path).shards[0])
    others = [
        tokens.tobytes()
        for tokens in (columns["tokens"][:1], columns["tokens"][len(letters) + 3 :][:2])
    ]
    expected = [columns["tokens"][3:][:length].tobytes()] if length else []
    prompts = [others[0], *expected, others[1]]
    assert list(prompts_of(columns)) == [
        hashlib.blake2b(prompt, digest_size=16).digest() for prompt in prompts
    ]


def test_prompts_that_differ_only_in_what_the_template_drops_are_counted(
    tokenizer: Path, tmp_path: Path
) -> None:
    questions = [f"What is {number}?" for number in range(40)]
    rows = [
        chat(question + space, "The answer is 4.") for question in questions for space in ("", " ")
    ]
    tables = {
        **mixture_of([write_rows(tmp_path / "rows.jsonl", rows)], tokenizer),
        "eval": {"fraction": 0.5},
        "template": {"name": "llama3"},
        "tokenizer": {"name": str(tokenizer), "add_tokens": list(required_markers("llama3"))},
    }
    line = verify(build_set(tables, tmp_path / "out").path)[-1]
    assert " 0 of" not in line


def prompts_token_by_token(letters: list[str], tokens: list[int]) -> list[list[int]]:
    """The prompt of each sequence by its definition, one token after the other."""
    prompts, start = [], 0
    for sequence in letters:
        is_asked = False
        for index, kind in enumerate(kinds_of(sequence).tolist()):
            is_asked |= kind & KIND_MASK in (Kind.USER, Kind.TOOL)
            if is_asked and kind & KIND_MASK in ASSISTANT_KINDS:
                prompts.append(tokens[start : start + index])
                break
        start += len(sequence)
    return prompts


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sequences=st.lists(st.text("tsuaATrco", min_size=1, max_size=12), min_size=1, max_size=12),
    block=st.integers(1, 30),
)
def test_prompts_are_those_of_the_definition_whatever_the_blocks(
    sequences: list[str], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.inspection.verification.eval_leakage._BLOCK_TOKENS", block)
    lengths = [len(sequence) for sequence in sequences]
    tokens = np.random.default_rng(0).integers(0, 99, sum(lengths)).astype(np.int32)
    columns = {
        "tokens": tokens,
        "kind": kinds_of("".join(sequences)),
        "seq_offsets": np.cumsum([0, *lengths]),
        "seq_origin": np.zeros((len(sequences), 3), np.int64),
    }
    assert list(prompts_of(columns)) == [
        hashlib.blake2b(np.array(prompt, np.int32).tobytes(), digest_size=16).digest()
        for prompt in prompts_token_by_token(sequences, tokens.tolist())
    ]


def test_the_two_sides_of_a_build_share_no_row_and_no_prompt(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    train = build_set(tables, tmp_path / "out")
    held_out = open_shard_set(train.path / EVAL_DIR)
    num_prompts = held_out.manifest.totals.sequences // 3
    line = f"no row is on both sides; 0 of {num_prompts} prompts read like one that is trained on"
    assert check_eval_leakage(train, held_out) == line
    assert line in verify(train.path)[-1]
    other = build_set({**tables, "seed": 1}, tmp_path / "other")
    assert check_eval_leakage(other, held_out).startswith("made from other inputs: rows are not")


def test_a_row_on_both_sides_is_named(tables: dict[str, Any], tmp_path: Path) -> None:
    whole = build_set({**tables, "eval": {"fraction": 0.0}}, tmp_path / "whole")
    shards = build_set(tables, tmp_path / "out")
    manifest, other = (
        json.loads((path / "manifest.json").read_bytes()) for path in (whole.path, shards.path)
    )
    # as if the build had held rows out and trained on them as well
    del manifest["seal"]
    manifest |= {key: other[key] for key in ("inputs", "inputs_digest", "config")}
    atomic.write_json(whole.path / "manifest.json", {**manifest, "seal": digest(manifest)})
    shutil.copytree(shards.path / EVAL_DIR, whole.path / EVAL_DIR)
    with pytest.raises(ArtifactError, match=r"source 'rows' row \d+ is held out and trained on"):
        verify(whole.path)
