"""The sample store: every conversation of a source, tokenised once, untruncated, unmixed, content-addressed.

    STORE/KEY/chunk-00000/{tokens,kind,...}.npy, facts.json      committed one by one, by rename
    STORE/KEY/complete.json                                      written last: the source was read to its end

KEY is a hash of all that decides the samples. Mixture ratio, max_seq_len, mask and length policy do not: changing them
costs no tokenizer call. A killed build loses the chunks in flight and no more.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.chunks import Chunk
from prep.mask import Samples
from prep.sample_chunk import COLUMNS, ChunkBuilder, ChunkSpec
from shared import atomic
from shared.errors import ArtifactError, PrerequisiteError, SftError
from shared.hashing import canonical_json

_FACTS = "facts.json"
_COMPLETE = "complete.json"


@dataclass(frozen=True)
class StoredChunk:
    """One committed chunk; columns are mapped, not read."""

    path: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / _FACTS).read_bytes()))
        except (OSError, ValueError) as exc:
            raise ArtifactError(f"{self.path} is damaged ({exc}); remove it and build again") from exc

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return one column, read-only."""
        file = self.path / f"{name}.npy"
        dtype, tail = COLUMNS[name]
        try:
            array: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as exc:
            raise ArtifactError(f"{file} is damaged ({exc}); remove {self.path} and build again") from exc
        if array.dtype != np.dtype(dtype) or array.shape[1:] != tail:
            raise ArtifactError(f"{file} holds {array.dtype.str} {array.shape}; remove {self.path} and build again")
        return array.view(np.ndarray)

    def samples(self) -> Samples:
        """Return what the mask policy looks at."""
        return Samples(
            *(
                self.column(name)
                for name in (
                    "kind", "sample_offsets", "sample_messages", "message_offsets", "message_role", "message_train"
                )
            )
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SampleStore:
    path: Path
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """Where the samples of a source lie, and how to read the source if they do not."""

    path: Path
    chunks: Callable[[], Iterator[Chunk]]


class ChunkWorkers:
    """Processes that turn chunks into committed columns; started when the first chunk needs them."""

    def __init__(self, spec: ChunkSpec, workers: int) -> None:
        self._spec = spec
        self._workers = workers
        self._builder: ChunkBuilder | None = None
        # fresh interpreters: a fork would inherit the threads and locks of the tokenizer libraries
        self._pool = ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(spec,)
        )
        self.max_waiting = 2 * workers

    def __enter__(self) -> "ChunkWorkers":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, chunk: Chunk, target: Path) -> "Future[None]":
        """Commit `chunk` to the directory `target`; with one worker, here and now."""
        if self._workers > 1:
            return self._pool.submit(_work, chunk, target)
        self._builder = self._builder or ChunkBuilder(self._spec)
        _commit(self._builder, chunk, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def ensure_stores(
    requests: Sequence[StoreRequest], workers: ChunkWorkers, on_chunk: Callable[[int, StoredChunk], None]
) -> list[SampleStore]:
    """Return the store of every request, making what it lacks; the workers go on from one source to the next.

    `on_chunk` is told (index of the request, chunk) for each chunk, in order. Raises whatever a chunk or `on_chunk`
    raises; what was committed stays.
    """
    owner: dict[Path, int] = {}
    for index, request in enumerate(requests):
        owner.setdefault(request.path, index)  # the same rows under two names are tokenised once
    made: dict[int, list[StoredChunk]] = {index: [] for index in owner.values()}
    with contextlib.ExitStack() as locks:
        for path in owner:
            locks.enter_context(atomic.exclusive_lock(path.parent / f"{path.name}.lock", "tokenising the same source"))
        for index, chunk in _make_chunks([(index, requests[index]) for index in owner.values()], workers):
            on_chunk(index, chunk)
            made[index].append(chunk)
    for index, request in enumerate(requests):
        if owner[request.path] != index:
            for chunk in made[owner[request.path]]:
                on_chunk(index, chunk)
    return [SampleStore(request.path, tuple(made[owner[request.path]])) for request in requests]


def _make_chunks(requests: list[tuple[int, StoreRequest]], workers: ChunkWorkers) -> Iterator[tuple[int, StoredChunk]]:
    """Yield every chunk of every request in order, making the missing ones."""
    queue: deque[tuple[_Task, Future[None] | None]] = deque()
    made = Counter[int]()
    for task in _tasks(requests):
        queue.append((task, workers.submit(task.chunk, task.target) if task.chunk else None))
        while len(running := [f for _, f in queue if f is not None and not f.done()]) >= workers.max_waiting:
            wait(running, return_when=FIRST_COMPLETED)
        while queue and (queue[0][1] is None or queue[0][1].done()):
            yield from _finished(*queue.popleft(), made)
    while queue:
        yield from _finished(*queue.popleft(), made)


@dataclass(frozen=True, slots=True)
class _Task:
    """A chunk to make, one that is there (`chunk` None), or the end of a source (`is_end`)."""

    request: int
    path: Path  # of the store
    target: Path
    chunk: Chunk | None = None
    is_end: bool = False


def _tasks(requests: list[tuple[int, StoreRequest]]) -> Iterator[_Task]:
    for index, request in requests:
        path = request.path
        path.mkdir(parents=True, exist_ok=True)
        complete = path / _COMPLETE
        if complete.is_file():
            for number in range(json.loads(complete.read_bytes())["chunks"]):
                yield _Task(index, path, _chunk_dir(path, number))
            continue
        atomic.remove_leftovers(path)
        for chunk in request.chunks():
            target = _chunk_dir(path, chunk.index)
            if target.is_dir() and not _is_whole(target):
                shutil.rmtree(target)
            yield _Task(index, path, target, None if target.is_dir() else chunk)
        yield _Task(index, path, path, is_end=True)


def _finished(task: _Task, future: "Future[None] | None", made: Counter[int]) -> Iterator[tuple[int, StoredChunk]]:
    if task.is_end:
        os.sync()  # once a source, instead of flushing ten small files for each chunk
        atomic.write_json(task.path / _COMPLETE, {"chunks": made[task.request]})
        return
    if future is not None:
        try:
            future.result()
        except BrokenProcessPool as exc:
            raise PrerequisiteError(
                "a worker process died (killed, or out of memory); run the same command again to go on, "
                "with fewer --workers if memory was short"
            ) from exc
    made[task.request] += 1
    yield task.request, StoredChunk(task.target)


def _is_whole(target: Path) -> bool:
    """Say whether a chunk of an unfinished store has all its bytes: a power cut may have come before the disk."""
    try:
        sizes = json.loads((target / _FACTS).read_bytes())["column_bytes"]
        return bool(sizes) and all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _chunk_dir(path: Path, index: int) -> Path:
    return path / f"chunk-{index:05d}"


_builder: ChunkBuilder | SftError | None = None  # one per worker process: template and tokenizer are costly to make


def _start_worker(spec: ChunkSpec) -> None:
    global _builder
    gc.set_threshold(50_000, 20, 50)  # rows make many objects and few cycles: 15-25 % of the time went into looking
    try:
        _builder = ChunkBuilder(spec)
    except SftError as exc:  # an initializer that raises breaks the pool without a reason
        _builder = exc


def _work(chunk: Chunk, target: Path) -> None:
    if isinstance(_builder, SftError):
        raise _builder
    assert _builder is not None
    _commit(_builder, chunk, target)


def _commit(builder: ChunkBuilder, chunk: Chunk, target: Path) -> None:
    result = builder.build(chunk)
    try:
        with atomic.staged_dir(target, durable=False) as aside:
            for name in COLUMNS:
                np.save(aside / f"{name}.npy", result.columns[name], allow_pickle=False)
            sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
            (aside / _FACTS).write_bytes(canonical_json({**result.facts, "column_bytes": sizes}))
    except (OSError, ArtifactError):
        if not target.is_dir():  # else another process committed the same chunk first: the same bytes
            raise
