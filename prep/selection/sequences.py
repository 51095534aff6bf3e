"""From a sample store to the sequences of one source: cut, filter, then choose and repeat.

Works on integers alone; no token is copied. Every random choice is a hash of (seed, source name,
row), so it does not depend on order, workers or interruptions.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from prep.config import LengthsConfig, MaskConfig, SourceConfig
from prep.selection.loss_mask import loss_mask_of
from prep.selection.over_length import OverLength, cut
from prep.store.sample_store import SampleStore, StoredChunk
from shared.errors import DataError, SampleTooLongError
from shared.hashing import seed_from
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK, Kind
from shared.splitmix import splitmix64

# bool [256], by the value of the kind column
_IS_ANSWER = np.isin(np.arange(256) & KIND_MASK, ASSISTANT_KINDS)

SEQUENCE = np.dtype(
    [
        ("chunk", "<i4"),
        ("sample", "<i4"),  # within the chunk
        ("row", "<i8"),  # within the source
        ("first", "<i4"),  # first token used, within the sample
        ("length", "<i4"),  # tokens used
        ("full_length", "<i4"),  # tokens of the whole sample
        ("loss_tokens", "<i4"),
        ("terminated", "|b1"),  # the last trained token is a terminator
        ("held_out", "|b1"),  # its prompt is one to evaluate on
        ("tie_break", "<u8"),  # hash of (seed, source, row, first, repeat)
    ]
)


@dataclass(frozen=True, slots=True)
class Selection:
    """What one source gives to the shard set."""

    sequences: npt.NDArray[np.void]  # SEQUENCE [S], by row, the repeats of a row side by side
    epochs_configured: float | None = None  # by the source, or by the temperature of the mixture
    epochs_used: float = 1.0  # how often the eligible rows are used, on average
    dropped: Counter[str] = field(default_factory=Counter)  # rows left out by policy, by reason
    listed: list[tuple[int, str, str]] = field(default_factory=list)  # row, what happened, detail


@dataclass(frozen=True, slots=True)
class EligibleRows:
    """The rows of one source that pass every policy but the choice of how many to use."""

    rows: npt.NDArray[np.void]  # SEQUENCE [S], by row
    dropped: Counter[str] = field(default_factory=Counter)
    listed: list[tuple[int, str, str]] = field(default_factory=list)

    def without(
        self, which: npt.NDArray[np.bool_], reason: str, detail: Callable[[int], str]
    ) -> "EligibleRows":
        """Return what is left without the rows that `which`, bool [S], marks.

        `detail` gets an index into `rows`, that of the first marked sequence of a row.
        """
        # Other sequences of a marked row go with it.
        removed, first = np.unique(self.rows["row"][which], return_index=True)
        if not len(removed):
            return self
        indices = np.flatnonzero(which)[first].tolist()
        listed = [
            (row, reason, detail(index))
            for row, index in zip(removed.tolist(), indices, strict=True)
        ]
        return EligibleRows(
            self.rows[~np.isin(self.rows["row"], removed)],
            self.dropped + Counter({reason: len(removed)}),
            self.listed + listed,
        )


def eligible_sequences(
    store: SampleStore,
    source: SourceConfig,
    name: str,
    *,
    lengths: LengthsConfig,
    mask: MaskConfig,
    max_seq_len: int,
    seed: int,
) -> EligibleRows:
    """Return the sequences of all rows that fit, render to something and carry enough loss.

    Raises SampleTooLongError for a row that is too long where that is an error.
    """
    measured = [
        _measure(index, chunk, mask, lengths.over_length, max_seq_len)
        for index, chunk in enumerate(store.chunks)
    ]
    eligible = EligibleRows(np.concatenate([*measured, np.zeros(0, SEQUENCE)]))

    def full_length(index: int) -> str:
        return f"{eligible.rows['full_length'][index]} tokens"

    # The limits of a source come before the policies for all sources: a row that its own source
    # leaves out cannot end the build.
    if source.min_tokens is not None:
        short = eligible.rows["full_length"] < source.min_tokens
        eligible = eligible.without(short, "under_min_tokens", full_length)
    if source.max_tokens is not None:
        long = eligible.rows["full_length"] > source.max_tokens
        eligible = eligible.without(long, "over_max_tokens", full_length)

    rows, dropped, listed = eligible.rows, eligible.dropped, eligible.listed
    # A sample over max_seq_len with length 0 is one that the over-length policy leaves nothing of.
    too_long = (rows["length"] == 0) & (rows["full_length"] > max_seq_len)
    if lengths.over_length == "error" and too_long.any():
        row, _, full = _row_and_lengths(rows[too_long])[0]
        raise SampleTooLongError(
            f"source {name!r} row {row} has {full} tokens, more than max_seq_len = {max_seq_len};"
            ' raise it, or set lengths.over_length to "truncate", "truncate_turns", "drop" or'
            ' "split"'
        )
    what = "no answer ends within" if lengths.over_length == "truncate_turns" else "over"
    detail = f"{what} {max_seq_len} tokens"
    rows = _leave_out(rows, too_long, "over_length", detail, dropped, listed)
    rows = _leave_out(rows, rows["length"] == 0, "empty", "renders to nothing", dropped, listed)
    # Under "split" a fragment can go while others of its row stay: these are counts of fragments.
    few = rows["loss_tokens"] < lengths.min_loss_tokens
    is_split = lengths.over_length == "split"
    reason = "fragments_with_few_loss_tokens" if is_split else "few_loss_tokens"
    detail = f"under {lengths.min_loss_tokens} loss tokens"
    rows = _leave_out(rows, few, reason, detail, dropped, listed)

    # A later fragment has another hash than the row, so fragments are dealt to different packs.
    tie_break = splitmix64(
        rows["row"].astype(np.uint64) ^ np.uint64(seed_from(seed, "order", name))
    )
    first = rows["first"].astype(np.uint64)
    rows["tie_break"] = np.where(first > 0, splitmix64(tie_break ^ first), tie_break)
    return EligibleRows(rows, dropped, listed)


def choose(eligible: EligibleRows, source: SourceConfig, name: str, *, seed: int) -> Selection:
    """Return as many eligible rows as `source` takes. Raises DataError where there are too few."""
    dropped, listed = Counter(eligible.dropped), list(eligible.listed)
    # Whole rows are chosen: all fragments of a row are used, and equally often.
    rows, row_of = np.unique(eligible.rows["row"], return_inverse=True)
    total, whole, extra = len(rows), 0, len(rows)
    if source.rows is not None:
        if source.rows > total:
            raise DataError(
                f"source {name!r}: rows = {source.rows}, but only {total} rows can be used; ask for"
                " fewer, or set epochs to repeat them"
            )
        extra = source.rows
    elif source.fraction is not None:
        extra = round(source.fraction * total)
    elif source.epochs is not None:
        whole = int(source.epochs)
        extra = round((source.epochs - whole) * total)
    # The extra rows are the first in a fixed order: a larger share keeps the rows of a smaller one.
    draw = splitmix64(rows.astype(np.uint64) ^ np.uint64(seed_from(seed, "choose", name)))
    times = np.full(total, whole, np.int64)  # [rows]
    times[np.argsort(draw, kind="stable")[:extra]] += 1
    copies = times[row_of]  # int64 [S]
    chosen = np.repeat(eligible.rows, copies)
    # A repeat gets another tie-break, so that the copies of a row are dealt to different packs.
    repeat = np.arange(len(chosen)) - np.repeat(np.cumsum(copies) - copies, copies)
    again = repeat > 0
    chosen["tie_break"][again] = splitmix64(
        chosen["tie_break"][again] + repeat[again].astype(np.uint64)
    )
    if num_unused := int((times == 0).sum()):
        dropped["not_chosen"] = num_unused
    is_split = (chosen["first"] > 0).any()
    listed += [
        (row, "split", f"{full} tokens in fragments")
        if is_split
        else (row, "truncated", f"{full} tokens cut to {used}")
        for row, used, full in _row_and_lengths(chosen[chosen["length"] < chosen["full_length"]])
    ]
    epochs_used = float(times.sum() / max(total, 1))
    return Selection(chosen, source.epochs, epochs_used, dropped, sorted(listed))


def _measure(
    index: int, chunk: StoredChunk, policy: MaskConfig, over_length: OverLength, max_seq_len: int
) -> npt.NDArray[np.void]:
    """Return the sequences of one chunk with their lengths and loss tokens, SEQUENCE [F]."""
    samples = chunk.samples()
    slices = cut(samples, over_length, max_seq_len)
    begin = samples.sample_offsets[slices.sample] + slices.first  # [F] in tokens of the chunk
    end = begin + slices.length
    mask = loss_mask_of(samples, policy)
    # The first token of a sequence cannot be predicted, nor can that of a later fragment.
    mask[begin[slices.length > 0]] = 0
    running = np.concatenate(([0], np.cumsum(mask, dtype=np.int64)))  # [N+1]
    # The last trained token of each slice that an assistant was to write. Where a slice has none,
    # this is one before its begin; -1 stands before them all.
    answers = np.append(-1, np.flatnonzero(mask & _IS_ANSWER[samples.kind]))
    last = answers[np.searchsorted(answers, end) - 1]  # [F]
    has_answer = last >= begin

    result = np.zeros(len(slices.sample), SEQUENCE)
    result["chunk"] = index
    result["sample"] = slices.sample
    result["row"] = chunk.column("sample_row")[slices.sample]
    result["first"] = slices.first
    result["length"] = slices.length
    result["full_length"] = np.diff(samples.sample_offsets)[slices.sample]
    result["loss_tokens"] = running[end] - running[begin]
    result["terminated"][has_answer] = (
        samples.kind[last[has_answer]] & KIND_MASK
    ) == Kind.TERMINATOR
    return result


def _leave_out(
    rows: npt.NDArray[np.void],
    which: npt.NDArray[np.bool_],
    reason: str,
    detail: str,
    dropped: Counter[str],
    listed: list[tuple[int, str, str]],
) -> npt.NDArray[np.void]:
    """Return `rows` without the sequences that `which` marks, which are counted and listed."""
    if which.any():
        dropped[reason] += int(which.sum())
        listed += [(row, reason, detail) for row in rows["row"][which].tolist()]
    return rows[~which]


def _row_and_lengths(sequences: npt.NDArray[np.void]) -> list[tuple[int, int, int]]:
    """Return (row, tokens used, tokens of the whole sample) of each row once."""
    _, first = np.unique(sequences["row"], return_index=True)
    result: list[tuple[int, int, int]] = sequences[["row", "length", "full_length"]][first].tolist()
    return result
