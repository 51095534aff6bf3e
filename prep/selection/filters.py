"""Rows that are left out although nothing is wrong with them: too little loss, a passage of a
question, a duplicate of an earlier row."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from prep.selection.decontamination.overlaps import Overlap
from prep.selection.sequences import EligibleRows
from prep.store.sample_store import SampleStore


def without_little_loss(eligible: EligibleRows, min_loss_tokens: int | None) -> EligibleRows:
    """Leave out rows whose sequences together carry fewer loss tokens."""
    if min_loss_tokens is None or not len(eligible.rows):
        return eligible
    _, row_of = np.unique(eligible.rows["row"], return_inverse=True)
    loss_tokens = np.bincount(row_of, eligible.rows["loss_tokens"])[row_of].astype(np.int64)
    few = loss_tokens < min_loss_tokens
    return eligible.without(
        few, "under_min_loss_tokens", lambda index: f"{loss_tokens[index]} loss tokens"
    )


def without_overlaps(
    eligible: EligibleRows, overlaps: Sequence[Overlap], ngram: int
) -> EligibleRows:
    """Leave out rows that share a passage with a question."""
    shared = {row: (count, words) for row, count, words in overlaps}
    which = np.isin(eligible.rows["row"], np.fromiter(shared, np.int64, len(shared)))

    def detail(index: int) -> str:
        count, words = shared[int(eligible.rows["row"][index])]
        return f"shares {count} {ngram}-grams with a question: {words}"

    return eligible.without(which, "contaminated", detail)


def without_duplicates(
    sources: Sequence[EligibleRows], stores: Sequence[SampleStore], names: Sequence[str]
) -> list[EligibleRows]:
    """Keep the first of rows with equal content, in the order of sources and rows."""
    counts = [len(eligible.rows) for eligible in sources]
    source = np.repeat(np.arange(len(sources)), counts)
    row = np.concatenate([eligible.rows["row"] for eligible in sources])
    content = np.concatenate(
        [
            hashes_of(eligible, store, "content_hash")
            for eligible, store in zip(sources, stores, strict=True)
        ]
    )
    # Sorted by content, then source and row, equal sequences are neighbours and the first of a run
    # is the one to keep.
    order = np.lexsort((row, source, content[:, 1], content[:, 0]))
    ordered = content[order]
    is_new = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))[: len(order)]
    first = np.empty(len(order), np.int64)  # of each sequence: the first with the same content
    first[order] = order[np.flatnonzero(is_new)][np.cumsum(is_new) - 1]
    # Fragments of one row have the content of their row; they are no duplicates of each other.
    is_duplicate = (source[first] != source) | (row[first] != row)
    result = []
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    for eligible, start in zip(sources, starts, strict=True):

        def detail(index: int, start: int = start) -> str:
            original = first[start + index]
            return f"the same as row {row[original]} of {names[source[original]]}"

        which = is_duplicate[start : start + len(eligible.rows)]
        result.append(eligible.without(which, "duplicate", detail))
    return result


def hashes_of(
    eligible: EligibleRows, store: SampleStore, column: Literal["content_hash", "prompt_hash"]
) -> npt.NDArray[np.uint64]:
    """Return a hash of the sample of every sequence, as two numbers, uint64 [S, 2]."""
    result = np.zeros((len(eligible.rows), 2), np.uint64)
    for chunk in np.unique(eligible.rows["chunk"]).tolist():
        # 16 bytes of hash per sample, read as two numbers.
        of_chunk = eligible.rows["chunk"] == chunk
        hashes = np.ascontiguousarray(store.chunks[chunk].column(column))
        result[of_chunk] = hashes.view("<u8")[eligible.rows["sample"][of_chunk]]
    return result
