"""The sample store: every conversation of a source, tokenised once, untruncated, unmixed, content-addressed.

    STORE/KEY/chunk-00000/{tokens,kind,...}.npy, facts.json      committed one by one, by rename
    STORE/KEY/complete.json                                      written last: the source was read to its end

KEY is a hash of all that decides the samples. Mixture ratio, max_seq_len, mask and length policy do not: changing them
costs no tokenizer call. A killed build loses the chunks in flight and no more.
"""

import gc
import json
import multiprocessing
from collections.abc import Callable, Iterator
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


def ensure_store(
    path: Path,
    *,
    chunks: Callable[[], Iterator[Chunk]],
    workers: ChunkWorkers,
    on_chunk: Callable[[StoredChunk], None],
) -> SampleStore:
    """Return the store at `path`, making what it lacks. `on_chunk` is called for each chunk, in order.

    Raises whatever a chunk or `on_chunk` raises; what was committed stays.
    """
    with atomic.exclusive_lock(path.parent / f"{path.name}.lock", "tokenising the same source"):
        path.mkdir(parents=True, exist_ok=True)
        complete = path / _COMPLETE
        if complete.is_file():
            number = json.loads(complete.read_bytes())["chunks"]
            stored = tuple(StoredChunk(_chunk_dir(path, index)) for index in range(number))
            for chunk in stored:
                on_chunk(chunk)
            return SampleStore(path, stored)
        atomic.remove_leftovers(path)
        made = []
        for chunk in _make_chunks(path, chunks(), workers):
            on_chunk(chunk)
            made.append(chunk)
        atomic.write_json(complete, {"chunks": len(made)})
        return SampleStore(path, tuple(made))


def _make_chunks(path: Path, chunks: Iterator[Chunk], workers: ChunkWorkers) -> Iterator[StoredChunk]:
    """Yield every chunk in order, making the missing ones."""
    waiting: dict[int, Future[None] | None] = {}  # chunk -> None where it is on disk already
    due = 0
    for chunk in chunks:
        target = _chunk_dir(path, chunk.index)
        waiting[chunk.index] = None if target.is_dir() else workers.submit(chunk, target)
        while len(running := [f for f in waiting.values() if f is not None and not f.done()]) >= workers.max_waiting:
            wait(running, return_when=FIRST_COMPLETED)
        while due in waiting and ((found := waiting[due]) is None or found.done()):
            yield _finished(path, due, waiting.pop(due))
            due += 1
    for index in sorted(waiting):
        yield _finished(path, index, waiting[index])


def _finished(path: Path, index: int, future: "Future[None] | None") -> StoredChunk:
    if future is not None:
        try:
            future.result()
        except BrokenProcessPool as exc:
            raise PrerequisiteError(
                "a worker process died (killed, or out of memory); run the same command again to go on, "
                "with fewer --workers if memory was short"
            ) from exc
    return StoredChunk(_chunk_dir(path, index))


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
        with atomic.staged_dir(target) as aside:
            for name in COLUMNS:
                np.save(aside / f"{name}.npy", result.columns[name], allow_pickle=False)
            atomic.write_json(aside / _FACTS, result.facts)
    except (OSError, ArtifactError):
        if not target.is_dir():  # else another process committed the same chunk first: the same bytes
            raise
