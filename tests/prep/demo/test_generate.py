"""The demo mixture: what ships is what the generator writes, and held-out questions are in no
training row."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from prep.config import load_mixture
from prep.demo import generate
from prep.demo.skills import SKILLS

FOLDER = Path(generate.__file__).parent


def _rows(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.splitlines()]


def _train_rows() -> list[dict[str, Any]]:
    return [row for skill in SKILLS for row in _rows(FOLDER / f"{skill}.jsonl.gz")]


def _prompts(rows: list[dict[str, Any]]) -> set[str]:
    """Every prompt that the rows answer: all that comes before an assistant's message."""
    return {
        json.dumps(row["messages"][:index])
        for row in rows
        for index, message in enumerate(row["messages"])
        if message["role"] == "assistant"
    }


def test_the_generator_writes_the_shipped_files() -> None:
    made = generate.generate()
    shipped = {
        str(path.relative_to(FOLDER))
        for path in FOLDER.rglob("*")
        if path.suffix in (".gz", ".json", ".jsonl")
    }
    assert set(made) == shipped
    for name, data in made.items():
        shipped_data = (FOLDER / name).read_bytes()
        if name.endswith(
            ".gz"
        ):  # zlib's releases compress differently: compare what they hold, and the header
            assert shipped_data[4:8] == data[4:8] == b"\0\0\0\0", "a time in the header"
            shipped_data, data = gzip.decompress(shipped_data), gzip.decompress(data)
        assert shipped_data == data, name


def test_held_out_prompts_are_in_no_training_row() -> None:
    held_out = _rows(FOLDER / "heldout.jsonl")
    assert len(held_out) == generate.HELD_OUT_ROWS * len(SKILLS)
    assert _prompts(held_out).isdisjoint(_prompts(_train_rows()))


@pytest.mark.parametrize("skill", SKILLS)
def test_what_a_held_out_question_asks_about_is_new_to_its_skill_under_every_wording(
    skill: str,
) -> None:
    """The digits of the first question, in whatever words; for sums, in whatever order."""

    def subject(row: dict[str, Any]) -> str:
        question = next(
            message["content"] for message in row["messages"] if message["role"] == "user"
        )
        numbers = "".join(
            letter if letter.isdigit() else " " for letter in question.replace("Add 1 to each", "")
        )
        return " ".join(sorted(numbers.split()))

    held_out = {subject(row) for row in _rows(FOLDER / "heldout.jsonl") if row["skill"] == skill}
    trained = {subject(row) for row in _rows(FOLDER / f"{skill}.jsonl.gz")}
    assert all(held_out)
    assert held_out.isdisjoint(trained)


def test_no_training_row_occurs_twice() -> None:
    rows = [json.dumps(row) for row in _train_rows()]
    assert len(set(rows)) == len(rows)


def test_the_demo_has_follow_ups_and_system_messages() -> None:
    roles = [[message["role"] for message in row["messages"]] for row in _train_rows()]
    assert any(row.count("user") > 1 for row in roles)
    assert any(row[0] == "system" for row in roles)


def test_what_ships_is_small() -> None:
    assert (
        sum(
            path.stat().st_size
            for path in FOLDER.rglob("*")
            if path.suffix != ".pyc" and path.is_file()
        )
        < 600_000
    )


def test_the_mixture_names_files_that_exist() -> None:
    mixture, base = load_mixture("demo")
    assert [Path(source.path).name for source in mixture.sources] == [
        f"{skill}.jsonl.gz" for skill in sorted(SKILLS)
    ]
    assert all((base / source.path).is_file() for source in mixture.sources)
    assert (base / mixture.tokenizer.name / "tokenizer.json").is_file()
