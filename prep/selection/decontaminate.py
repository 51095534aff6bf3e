"""Rows that share a passage with questions that must not be trained on: found in the raw text,
without a tokenizer.

Their numbers are kept in the store beside the samples, under a key of their own: adding, changing
or dropping the questions never touches a sample.

STORE/overlap-KEY.json     {"rows": [[row, number of shared grams, the words of the first], ...]}
"""

import contextlib
import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prep.config import DecontaminateConfig
from prep.conversations.conversation import Conversation
from prep.conversations.formats import Conversion, read_conversation
from prep.progress import progress
from prep.selection.ngrams import GramSet, word_grams, words_of
from prep.sources.chunk import Chunk, parse_chunk
from prep.sources.reader import iter_chunks
from prep.sources.resolve import ResolvedSource
from prep.store.process_pool import WorkerPool
from shared import atomic
from shared.errors import DataError, PrerequisiteError
from shared.hashing import digest, sha256_bytes

_CODE_VERSION = 1  # bump when the same texts would overlap otherwise

logger = logging.getLogger(__name__)

Overlap = tuple[int, int, str]  # row, number of shared grams, the words of the first


@dataclass(frozen=True, slots=True)
class Questions:
    ngram: int
    grams: GramSet


def read_questions(
    sources: Sequence[tuple[ResolvedSource, Conversion]], config: DecontaminateConfig
) -> Questions:
    """Return the grams of all questions. Raises DataError for a row without one, and where there is
    nothing to find."""
    num_texts = 0
    hashes = [np.zeros(0, np.uint64)]
    for source, conversion in sources:
        for chunk in iter_chunks(source, source_index=0, conversion=conversion):
            texts = [
                text
                for _, where, record in parse_chunk(chunk)
                for text in _questions(record, chunk, config, where)
            ]
            num_texts += len(texts)
            hashes.append(np.unique(word_grams(texts, config.ngram).hashes))
    grams = GramSet(np.concatenate(hashes))
    logger.info(
        "decontaminate: %s questions, %s n-grams of %s words",
        num_texts,
        len(grams.sorted),
        config.ngram,
    )
    if not len(grams.sorted):
        raise DataError(
            f"decontaminate: {num_texts} questions in"
            f" {', '.join(source.name for source, _ in sources)}, none of {config.ngram // 2} words"
            " or more; give other files or fields, or a smaller ngram"
        )
    return Questions(config.ngram, grams)


def find_overlaps(
    sources: Sequence[tuple[ResolvedSource, Conversion]],
    questions: Questions,
    *,
    store: Path,
    workers: int,
) -> list[list[Overlap]]:
    """Return, for each source, the rows that share a gram with a question, in order."""
    content = sha256_bytes(questions.grams.sorted.astype("<u8").tobytes())
    found = []
    with _Comparers(questions, workers) as comparers:
        for source, conversion in sources:
            key = digest(
                {
                    "source": source.identity(),
                    "rows": [conversion.format, *map(list, conversion.columns)],
                    "questions": content,
                    "ngram": questions.ngram,
                    "code": _CODE_VERSION,
                }
            )
            found.append(_stored(store / f"overlap-{key[:32]}.json", source, conversion, comparers))
    return found


def overlaps_of(chunk: Chunk, questions: Questions) -> list[Overlap]:
    """Return the rows of one chunk that share a gram with a question; a malformed row shares
    none."""
    rows: list[int] = []
    texts: list[str] = []
    for row, where, record in parse_chunk(chunk):
        if isinstance(record, dict):
            with contextlib.suppress(DataError):  # tokenising counts it as a reject
                mine = _texts(read_conversation(record, chunk.conversion, where=where))
                rows += [row] * len(mine)
                texts += mine
    grams = word_grams(texts, questions.ngram)
    hits = np.flatnonzero(questions.grams.contains(grams.hashes))
    row_of = np.asarray(rows, np.int64)[grams.text[hits]] if len(hits) else hits
    found, first, counts = np.unique(row_of, return_index=True, return_counts=True)
    shared = []
    for row, hit, count in zip(found.tolist(), hits[first].tolist(), counts.tolist(), strict=True):
        word = int(grams.word[hit])
        words = words_of(texts[int(grams.text[hit])])[word : word + questions.ngram]
        shared.append((row, count, " ".join(words)))
    return shared


def _texts(conversation: Conversation) -> list[str]:
    fields = ("content", "reasoning_content")
    return [
        message[field]
        for message in conversation.messages
        for field in fields
        if message.get(field)
    ]


def _questions(
    record: dict[str, Any] | DataError, chunk: Chunk, config: DecontaminateConfig, where: str
) -> list[str]:
    if isinstance(record, DataError):
        raise record
    if config.fields:
        texts = [record[field] for field in config.fields if record.get(field) is not None]
        if not texts or not all(isinstance(text, str) for text in texts):
            names = ", ".join(config.fields)
            raise DataError(
                f"{where}: no text under {names}; it has {', '.join(record)}; correct"
                " decontaminate.fields"
            )
        return texts
    try:
        conversation = read_conversation(record, chunk.conversion, where=where)
    except DataError as exc:
        raise DataError(
            f"{exc}. If it is no conversation, name its columns in decontaminate.fields"
        ) from exc
    return [message["content"] for message in conversation.messages if message["role"] == "user"]


class _Comparers:
    """Processes that compare chunks; started when the first chunk needs them."""

    def __init__(self, questions: Questions, workers: int) -> None:
        self._questions = questions
        self._workers = workers
        self._pool: WorkerPool | None = None

    def __enter__(self) -> "_Comparers":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._pool is not None:
            self._pool.__exit__(*exc_info)

    def compare(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[Overlap]]]:
        """Yield the overlaps of every chunk, in order."""
        if self._workers == 1:
            for chunk in chunks:
                yield chunk, overlaps_of(chunk, self._questions)
            return
        if self._pool is None:
            self._pool = WorkerPool(self._workers, _start_worker, self._questions)
        waiting: deque[tuple[Chunk, Future[list[Overlap]]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._pool.submit(_work, chunk)))
            if len(waiting) > 2 * self._workers:
                first, future = waiting.popleft()
                yield first, _result(future)
        for chunk, future in waiting:
            yield chunk, _result(future)


def _result(future: "Future[list[Overlap]]") -> list[Overlap]:
    try:
        return future.result()
    except BrokenProcessPool as exc:
        raise PrerequisiteError(
            "a worker process died (killed, or out of memory); run the same command again, with"
            " fewer --workers if memory was short"
        ) from exc


def _stored(
    path: Path, source: ResolvedSource, conversion: Conversion, comparers: _Comparers
) -> list[Overlap]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return [(row, count, words) for row, count, words in json.loads(path.read_bytes())["rows"]]
    overlaps: list[Overlap] = []
    read = 0
    with progress(
        f"comparing {source.name}", sum(file.stamp.size for file in source.files), "bytes"
    ) as advance:
        for chunk, found in comparers.compare(
            iter_chunks(source, source_index=0, conversion=conversion)
        ):
            overlaps += found
            advance(
                max(0, chunk.source_bytes_read - read), f"{len(overlaps):,} rows share a passage"
            )
            read = max(read, chunk.source_bytes_read)
    atomic.write_json(path, {"rows": overlaps})
    return overlaps


_questions_here: Questions | None = None  # one per worker process


def _start_worker(questions: Questions) -> None:
    global _questions_here
    _questions_here = questions


def _work(chunk: Chunk) -> list[Overlap]:
    assert _questions_here is not None
    return overlaps_of(chunk, _questions_here)
