"""Where chunks become committed columns: in this process, in local processes, or on a Dask cluster
with a shared file system.

All three call the same function of (spec, chunk, target directory), so the bytes do not depend on
which of them does.
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
    """Commit a chunk to a directory; the future is done when the directory exists."""
    max_waiting: int
    """How many chunks may be submitted and not done: they are held in memory."""
    worker_died: tuple[type[BaseException], ...]
    """What a future raises if the process that worked on it died."""


@contextlib.contextmanager
def chunk_workers(spec: ChunkSpec, *, workers: int, scheduler: str = "") -> Iterator[ChunkWorkers]:
    """Yield workers; `scheduler` is the address of a Dask scheduler, "" for `workers` local
    processes.

    Raises PrerequisiteError if Dask is not installed or nothing answers at the address.
    """
    if not scheduler and workers == 1:
        yield ChunkWorkers(lambda chunk, target: _run_now(_work, 0, spec, chunk, target), 1, ())
        return
    if not scheduler:
        with WorkerPool(workers, _prepare, 0, spec) as pool:
            yield ChunkWorkers(
                lambda chunk, target: pool.submit(_work, 0, None, chunk, target),
                2 * workers,
                (BrokenExecutor,),
            )
        return
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
        # a spec holds the whole tokenizer: sent once to each worker, not with each chunk
        spec_on_workers = client.scatter(spec, broadcast=True)
        key = spec_on_workers.key
        yield ChunkWorkers(
            lambda chunk, target: executor.submit(
                _work, key, spec_on_workers, chunk, target.resolve()
            ),
            2 * threads,
            (distributed.KilledWorker,),
        )


def _run_now(function: Callable[..., None], *arguments: Any) -> "Future[None]":
    function(*arguments)
    done: Future[None] = Future()
    done.set_result(None)
    return done


# one builder per process and spec: template and tokenizer are costly to make
_builders: dict[object, tuple[ChunkSpec | None, ChunkBuilder | SftError]] = {}


def _prepare(key: object, spec: ChunkSpec) -> None:
    # Rows make many objects and few cycles: 15-25 % of the time went into looking for cycles.
    gc.set_threshold(50_000, 20, 50)
    try:
        _builders[key] = (spec, ChunkBuilder(spec))
    except SftError as exc:  # an initializer that raises breaks the pool without a reason
        _builders[key] = (spec, exc)


def _work(key: object, spec: ChunkSpec | None, chunk: Chunk, target: Path) -> None:
    if spec is not None and (key not in _builders or _builders[key][0] is not spec):
        _builders.clear()  # a process works for one build at a time
        _prepare(key, spec)
    builder = _builders[key][1]
    if isinstance(builder, SftError):
        raise builder
    result = builder.build(chunk)
    try:
        with atomic.staged_dir(target, durable=False) as staging:
            for name, column in result.columns.items():
                # np.save would lose the reason of a failed write (a full disk)
                with (staging / f"{name}.npy").open("xb") as file:
                    file.write(npy_header(column.dtype.str, column.shape))
                    file.write(column.data)
            sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
            (staging / FACTS_NAME).write_bytes(
                canonical_json({**result.facts, "column_bytes": sizes})
            )
    except (OSError, ArtifactError):
        # if it is there, another process committed the same chunk first: the same bytes
        if not target.is_dir():
            raise
