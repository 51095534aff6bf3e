"""Who turns chunks into committed columns: this process, local processes, or a Dask cluster on a
shared file system.

All three run the same function of (spec, chunk, target directory), so who runs it never shows in
the bytes.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.sources.chunk import Chunk
from prep.store.chunk_builder import ChunkBuilder, ChunkSpec
from prep.store.process_pool import WorkerPool
from shared import atomic
from shared.errors import ArtifactError, PrerequisiteError, SftError
from shared.hashing import canonical_json
from shared.shard_format import npy_header

FACTS_NAME = "facts.json"

_CONNECT_SECONDS = 30


@dataclass(frozen=True, slots=True)
class ChunkWorkers:
    submit: Callable[[Chunk, Path], "Future[None]"]
    """Commit a chunk to a directory, some time."""
    max_waiting: int
    """How many chunks may be under way: they are held in memory."""
    worker_died: tuple[type[BaseException], ...]
    """What a future raises when the process that worked on it is gone."""


@contextlib.contextmanager
def chunk_workers(spec: ChunkSpec, *, workers: int, scheduler: str = "") -> Iterator[ChunkWorkers]:
    """Yield workers; `scheduler` is the address of a Dask scheduler, "" for `workers` local
    processes.

    Raises PrerequisiteError where Dask is not installed or nothing answers at the address.
    """
    if scheduler:
        with _cluster(spec, scheduler) as found:
            yield found
    elif workers == 1:
        yield ChunkWorkers(lambda chunk, target: _now(_work, 0, spec, chunk, target), 1, ())
    else:
        with WorkerPool(workers, _prepare, 0, spec) as pool:
            yield ChunkWorkers(
                lambda chunk, target: pool.submit(_work, 0, None, chunk, target),
                2 * workers,
                (BrokenExecutor,),
            )


@contextlib.contextmanager
def _cluster(spec: ChunkSpec, scheduler: str) -> Iterator[ChunkWorkers]:
    try:
        import distributed
    except ImportError as exc:
        raise PrerequisiteError(
            "--scheduler needs Dask: pip install 'sft-shards[cluster]'"
        ) from exc
    try:
        client = distributed.Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as exc:
        raise PrerequisiteError(
            f"--scheduler {scheduler}: no Dask scheduler answers there: {exc}"
        ) from exc
    with client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise PrerequisiteError(
                f"--scheduler {scheduler}: the cluster has no workers; start some"
            )
        executor: Executor = client.get_executor()
        sent = client.scatter(spec, broadcast=True)  # once to each worker, not once for each chunk
        key = sent.key
        yield ChunkWorkers(
            lambda chunk, target: executor.submit(_work, key, sent, chunk, target.resolve()),
            2 * threads,
            (distributed.KilledWorker,),
        )


def _now(function: Callable[..., None], *arguments: Any) -> "Future[None]":
    function(*arguments)
    done: Future[None] = Future()
    done.set_result(None)
    return done


# one builder per process and spec: template and tokenizer are costly to make
_builders: dict[object, tuple[ChunkSpec | None, ChunkBuilder | SftError]] = {}


def _prepare(key: object, spec: ChunkSpec) -> None:
    gc.set_threshold(
        50_000, 20, 50
    )  # rows make many objects and few cycles: 15-25 % of the time went into looking
    try:
        _builders[key] = (spec, ChunkBuilder(spec))
    except SftError as exc:  # an initializer that raises breaks the pool without a reason
        _builders[key] = (spec, exc)


def _work(key: object, spec: ChunkSpec | None, chunk: Chunk, target: Path) -> None:
    known = _builders.get(key)
    if spec is not None and (known is None or known[0] is not spec):
        _builders.clear()  # a process works for one build at a time
        _prepare(key, spec)
    builder = _builders[key][1]
    if isinstance(builder, SftError):
        raise builder
    _commit(builder, chunk, target)


def _commit(builder: ChunkBuilder, chunk: Chunk, target: Path) -> None:
    result = builder.build(chunk)
    try:
        with atomic.staged_dir(target, durable=False) as aside:
            for name, column in result.columns.items():
                with (aside / f"{name}.npy").open(
                    "xb"
                ) as file:  # np.save forgets why a write failed
                    file.write(npy_header(column.dtype.str, column.shape))
                    file.write(column.data)
            sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
            (aside / FACTS_NAME).write_bytes(
                canonical_json({**result.facts, "column_bytes": sizes})
            )
    except (OSError, ArtifactError):
        if (
            not target.is_dir()
        ):  # else another process committed the same chunk first: the same bytes
            raise
