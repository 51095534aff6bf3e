"""Explain: what a build would find, and which field of what it finds is another."""

from pathlib import Path
from typing import Any

import pytest
from prep_builds import chat, mixture_of, plan_of, small_tokenizer, write_rows

from prep.build.build import build
from prep.build.explain import explain
from prep.rendering.template import shipped_templates


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture
def tables(tokenizer: Path, tmp_path: Path) -> dict[str, Any]:
    files = [
        write_rows(tmp_path / f"{name}.jsonl", [chat(f"{name} {n}", "fish") for n in range(30)])
        for name in ("first", "second")
    ]
    return mixture_of(files, tokenizer)


def test_explain_names_what_would_be_tokenised_and_why(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    plan = plan_of(tables, tmp_path / "out")
    assert explain(plan)[0] == f"{tmp_path / 'out'} does not exist: a build would make it"
    assert "samples of first: to be tokenised" in explain(plan)
    build(plan, rebuild=False)
    assert explain(plan) == [
        f"{tmp_path / 'out'} is up to date: every input is the same",
        *(
            f"samples of {name}: in {tmp_path / 'samples'}, nothing to tokenise"
            for name in ("first", "second")
        ),
    ]
    first = tmp_path / "first.jsonl"
    first.write_text(first.read_text().replace("fish", "fist", 1))
    text = shipped_templates()["chatml"].read_text()
    other = tmp_path / "chatml.jinja"
    other.write_text(text.replace("if add_generation_prompt", "if  add_generation_prompt"))
    tables["template"] = {"name": str(other)}
    lines = explain(plan_of(tables, tmp_path / "out"))
    assert any(line.startswith("sources.first.content_sha256: ") for line in lines)
    second = lines.index("samples of second: to be tokenised")
    assert "differs: template: " in lines[second + 1]
    assert len(lines) == second + 2


def test_samples_of_an_interrupted_build_are_reported_as_begun(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    plan = plan_of(tables, tmp_path / "out")
    build(plan, rebuild=False)
    for marker in plan.store.glob("*/complete.json"):
        marker.unlink()
    lines = explain(plan)[1:]
    assert [line.split(": begun in ")[0] for line in lines] == [
        "samples of first",
        "samples of second",
    ]
    assert all(line.endswith("a build resumes there") for line in lines)
