"""From sample stores to the sequences of a shard set: cut, filter, choose, repeat. Integers only, no tokens copied.

Every random choice is a hash of (seed, source name, row), so it does not depend on order, workers or interruptions.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from prep.config import LengthsConfig, MaskConfig, SourceConfig
from prep.mask import loss_mask_of
from prep.sample_store import SampleStore, StoredChunk
from shared.errors import DataError
from shared.hashing import seed_from
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK, Kind

Ints = npt.NDArray[np.int64]

SEQUENCE = np.dtype(
    [
        ("chunk", "<i4"),
        ("sample", "<i4"),  # within the chunk
        ("row", "<i8"),  # within the source
        ("length", "<i4"),  # tokens used
        ("full_length", "<i4"),  # tokens of the whole sample
        ("loss_tokens", "<i4"),
        ("terminated", "|b1"),  # the last trained token is a terminator
        ("tie", "<u8"),  # hash of (seed, source, row, repeat)
    ]
)


@dataclass(frozen=True, slots=True)
class Selection:
    """What one source gives to the shard set."""

    sequences: npt.NDArray[np.void]  # SEQUENCE [S], by row, repeats of a row behind one another
    dropped: Counter[str] = field(default_factory=Counter)  # rows left out by policy, by reason
    listed: list[tuple[int, str, str]] = field(default_factory=list)  # row, what happened, detail


def select(
    store: SampleStore, source: SourceConfig, name: str, *, lengths: LengthsConfig, mask: MaskConfig,
    max_seq_len: int, seed: int,
) -> Selection:  # fmt: skip
    """Return the sequences of a source. Raises DataError where the source cannot give the rows that are asked for."""
    parts = [_measure(index, chunk, mask, max_seq_len) for index, chunk in enumerate(store.chunks)]
    rows = np.concatenate([*parts, np.zeros(0, SEQUENCE)])
    dropped: Counter[str] = Counter()
    listed: list[tuple[int, str, str]] = []
    too_long = rows["full_length"] > max_seq_len
    if lengths.over_length == "drop":
        rows = _leave_out(rows, too_long, "over_length", f"over {max_seq_len} tokens", dropped, listed)
    rows = _leave_out(rows, rows["length"] == 0, "empty", "renders to nothing", dropped, listed)
    few = rows["loss_tokens"] < lengths.min_loss_tokens
    rows = _leave_out(rows, few, "few_loss_tokens", f"under {lengths.min_loss_tokens} loss tokens", dropped, listed)
    rows["tie"] = _mix(rows["row"].astype(np.uint64) ^ np.uint64(seed_from(seed, "order", name)))
    chosen = _choose(rows, source, name, seed)
    if len(rows) > len(np.unique(chosen["row"])):
        dropped["not_chosen"] = len(rows) - len(np.unique(chosen["row"]))
    for row, used, full in _cut_rows(chosen):
        listed.append((row, "truncated", f"{full} tokens cut to {used}"))
    return Selection(chosen, dropped, sorted(listed))


def _measure(index: int, chunk: StoredChunk, policy: MaskConfig, max_seq_len: int) -> npt.NDArray[np.void]:
    samples = chunk.samples()
    offsets = samples.sample_offsets
    result = np.zeros(len(offsets) - 1, SEQUENCE)
    if not len(result):
        return result
    mask = loss_mask_of(samples, policy)
    full = np.diff(offsets)
    used = np.minimum(full, max_seq_len)
    running = np.concatenate(([0], np.cumsum(mask, dtype=np.int64)))  # [N+1]
    written = mask & np.isin(samples.kind & KIND_MASK, ASSISTANT_KINDS)  # what assistants were to say
    trained = np.flatnonzero(written)  # token positions
    last = np.searchsorted(trained, offsets[:-1] + used) - 1  # of each sample's last one, an index into `trained`
    result["chunk"] = index
    result["sample"] = np.arange(len(result))
    result["row"] = chunk.column("sample_row")
    result["length"] = used
    result["full_length"] = full
    result["loss_tokens"] = running[offsets[:-1] + used] - running[offsets[:-1]]
    some = (last >= 0) & (trained[np.maximum(last, 0)] >= offsets[:-1]) if len(trained) else np.zeros(len(last), bool)
    result["terminated"][some] = (samples.kind[trained[last[some]]] & KIND_MASK) == Kind.TERMINATOR
    return result


def _leave_out(
    rows: npt.NDArray[np.void], which: npt.NDArray[np.bool_], reason: str, detail: str, dropped: Counter[str],
    listed: list[tuple[int, str, str]],
) -> npt.NDArray[np.void]:  # fmt: skip
    if which.any():
        dropped[reason] += int(which.sum())
        listed += [(int(row), reason, detail) for row in rows["row"][which]]
    return rows[~which]


def _choose(rows: npt.NDArray[np.void], source: SourceConfig, name: str, seed: int) -> npt.NDArray[np.void]:
    draw = np.argsort(_mix(rows["row"].astype(np.uint64) ^ np.uint64(seed_from(seed, "choose", name))), kind="stable")
    total = len(rows)
    if source.rows is not None:
        if source.rows > total:
            raise DataError(
                f"source {name!r}: rows = {source.rows}, but only {total} rows can be used; ask for fewer, "
                "or set epochs to repeat them"
            )
        return rows[np.sort(draw[: source.rows])]
    if source.fraction is not None:
        return rows[np.sort(draw[: round(source.fraction * total)])]
    if source.epochs is not None:
        whole = int(source.epochs)
        extra = np.zeros(total, np.int64)
        extra[draw[: round((source.epochs - whole) * total)]] = 1
        times = whole + extra
        repeated = np.repeat(rows, times)
        repeat = np.arange(len(repeated)) - np.repeat(np.cumsum(times) - times, times)
        again = repeat > 0
        repeated["tie"][again] = _mix(repeated["tie"][again] + repeat[again].astype(np.uint64))
        return repeated
    return rows


def _cut_rows(rows: npt.NDArray[np.void]) -> list[tuple[int, int, int]]:
    cut = rows[rows["length"] < rows["full_length"]]
    _, first = np.unique(cut["row"], return_index=True)
    return [(int(row["row"]), int(row["length"]), int(row["full_length"])) for row in cut[first]]


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash 64-bit integers: the finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
