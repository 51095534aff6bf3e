"""From sample stores to the sequences of a shard set: cut, filter, choose, repeat. Integers only,
no tokens copied.

Every random choice is a hash of (seed, source name, row), so it does not depend on order, workers
or interruptions.
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

Ints = npt.NDArray[np.int64]

_WRITTEN = np.isin(np.arange(256) & KIND_MASK, ASSISTANT_KINDS).astype(
    np.uint8
)  # [256] by the kind column

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

    sequences: npt.NDArray[np.void]  # SEQUENCE [S], by row, repeats of a row behind one another
    epochs_configured: float | None = None  # by the source, or by the temperature of the mixture
    epochs_used: float = 1.0  # how often the eligible rows are used, on average
    dropped: Counter[str] = field(default_factory=Counter)  # rows left out by policy, by reason
    listed: list[tuple[int, str, str]] = field(default_factory=list)  # row, what happened, detail


@dataclass(frozen=True, slots=True)
class EligibleRows:
    """The rows of one source that pass every policy but the choice of how many: what the choice is
    made from."""

    rows: npt.NDArray[np.void]  # SEQUENCE [S], by row
    dropped: Counter[str] = field(default_factory=Counter)
    listed: list[tuple[int, str, str]] = field(default_factory=list)

    def without(
        self, which: npt.NDArray[np.bool_], reason: str, detail: Callable[[int], str]
    ) -> "EligibleRows":
        """Return what is left without the rows that `which` marks, bool [S]; `detail` is told an
        index into `rows`."""
        gone, first = np.unique(self.rows["row"][which], return_index=True)
        if not len(gone):
            return self
        where = np.flatnonzero(which)[first]
        listed = [
            (int(row), reason, detail(at)) for row, at in zip(gone, where.tolist(), strict=True)
        ]
        dropped = Counter(self.dropped)
        dropped[reason] += len(gone)
        return EligibleRows(
            self.rows[~np.isin(self.rows["row"], gone)], dropped, self.listed + listed
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
    """Return the sequences of all rows that fit, render to something and carry enough loss."""
    parts = [
        _measure(index, chunk, mask, lengths.over_length, max_seq_len)
        for index, chunk in enumerate(store.chunks)
    ]
    eligible = _by_length(EligibleRows(np.concatenate([*parts, np.zeros(0, SEQUENCE)])), source)
    rows, dropped, listed = eligible.rows, eligible.dropped, eligible.listed
    too_long = (rows["length"] == 0) & (
        rows["full_length"] > max_seq_len
    )  # of these the policy leaves nothing
    if lengths.over_length == "error" and too_long.any():
        row, _, full = _row_and_lengths(rows[too_long])[0]
        raise SampleTooLongError(
            f"source {name!r} row {row} has {full} tokens, more than max_seq_len = {max_seq_len};"
            ' raise it, or set lengths.over_length to "truncate", "truncate_turns", "drop" or'
            ' "split"'
        )
    what = "no answer ends within" if lengths.over_length == "truncate_turns" else "over"
    rows = _leave_out(
        rows, too_long, "over_length", f"{what} {max_seq_len} tokens", dropped, listed
    )
    rows = _leave_out(rows, rows["length"] == 0, "empty", "renders to nothing", dropped, listed)
    few = rows["loss_tokens"] < lengths.min_loss_tokens
    reason = (
        "fragments_with_few_loss_tokens" if lengths.over_length == "split" else "few_loss_tokens"
    )
    rows = _leave_out(
        rows, few, reason, f"under {lengths.min_loss_tokens} loss tokens", dropped, listed
    )
    rows["tie_break"] = splitmix64(
        rows["row"].astype(np.uint64) ^ np.uint64(seed_from(seed, "order", name))
    )
    first = rows["first"].astype(np.uint64)
    rows["tie_break"] = np.where(
        first > 0, splitmix64(rows["tie_break"] ^ first), rows["tie_break"]
    )
    return EligibleRows(rows, dropped, listed)


def choose(eligible: EligibleRows, source: SourceConfig, name: str, *, seed: int) -> Selection:
    """Return as many eligible rows as `source` takes. Raises DataError where there are too few."""
    dropped, listed = Counter(eligible.dropped), list(eligible.listed)
    chosen = _choose(eligible.rows, source, name, seed)
    rows, fragments = np.unique(eligible.rows["row"], return_counts=True)
    used, sequences = np.unique(chosen["row"], return_counts=True)
    times = sequences // fragments[np.searchsorted(rows, used)]
    if len(rows) > len(used):
        dropped["not_chosen"] = len(rows) - len(used)
    cut_short = chosen[chosen["length"] < chosen["full_length"]]
    if (chosen["first"] > 0).any():
        listed += [
            (row, "split", f"{full} tokens in fragments")
            for row, _, full in _row_and_lengths(cut_short)
        ]
    else:
        listed += [
            (row, "truncated", f"{full} tokens cut to {n}")
            for row, n, full in _row_and_lengths(cut_short)
        ]
    return Selection(
        chosen, source.epochs, float(times.sum() / max(len(rows), 1)), dropped, sorted(listed)
    )


def _by_length(eligible: EligibleRows, source: SourceConfig) -> EligibleRows:
    """Leave out the rows that are too short or too long for their own source, before any policy for
    all of them."""

    def detail(index: int) -> str:
        return f"{full[index]} tokens"

    full = eligible.rows["full_length"]
    if source.min_tokens is not None:
        eligible = eligible.without(full < source.min_tokens, "under_min_tokens", detail)
    full = eligible.rows["full_length"]
    if source.max_tokens is not None:
        eligible = eligible.without(full > source.max_tokens, "over_max_tokens", detail)
    return eligible


def _measure(
    index: int, chunk: StoredChunk, policy: MaskConfig, over_length: OverLength, max_seq_len: int
) -> npt.NDArray[np.void]:
    samples = chunk.samples()
    pieces = cut(samples, over_length, max_seq_len)
    result = np.zeros(len(pieces.sample), SEQUENCE)
    if not len(result):
        return result
    mask = loss_mask_of(samples, policy)
    begin = samples.sample_offsets[pieces.sample] + pieces.first  # [F] in tokens of the chunk
    end = begin + pieces.length
    some = np.flatnonzero(pieces.length > 0)
    mask[begin[some]] = (
        0  # the first token of a sequence cannot be predicted, that of a later fragment neither
    )
    running = np.concatenate(([0], np.cumsum(mask, dtype=np.int64)))  # [N+1]
    written = np.flatnonzero(mask & _WRITTEN[samples.kind])  # what assistants were to say
    last = np.searchsorted(written, end) - 1  # of each piece's last one, an index into `written`
    ended = (
        (last >= 0) & (written[np.maximum(last, 0)] >= begin)
        if len(written)
        else np.zeros(len(last), np.bool_)
    )
    result["chunk"] = index
    result["sample"] = pieces.sample
    result["row"] = chunk.column("sample_row")[pieces.sample]
    result["first"] = pieces.first
    result["length"] = pieces.length
    result["full_length"] = np.diff(samples.sample_offsets)[pieces.sample]
    result["loss_tokens"] = running[end] - running[begin]
    result["terminated"][ended] = (
        samples.kind[written[last[ended]]] & KIND_MASK
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
    if which.any():
        dropped[reason] += int(which.sum())
        listed += [(int(row), reason, detail) for row in rows["row"][which]]
    return rows[~which]


def _choose(
    sequences: npt.NDArray[np.void], source: SourceConfig, name: str, seed: int
) -> npt.NDArray[np.void]:
    """Choose whole rows; a row's fragments stay together, its repeats follow one another."""
    rows, row_of = np.unique(sequences["row"], return_inverse=True)
    times = _times(rows, source, name, seed)[row_of]
    repeated = np.repeat(sequences, times)
    repeat = np.arange(len(repeated)) - np.repeat(np.cumsum(times) - times, times)
    again = repeat > 0
    repeated["tie_break"][again] = splitmix64(
        repeated["tie_break"][again] + repeat[again].astype(np.uint64)
    )
    return repeated


def _times(rows: Ints, source: SourceConfig, name: str, seed: int) -> Ints:
    """Return how often each row is used, int64 [rows]."""
    draw = np.argsort(
        splitmix64(rows.astype(np.uint64) ^ np.uint64(seed_from(seed, "choose", name))),
        kind="stable",
    )
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
    times = np.full(total, whole, np.int64)
    times[draw[:extra]] += 1
    return times


def _row_and_lengths(sequences: npt.NDArray[np.void]) -> list[tuple[int, int, int]]:
    """Return (row, tokens used, tokens of the whole sample) of each row once."""
    _, first = np.unique(sequences["row"], return_index=True)
    return [
        (int(row["row"]), int(row["length"]), int(row["full_length"])) for row in sequences[first]
    ]
