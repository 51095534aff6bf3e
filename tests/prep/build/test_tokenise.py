"""Tokenising the sources of a mixture: samples and counts for each, and progress that adds up."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prep_builds import chat, mixture_of, plan_of, small_tokenizer, write_rows

from prep.build.tokenise import encoder_for, tokenise_sources
from prep.inputs import resolve_inputs
from prep.selection.source import Source
from prep.tokenization.tokenizer import load_tokenizer
from shared.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture
def work_done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(bytes done, bytes in all) of every step of the progress that is shown."""
    steps: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def progress(title: str, total: int, unit: str) -> Iterator[Any]:
        yield lambda done, note="": steps.append((done, total))

    monkeypatch.setattr("prep.build.tokenise.progress", progress)
    return steps


def tokenised(tables: dict[str, Any], folder: Path) -> list[Source]:
    request = plan_of(tables, folder / "out")
    inputs = resolve_inputs(request.mixture, request.base, {})
    spec, _ = encoder_for(inputs, load_tokenizer(inputs.tokenizer))
    return tokenise_sources(inputs, spec, store=request.store, workers=1, scheduler="")


def test_every_source_has_its_samples_and_progress_ends_at_the_size_of_the_files(
    work_done: list[tuple[int, int]], tokenizer: Path, tmp_path: Path
) -> None:
    sizes = {"first": 9000, "second": 3}  # rows: three chunks, and one
    files = [
        write_rows(tmp_path / f"{name}.jsonl", [chat(f"{name} {n}", "fish") for n in range(size)])
        for name, size in sizes.items()
    ]
    sources = tokenised(mixture_of(files, tokenizer), tmp_path)
    for source in sources:
        assert source.counts.rows == sizes[source.name]
        rows = [row for chunk in source.samples.chunks for row in chunk.column("sample_row")]
        assert rows == list(range(sizes[source.name]))
        tokens = sum(len(chunk.column("tokens")) for chunk in source.samples.chunks)
        assert source.counts.tokens == tokens
    size = sum(file.stat().st_size for file in files)
    assert sum(done for done, _ in work_done) == size
    assert {total for _, total in work_done} == {size}
    # what is in the store already takes no work
    work_done.clear()
    again = tokenised(mixture_of(files, tokenizer), tmp_path)
    assert [source.counts for source in again] == [source.counts for source in sources]
    assert sum(done for done, _ in work_done) == 0


def test_a_bad_row_ends_the_build_with_its_chunk_and_not_after_all_of_them(
    work_done: list[tuple[int, int]], tokenizer: Path, tmp_path: Path
) -> None:
    rows = [chat(f"{n}", "fish") for n in range(20_000)]
    file = write_rows(tmp_path / "rows.jsonl", ["{broken", *rows])
    with pytest.raises(DataError, match=r"rows\.jsonl line 1 \(row 0\)"):
        tokenised(mixture_of([file], tokenizer), tmp_path)
    assert work_done == []


def test_a_template_that_ends_no_turn_is_refused_before_any_row_is_read(
    work_done: list[tuple[int, int]], tokenizer: Path, tmp_path: Path
) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    file = write_rows(tmp_path / "rows.jsonl", ["{broken"])
    with pytest.raises(ConfigError, match="no control token that ends an assistant's turn"):
        tokenised(mixture_of([file], tokenizer, template=str(template)), tmp_path)
    assert work_done == []
