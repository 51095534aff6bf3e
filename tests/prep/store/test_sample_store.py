"""A store holds every chunk once, in order, however the workers finish, die or are interrupted."""

import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.sources.chunk import Chunk
from prep.store.executors import ChunkWorkers
from prep.store.sample_store import (
    StoredChunk,
    StoreRequest,
    ensure_stores,
    is_complete,
    known_inputs,
    store_path,
)
from shared.errors import ArtifactError, PrerequisiteError


class Job(Future[None]):
    """Writes a chunk when it is told to, at the latest when its result is needed."""

    def __init__(self, chunk: Chunk, target: Path) -> None:
        super().__init__()
        self.chunk, self.target = chunk, target

    def run(self) -> None:
        self.target.mkdir()
        (self.target / "tokens.npy").write_bytes(self.chunk.payload)
        facts = {"name": self.chunk.file, "column_bytes": {"tokens.npy": len(self.chunk.payload)}}
        (self.target / "facts.json").write_text(json.dumps(facts))
        self.set_result(None)

    def result(self, timeout: float | None = None) -> None:
        if not self.done():
            self.run()
        return super().result(timeout)


class Workers:
    """Workers that finish in an order drawn at random, `max_waiting` jobs at a time."""

    def __init__(self, seed: int, max_waiting: int) -> None:
        self.draw, self.max_waiting = random.Random(seed), max_waiting
        self.made: Counter[str] = Counter()
        self.running: list[Job] = []

    def submit(self, chunk: Chunk, target: Path) -> Job:
        job = Job(chunk, target)
        self.made[f"{chunk.file} {chunk.index}"] += 1
        self.running = [*(other for other in self.running if not other.done()), job]
        while len(self.running) >= self.max_waiting:
            self.running.pop(self.draw.randrange(len(self.running))).run()
        return job

    def as_workers(self) -> ChunkWorkers:
        return ChunkWorkers(self.submit, self.max_waiting, (EOFError,))


def request_of(store: Path, name: str, num_chunks: int) -> StoreRequest:
    def chunks() -> Iterator[Chunk]:
        for index in range(num_chunks):
            yield Chunk(
                source=0, index=index, first_row=index, num_rows=1, file=name, first_line=1,
                kind="lines", payload=bytes(range(index + 1)),
            )  # fmt: skip

    return StoreRequest(store, {"name": name}, chunks)


class Interrupted(Exception):
    pass


@given(
    sources=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4),
    sizes=st.fixed_dictionaries({name: st.integers(0, 6) for name in "abc"}),
    interrupted_at=st.integers(0, 20),
    max_waiting=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_every_chunk_is_made_once_and_reported_in_order(
    sources: list[str], sizes: dict[str, int], interrupted_at: int, max_waiting: int, seed: int
) -> None:
    workers = Workers(seed, max_waiting)
    with tempfile.TemporaryDirectory() as folder:
        requests = [request_of(Path(folder), name, sizes[name]) for name in sources]
        calls: list[tuple[int, str]] = []

        def on_chunk(index: int, chunk: StoredChunk) -> None:
            assert chunk.facts["name"] == sources[index]
            calls.append((index, chunk.path.name))
            if len(calls) in stops:
                raise Interrupted

        stops = {interrupted_at}
        expected = [
            (index, f"chunk-{number:05d}")
            for index, name in enumerate(sources)
            for number in range(sizes[name])
        ]
        try:
            stores = ensure_stores(requests, workers.as_workers(), on_chunk)
        except Interrupted:
            workers.running.clear()  # killed with the build
            calls, stops = [], set()
            stores = ensure_stores(requests, workers.as_workers(), on_chunk)
        # only chunks that were under way at the interruption are made a second time
        assert set(workers.made.values()) <= {1, 2}
        assert sum(times == 2 for times in workers.made.values()) < max_waiting
        assert sorted(calls) == expected
        for index in range(len(sources)):
            assert [call for call in calls if call[0] == index] == [
                call for call in expected if call[0] == index
            ]
        assert [[c.path for c in store.chunks] for store in stores] == [
            [request.path / f"chunk-{i:05d}" for i in range(sizes[name])]
            for request, name in zip(requests, sources, strict=True)
        ]
        made = workers.made.copy()
        ensure_stores(requests, workers.as_workers(), lambda index, chunk: None)
        assert workers.made == made
        assert known_inputs(Path(folder)) == {request.path: request.inputs for request in requests}


@pytest.mark.parametrize("damage", ["short", "no facts", "empty facts", "no file"])
def test_a_chunk_that_a_power_cut_left_short_is_made_again(damage: str, tmp_path: Path) -> None:
    request, workers = request_of(tmp_path, "a", 3), Workers(0, 1)
    ensure_stores([request], workers.as_workers(), lambda index, chunk: None)
    (request.path / "complete.json").unlink()
    file = request.path / "chunk-00001" / ("facts.json" if "facts" in damage else "tokens.npy")
    if damage.startswith("no"):
        file.unlink()
    else:
        file.write_bytes(b"")
    ensure_stores([request], workers.as_workers(), lambda index, chunk: None)
    assert workers.made == {"a 0": 1, "a 1": 2, "a 2": 1}
    assert (request.path / "chunk-00001" / "tokens.npy").read_bytes() == b"\x00\x01"
    assert is_complete(request.path)


def test_a_worker_that_died_ends_the_build_with_what_to_do(tmp_path: Path) -> None:
    def submit(chunk: Chunk, target: Path) -> "Future[None]":
        future: Future[None] = Future()
        future.set_exception(EOFError())
        return future

    workers = ChunkWorkers(submit, 1, (EOFError,))
    request = request_of(tmp_path, "a", 1)
    with pytest.raises(PrerequisiteError, match="fewer --workers"):
        ensure_stores([request], workers, lambda index, chunk: None)
    assert not is_complete(request.path)


@pytest.mark.parametrize(
    "column", [None, b"", np.zeros(3, np.int64), np.zeros((3, 2), np.int32)], ids=str
)
def test_a_damaged_column_is_named_with_what_to_remove(column: object, tmp_path: Path) -> None:
    chunk = StoredChunk(tmp_path / "chunk-00000")
    chunk.path.mkdir()
    file = chunk.path / "tokens.npy"
    if isinstance(column, bytes):
        file.write_bytes(column)
    elif column is not None:
        np.save(file, column)
    with pytest.raises(ArtifactError, match=rf"{file.name}.*remove {chunk.path} and build again"):
        chunk.column("tokens")
    with pytest.raises(ArtifactError, match="is damaged"):
        _ = chunk.facts


def test_other_inputs_have_another_store_and_unreadable_ones_are_left_out(tmp_path: Path) -> None:
    assert store_path(tmp_path, {"a": 1}) != store_path(tmp_path, {"a": 2})
    for name, text in (("good", '{"a": 1}'), ("bad", '{"a"')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inputs.json").write_text(text)
    assert known_inputs(tmp_path) == {tmp_path / "good": {"a": 1}}
