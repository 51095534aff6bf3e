"""The sample store: every conversation of a source, tokenised once, untruncated, unmixed,
content-addressed.

    STORE/KEY/chunk-00000/{tokens,kind,...}.npy, facts.json    committed one by one, by rename
    STORE/KEY/inputs.json                                      what KEY is the hash of
    STORE/KEY/complete.json                                    written last, at the end

KEY is a hash of everything that decides the samples. The mixture ratio, max_seq_len, the mask and
the length policy do not: changing them costs no tokenizer call. A killed build loses the chunks in
flight and nothing more.
"""

import contextlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.sources.chunk import Chunk
from prep.store.chunk_builder import COLUMNS
from prep.store.executors import FACTS_NAME, ChunkWorkers
from prep.store.samples import Samples
from shared import atomic
from shared.errors import ArtifactError, PrerequisiteError
from shared.hashing import digest

_COMPLETE = "complete.json"
_INPUTS = "inputs.json"


@dataclass(frozen=True)
class StoredChunk:
    """One committed chunk; columns are mapped, not read."""

    path: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / FACTS_NAME).read_bytes()))
        except (OSError, ValueError) as exc:
            raise ArtifactError(
                f"{self.path} is damaged ({exc}); remove it and build again"
            ) from exc

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return one column, read-only."""
        file = self.path / f"{name}.npy"
        dtype, tail = COLUMNS[name]
        try:
            array: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as exc:
            raise ArtifactError(
                f"{file} is damaged ({exc}); remove {self.path} and build again"
            ) from exc
        if array.dtype != np.dtype(dtype) or array.shape[1:] != tail:
            raise ArtifactError(
                f"{file} holds {array.dtype.str} {array.shape}, expected {dtype}"
                f" [N{''.join(f', {size}' for size in tail)}]; remove {self.path} and build again"
            )
        return array.view(np.ndarray)

    def samples(self) -> Samples:
        """Return what the mask policy looks at."""
        return Samples(
            *(
                self.column(name)
                for name in (
                    "kind", "sample_offsets", "sample_messages", "message_offsets",
                    "message_role", "message_train"
                )
            )
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SampleStore:
    path: Path
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """Which samples are needed, and how to read their source if the store lacks them."""

    store: Path  # the directory of all stores
    inputs: dict[str, Any]  # everything that decides the samples
    chunks: Callable[[], Iterator[Chunk]]

    @property
    def path(self) -> Path:
        return store_path(self.store, self.inputs)


def store_path(store: Path, inputs: dict[str, Any]) -> Path:
    """Return the directory below `store` of the samples that `inputs` decide."""
    return store / digest(inputs)[:32]


def is_complete(path: Path) -> bool:
    """Say whether the store at `path` contains its whole source."""
    return (path / _COMPLETE).is_file()


def known_inputs(store: Path) -> dict[Path, dict[str, Any]]:
    """Return the inputs of each of the stores below `store`."""
    inputs = {}
    for file in sorted(store.glob(f"*/{_INPUTS}")):
        # another build may be writing or removing this one: nothing to compare with
        with contextlib.suppress(OSError, ValueError):
            inputs[file.parent] = dict(json.loads(file.read_bytes()))
    return inputs


def ensure_stores(
    requests: Sequence[StoreRequest],
    workers: ChunkWorkers,
    on_chunk: Callable[[int, StoredChunk], None],
) -> list[SampleStore]:
    """Return the store of every request and make what is missing; the workers need not wait between
    two sources.

    Calls `on_chunk(index of the request, chunk)` for each chunk, in order. Raises whatever a chunk
    or `on_chunk` raises; committed chunks stay.
    """
    owner: dict[Path, int] = {}
    for index, request in enumerate(requests):
        owner.setdefault(request.path, index)  # the same rows under two names are tokenised once
    chunks: dict[int, list[StoredChunk]] = {index: [] for index in owner.values()}
    queue: deque[tuple[_Task, Future[None] | None]] = deque()
    with contextlib.ExitStack() as locks:
        for path in owner:
            if not is_complete(path):  # a complete store is only read, by any number of builds
                lock = path.parent / f"{path.name}.lock"
                locks.enter_context(atomic.exclusive_lock(lock, "tokenising the same source"))
        # Chunks finish in any order and are reported in theirs. The queue holds those that wait for
        # an earlier one: done, running, or found in the store.
        for task in _tasks([(index, requests[index]) for index in owner.values()]):
            queue.append((task, workers.submit(task.chunk, task.target) if task.chunk else None))
            while (
                len(running := [f for _, f in queue if f is not None and not f.done()])
                >= workers.max_waiting
            ):
                wait(running, return_when=FIRST_COMPLETED)
            while queue and (queue[0][1] is None or queue[0][1].done()):
                _finish(*queue.popleft(), chunks, workers, on_chunk)
        while queue:
            _finish(*queue.popleft(), chunks, workers, on_chunk)
    for index, request in enumerate(requests):
        if owner[request.path] != index:
            for chunk in chunks[owner[request.path]]:
                on_chunk(index, chunk)
    return [SampleStore(request.path, tuple(chunks[owner[request.path]])) for request in requests]


@dataclass(frozen=True, slots=True)
class _Task:
    """A chunk to make, one that the store has (`chunk` is None), or the end of a source."""

    request: int
    target: Path  # directory of the chunk; of the store at the end of a source
    chunk: Chunk | None = None
    is_end: bool = False


def _tasks(requests: list[tuple[int, StoreRequest]]) -> Iterator[_Task]:
    for index, request in requests:
        path = request.path
        path.mkdir(parents=True, exist_ok=True)
        complete = path / _COMPLETE
        if complete.is_file():
            for number in range(json.loads(complete.read_bytes())["chunks"]):
                yield _Task(index, _chunk_dir(path, number))
            continue
        atomic.remove_leftovers(path, r"chunk-\d+|inputs\.json|complete\.json")
        atomic.write_json(path / _INPUTS, request.inputs)
        for chunk in request.chunks():
            target = _chunk_dir(path, chunk.index)
            if target.is_dir() and not _is_whole(target):
                shutil.rmtree(target)
            yield _Task(index, target, None if target.is_dir() else chunk)
        yield _Task(index, path, is_end=True)


def _finish(
    task: _Task,
    future: "Future[None] | None",
    chunks: dict[int, list[StoredChunk]],
    workers: ChunkWorkers,
    on_chunk: Callable[[int, StoredChunk], None],
) -> None:
    if task.is_end:
        os.sync()  # once a source, instead of flushing ten small files for each chunk
        atomic.write_json(task.target / _COMPLETE, {"chunks": len(chunks[task.request])})
        return
    try:
        if future is not None:
            future.result()
    except workers.worker_died as exc:
        raise PrerequisiteError(
            "a worker process died (killed, or out of memory); run the same command again to"
            " resume, with fewer --workers if memory was short"
        ) from exc
    chunk = StoredChunk(task.target)
    on_chunk(task.request, chunk)
    chunks[task.request].append(chunk)


def _is_whole(target: Path) -> bool:
    """Say whether a chunk of an unfinished store has all its bytes: chunks are not flushed one by
    one, so a power cut may leave files that are empty or short."""
    try:
        sizes = json.loads((target / FACTS_NAME).read_bytes())["column_bytes"]
        return bool(sizes) and all(
            (target / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _chunk_dir(path: Path, index: int) -> Path:
    return path / f"chunk-{index:05d}"
