"""Rows that share a passage with questions that must not be trained on.

Compares raw text, without a tokenizer. The rows are stored beside the samples, under a separate
key: adding, changing or dropping the questions never touches a sample.

    STORE/overlap-KEY.json     {"rows": [[row, number of shared n-grams, words of the first], ...]}
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
from prep.conversations.formats import Conversion, read_conversation
from prep.progress import progress
from prep.selection.decontamination.ngrams import NgramSet, word_ngrams, words_of
from prep.sources.chunk import Chunk, parse_chunk
from prep.sources.reader import iter_chunks
from prep.sources.resolve import ResolvedSource
from prep.store.process_pool import WorkerPool
from shared import atomic
from shared.errors import DataError, PrerequisiteError
from shared.hashing import digest, sha256_bytes

_CODE_VERSION = 1  # bump when the same texts would overlap otherwise

logger = logging.getLogger(__name__)

Overlap = tuple[int, int, str]  # row, number of shared n-grams, the words of the first


@dataclass(frozen=True, slots=True)
class Questions:
    ngram: int
    ngrams: NgramSet


def read_questions(
    sources: Sequence[tuple[ResolvedSource, Conversion]], config: DecontaminateConfig
) -> Questions:
    """Return the n-grams of all questions.

    Raises DataError for a row without a question, and where no question is long enough.
    """
    num_questions = 0
    hashes = [np.zeros(0, np.uint64)]
    for source, conversion in sources:
        for chunk in iter_chunks(source, source_index=0, conversion=conversion):
            questions = [
                text
                for _, where, record in parse_chunk(chunk)
                for text in _questions_of(record, chunk, config, where)
            ]
            num_questions += len(questions)
            hashes.append(np.unique(word_ngrams(questions, config.ngram).hashes))
    ngrams = NgramSet(np.concatenate(hashes))
    logger.info(
        "decontaminate: %s questions, %s n-grams of %s words",
        num_questions,
        len(ngrams.sorted),
        config.ngram,
    )
    if not len(ngrams.sorted):
        raise DataError(
            f"decontaminate: {num_questions} questions in"
            f" {', '.join(source.name for source, _ in sources)}, none of {config.ngram // 2} words"
            " or more; give other files or fields, or a smaller ngram"
        )
    return Questions(config.ngram, ngrams)


def find_overlaps(
    sources: Sequence[tuple[ResolvedSource, Conversion]],
    questions: Questions,
    *,
    store: Path,
    workers: int,
) -> list[list[Overlap]]:
    """Return, for each source, the rows that share an n-gram with a question, in order."""
    content = sha256_bytes(questions.ngrams.sorted.astype("<u8").tobytes())
    result = []
    # The pool starts processes as work comes in: none where all overlaps are stored.
    with WorkerPool(workers, _start_worker, questions) as pool:
        for source, conversion in sources:
            # Everything that decides the overlaps of a source, and nothing of its samples.
            key = digest(
                {
                    "source": source.identity(),
                    "rows": [conversion.format, *map(list, conversion.columns)],
                    "questions": content,
                    "ngram": questions.ngram,
                    "code": _CODE_VERSION,
                }
            )
            path = store / f"overlap-{key[:32]}.json"
            chunks = iter_chunks(source, source_index=0, conversion=conversion)
            result.append(
                _stored_overlaps(path, source, _compare(chunks, questions, pool, workers))
            )
    return result


def overlaps_of(chunk: Chunk, questions: Questions) -> list[Overlap]:
    """Return the rows of one chunk that share an n-gram with a question.

    A malformed row shares none; it is counted as a reject when the source is tokenised.
    """
    rows: list[int] = []
    texts: list[str] = []
    for row, where, record in parse_chunk(chunk):
        if isinstance(record, DataError):
            continue
        with contextlib.suppress(DataError):
            messages = read_conversation(record, chunk.conversion, where=where).messages
            row_texts = [
                message[field]
                for message in messages
                for field in ("content", "reasoning_content")
                if message.get(field)
            ]
            rows += [row] * len(row_texts)
            texts += row_texts
    # All texts of a chunk at once, then back from n-grams to texts to rows.
    ngrams = word_ngrams(texts, questions.ngram)
    hits = np.flatnonzero(questions.ngrams.contains(ngrams.hashes))
    row_of_hit = np.asarray(rows, np.int64)[ngrams.text[hits]]
    shared_rows, first, counts = np.unique(row_of_hit, return_index=True, return_counts=True)
    overlaps = []
    for row, hit, count in zip(
        shared_rows.tolist(), hits[first].tolist(), counts.tolist(), strict=True
    ):
        word = int(ngrams.word[hit])
        words = words_of(texts[int(ngrams.text[hit])])[word : word + questions.ngram]
        overlaps.append((row, count, " ".join(words)))
    return overlaps


def _questions_of(
    record: dict[str, Any] | DataError, chunk: Chunk, config: DecontaminateConfig, where: str
) -> list[str]:
    """Return the texts under `config.fields`, or what users say in a conversation."""
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


def _stored_overlaps(
    path: Path, source: ResolvedSource, comparisons: Iterator[tuple[Chunk, list[Overlap]]]
) -> list[Overlap]:
    """Return what the file at `path` holds, or compare the source and write it."""
    # A file that is missing or unreadable is written again.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return [(row, count, words) for row, count, words in json.loads(path.read_bytes())["rows"]]
    overlaps: list[Overlap] = []
    bytes_read = 0
    total = sum(file.stamp.size for file in source.files)
    with progress(f"comparing {source.name}", total, "bytes") as advance:
        for chunk, rows in comparisons:
            overlaps += rows
            note = f"{len(overlaps):,} rows share a passage"
            advance(max(0, chunk.source_bytes_read - bytes_read), note)
            bytes_read = max(bytes_read, chunk.source_bytes_read)
    atomic.write_json(path, {"rows": overlaps})
    return overlaps


def _compare(
    chunks: Iterator[Chunk], questions: Questions, pool: WorkerPool, workers: int
) -> Iterator[tuple[Chunk, list[Overlap]]]:
    """Yield every chunk with its overlaps, in order."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, overlaps_of(chunk, questions)
        return
    waiting: deque[tuple[Chunk, Future[list[Overlap]]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_work, chunk)))
            # Two chunks for each worker keep all of them busy and bound the memory.
            if len(waiting) > 2 * workers:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        for chunk, future in waiting:
            yield chunk, future.result()
    except BrokenProcessPool as exc:
        raise PrerequisiteError(
            "a worker process died (killed, or out of memory); run the same command again, with"
            " fewer --workers if memory was short"
        ) from exc


_worker_questions: Questions | None = None  # one per worker process: sent once, not with each chunk


def _start_worker(questions: Questions) -> None:
    global _worker_questions
    _worker_questions = questions


def _work(chunk: Chunk) -> list[Overlap]:
    assert _worker_questions is not None
    return overlaps_of(chunk, _worker_questions)
