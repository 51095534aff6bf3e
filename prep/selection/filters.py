"""Rows that leave although nothing is wrong with them: too little loss, a passage of a question,
said before."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from prep.selection.decontaminate import Overlap
from prep.selection.sequences import EligibleRows
from prep.store.sample_store import SampleStore

Ints = npt.NDArray[np.int64]


def without_little_loss(usable: EligibleRows, min_loss_tokens: int | None) -> EligibleRows:
    """Leave out rows whose sequences carry fewer loss tokens in all."""
    if min_loss_tokens is None or not len(usable.rows):
        return usable
    _, row_of = np.unique(usable.rows["row"], return_inverse=True)
    carried = np.bincount(row_of, usable.rows["loss_tokens"])[row_of].astype(np.int64)
    return usable.without(
        carried < min_loss_tokens, "under_min_loss_tokens", lambda at: f"{carried[at]} loss tokens"
    )


def without_overlaps(usable: EligibleRows, overlaps: Sequence[Overlap], ngram: int) -> EligibleRows:
    """Leave out rows that share a passage with a question."""
    shared = {row: (count, words) for row, count, words in overlaps}
    which = np.isin(usable.rows["row"], np.fromiter(shared, np.int64, len(shared)))

    def detail(index: int) -> str:
        count, words = shared[int(usable.rows["row"][index])]
        return f"shares {count} {ngram}-grams with a question: {words}"

    return usable.without(which, "contaminated", detail)


def without_duplicates(
    usables: Sequence[EligibleRows], stores: Sequence[SampleStore], names: Sequence[str]
) -> list[EligibleRows]:
    """Keep the first of rows with equal content, in the order of sources and rows."""
    counts = [len(usable.rows) for usable in usables]
    source = np.repeat(np.arange(len(usables)), counts)
    row = np.concatenate([usable.rows["row"] for usable in usables])
    content = np.concatenate(
        [
            hashes_of(usable, store, "content_hash")
            for usable, store in zip(usables, stores, strict=True)
        ]
    )
    order = np.lexsort((row, source, content[:, 1], content[:, 0]))
    ordered = content[order]
    is_new = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))[: len(order)]
    first = np.empty(len(order), np.int64)  # of each sequence: the first with the same content
    first[order] = order[np.flatnonzero(is_new)][np.cumsum(is_new) - 1]
    again = (source[first] != source) | (
        row[first] != row
    )  # fragments of one row are no repeats of it
    kept = []
    for index, (usable, start) in enumerate(
        zip(usables, np.cumsum([0, *counts[:-1]]).tolist(), strict=True)
    ):

        def detail(at: int, start: int = start) -> str:
            original = first[start + at]
            return f"the same as row {row[original]} of {names[source[original]]}"

        kept.append(usable.without(again[start : start + counts[index]], "duplicate", detail))
    return kept


def hashes_of(
    usable: EligibleRows, store: SampleStore, column: Literal["content_hash", "prompt_hash"]
) -> npt.NDArray[np.uint64]:
    """Return a hash of the sample of every sequence, as two numbers, uint64 [S, 2]."""
    found = np.zeros((len(usable.rows), 2), np.uint64)
    for index in np.unique(usable.rows["chunk"]).tolist():
        mine = usable.rows["chunk"] == index
        hashes = np.ascontiguousarray(store.chunks[index].column(column)).view(
            "<u8"
        )  # [samples, 2]
        found[mine] = hashes[usable.rows["sample"][mine]]
    return found
