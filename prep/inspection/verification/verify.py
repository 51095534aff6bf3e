"""Verify a shard set from its own files: hashes, bounds, counts and masks.

Nothing that the build claims is taken on trust. A shard is read in blocks of whole packs, so memory
does not grow with its size.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.config import MaskConfig
from prep.inspection.verification.eval_leakage import check_eval_leakage
from prep.inspection.verification.recount import recount
from prep.inspection.verification.verify_mask import MaskFault, verify_mask
from prep.selection.eval_split import num_held_out
from shared import config
from shared.errors import ArtifactError, ChecksumError, ConfigError
from shared.hashing import canonical_json
from shared.shard_format import EVAL_DIR, KIND_MASK, MANIFEST_NAME, Manifest
from shared.shard_reader import ShardSet, check_hashes, open_shard_set

Ints = npt.NDArray[np.int64]

_BLOCK_TOKENS = 1 << 23


@dataclass(frozen=True, slots=True)
class _Block:
    """Whole packs of one shard; token positions count from the block's first token."""

    shard: int
    first_pack: int  # in the shard
    first_sequence: int  # in the shard
    tokens: npt.NDArray[np.int32]  # [T]
    mask: npt.NDArray[np.uint8]  # [T]
    kind: npt.NDArray[np.uint8]  # [T]
    seq_offsets: Ints  # [S+1], from 0 to T
    pack_offsets: Ints  # [P+1], from 0 to S
    pack_loss_tokens: npt.NDArray[np.int32]  # [P]
    source_of: Ints  # [S]


@dataclass
class _Sums:
    """What the blocks add up to."""

    max_token_id: int
    tokens: Ints  # [sources]
    loss_tokens: Ints  # [sources]
    turns_left_out: int = 0


def verify(path: Path) -> list[str]:
    """Return what was verified of the shard set at `path`, a line each, its `eval` set included.

    Raises ChecksumError, IncompleteArtifactError or ArtifactError for the first thing that does not
    hold, saying where.
    """
    check_hashes(path)
    shard_set = open_shard_set(path)
    manifest, manifest_path = shard_set.manifest, path / MANIFEST_NAME
    data = manifest_path.read_bytes()
    if canonical_json(json.loads(data)) != data:
        raise ChecksumError(
            f"{manifest_path} is not canonical JSON; it was changed by hand, build again"
        )
    # A set that `sft-prep build` did not make need not have a mask policy.
    policy = None
    if "mask" in manifest.config:
        try:
            policy = config.build(
                MaskConfig, manifest.config["mask"], f"{manifest_path}: config.mask"
            )
        except ConfigError as exc:
            raise ArtifactError(f"{exc}; verify with the sft-prep that built the set") from exc
    _check_manifest_counts(manifest, path)
    # Bounds before content: what follows indexes by offsets and sources.
    sums = _Sums(-1, *np.zeros((2, len(manifest.sources)), np.int64))
    for shard in range(len(shard_set.shards)):
        _check_bounds(shard_set, shard)
        for block in _blocks(shard_set, shard):
            _check_block(shard_set, block, policy, sums)
    _check_totals(shard_set, sums)
    lines = _report(shard_set, policy, sums)
    if num_held_out(manifest) or (path / EVAL_DIR).exists():
        lines += verify(path / EVAL_DIR)
        lines.append(
            f"  both sides   {check_eval_leakage(shard_set, open_shard_set(path / EVAL_DIR))}"
        )
    return lines


def _report(shard_set: ShardSet, policy: MaskConfig | None, sums: _Sums) -> list[str]:
    manifest, totals = shard_set.manifest, shard_set.manifest.totals
    files = [entry for shard in manifest.shards for entry in shard.files.values()]
    size = sum(entry.bytes for entry in files) / 2**20
    masks = "not checked: the manifest's config has no mask policy"
    if policy is not None:
        masks = (
            f"{totals.loss_tokens:,} loss tokens follow train_on = {policy.train_on}, boundary ="
            f" {policy.boundary}"
        )
        if sums.turns_left_out:
            what = "tokens" if policy.train_on == "all" else "turns"
            masks += f"; {sums.turns_left_out:,} {what} left out, as `train: false` does"
    return [
        f"{shard_set.path}: holds",
        f"  fingerprint  {manifest.fingerprint}",
        (
            f"  hashes       {len(files) + len(manifest.tokenizer.files)} files, {size:,.1f} MiB of"
            " columns"
        ),
        (
            f"  bounds       {totals.packs:,} packs of at most {manifest.max_seq_len:,},"
            f" {totals.sequences:,} sequences"
        ),
        (
            f"  counts       {totals.tokens:,} tokens, totals and {len(manifest.sources)} sources"
            " add up"
        ),
        f"  manifest     {recount(shard_set)}",
        f"  masks        {masks}",
    ]


def _check_manifest_counts(manifest: Manifest, path: Path) -> None:
    totals = manifest.totals
    space = totals.packs * manifest.max_seq_len
    density = totals.tokens / space if space else 0.0
    if abs(totals.density - density) > 1e-9:
        raise ArtifactError(
            f"{path}: density is {totals.density}, tokens / (packs x max_seq_len) is {density};"
            " build the set again"
        )
    # Numbers in free-form tables, which the checks below compute with.
    numbers = [
        (source.name, "details.epochs", source.details.get("epochs") or 1)
        for source in manifest.sources
    ]
    lengths = manifest.config.get("lengths", {})
    minimum = lengths.get("min_loss_tokens", 0) if isinstance(lengths, dict) else lengths
    for owner, key, value in [*numbers, ("config", "lengths.min_loss_tokens", minimum)]:
        # `type`, because a bool is an int; the bound keeps what is computed with it within int64.
        if type(value) not in (int, float) or not 0 <= value < 1 << 62:
            raise ArtifactError(
                f"{path}: {owner}: {key} is {value!r}; expected a number. Build the set again"
            )
    names = [source.name for source in manifest.sources]
    if len(set(names)) != len(names):
        raise ArtifactError(f"{path}: source names {names} are not distinct; build the set again")


def _check_bounds(shard_set: ShardSet, shard: int) -> None:
    columns, where = shard_set.shards[shard], _shard_name(shard_set, shard)
    for name in ("seq_offsets", "pack_offsets"):
        falling = np.flatnonzero(np.diff(columns[name]) <= 0)
        if len(falling):
            raise ArtifactError(
                f"{where}: {name}[{falling[0] + 1}] is not above the one before it; build again"
            )
    lengths = np.diff(columns["seq_offsets"][columns["pack_offsets"]])
    long = np.flatnonzero(lengths > shard_set.manifest.max_seq_len)
    if len(long):
        raise ArtifactError(
            f"{where} pack {long[0]} has {lengths[long[0]]} tokens; max_seq_len is"
            f" {shard_set.manifest.max_seq_len}. Build the set again"
        )
    origin, sources = columns["seq_origin"], shard_set.manifest.sources
    wrong = (origin < 0).any(axis=1) | (origin[:, 0] >= len(sources))
    # The last entry is for sequences without a valid source: an index that always exists.
    rows_read = np.array([*(source.rows_read for source in sources), 0], np.int64)
    wrong |= origin[:, 1] >= rows_read[np.where(wrong, len(sources), origin[:, 0])]
    if wrong.any():
        sequence = int(np.flatnonzero(wrong)[0])
        raise ArtifactError(
            f"{where} sequence {sequence}: origin {origin[sequence].tolist()} is no row of a"
            " source; build the set again"
        )


def _blocks(shard_set: ShardSet, shard: int) -> Iterator[_Block]:
    columns = shard_set.shards[shard]
    pack_ends = columns["seq_offsets"][columns["pack_offsets"]]  # int64 [P+1] in tokens
    first = 0
    while first < len(pack_ends) - 1:
        # One pack at least, however long, and otherwise no more than _BLOCK_TOKENS.
        end = int(np.searchsorted(pack_ends, pack_ends[first] + _BLOCK_TOKENS, side="right")) - 1
        last = max(first + 1, end)
        sequences = slice(columns["pack_offsets"][first], columns["pack_offsets"][last])
        tokens = slice(pack_ends[first], pack_ends[last])
        yield _Block(
            shard=shard,
            first_pack=first,
            first_sequence=int(sequences.start),
            tokens=columns["tokens"][tokens],
            mask=columns["loss_mask"][tokens],
            kind=columns["kind"][tokens],
            seq_offsets=columns["seq_offsets"][sequences.start : sequences.stop + 1] - tokens.start,
            pack_offsets=columns["pack_offsets"][first : last + 1] - sequences.start,
            pack_loss_tokens=columns["pack_loss_tokens"][first:last],
            source_of=columns["seq_origin"][sequences, 0],
        )
        first = last


def _check_block(
    shard_set: ShardSet, block: _Block, policy: MaskConfig | None, sums: _Sums
) -> None:
    """Check the tokens of a block one by one, then its sums and masks, and add it to `sums`."""
    manifest = shard_set.manifest
    is_kind = np.zeros(256, np.bool_)
    is_kind[list(manifest.kinds.values())] = True
    limit = min(manifest.max_token_id, manifest.tokenizer.vocab_size - 1)
    is_first = np.zeros(len(block.mask), np.bool_)
    is_first[block.seq_offsets[:-1]] = True
    for wrong, what in (
        ((block.tokens < 0) | (block.tokens > limit), f"its id is not between 0 and {limit}"),
        (block.mask > 1, "its loss mask is neither 0 nor 1"),
        (is_first & (block.mask != 0), "it is the first of its sequence, yet trained"),
        (~is_kind[block.kind & KIND_MASK], "its kind is not one that the manifest lists"),
    ):
        if wrong.any():
            raise _fault(shard_set, block, MaskFault(int(np.flatnonzero(wrong)[0]), what))

    # Differences of one running sum give the loss tokens of every sequence and pack.
    running = np.concatenate(([0], np.cumsum(block.mask, dtype=np.int64)))  # [T+1]
    per_sequence = np.diff(running[block.seq_offsets])
    per_pack = np.diff(running[block.seq_offsets][block.pack_offsets])
    wrong_packs = np.flatnonzero(per_pack != block.pack_loss_tokens)
    if len(wrong_packs):
        pack = int(wrong_packs[0])
        raise ArtifactError(
            f"{_shard_name(shard_set, block.shard)} pack {block.first_pack + pack}:"
            f" pack_loss_tokens is {block.pack_loss_tokens[pack]}, its loss mask sums to"
            f" {per_pack[pack]}; build again"
        )
    minimum = manifest.config.get("lengths", {}).get("min_loss_tokens", 0)
    few = np.flatnonzero(per_sequence < minimum)
    if len(few):
        what = (
            f"its sequence has {per_sequence[few[0]]} loss tokens; lengths.min_loss_tokens is"
            f" {minimum}"
        )
        raise _fault(shard_set, block, MaskFault(int(block.seq_offsets[few[0]]), what))
    sums.max_token_id = max(sums.max_token_id, int(block.tokens.max()))
    np.add.at(sums.tokens, block.source_of, np.diff(block.seq_offsets))
    np.add.at(sums.loss_tokens, block.source_of, per_sequence)

    if policy is not None:
        # A source that does not say how many messages have `train: false` may have some.
        details = [manifest.sources[index].details for index in np.unique(block.source_of)]
        may_be_flagged = any(detail.get("messages_untrained", 1) for detail in details)
        result = verify_mask(
            block.kind, block.mask, block.seq_offsets, policy=policy, may_be_flagged=may_be_flagged
        )
        if result.fault is not None:
            raise _fault(shard_set, block, result.fault)
        sums.turns_left_out += result.turns_left_out


def _check_totals(shard_set: ShardSet, sums: _Sums) -> None:
    """Compare what the blocks add up to with the manifest: the set, then shards, then sources."""
    manifest, path = shard_set.manifest, shard_set.path
    if manifest.totals.tokens and sums.max_token_id != manifest.max_token_id:
        raise ArtifactError(
            f"{path}: max_token_id is {manifest.max_token_id}, the largest id is"
            f" {sums.max_token_id}; build the set again"
        )
    for columns, shard in zip(shard_set.shards, manifest.shards, strict=True):
        loss_tokens = int(columns["pack_loss_tokens"].sum(dtype=np.int64))
        if loss_tokens != shard.loss_tokens:
            raise ArtifactError(
                f"{path}/{shard.path}: loss_tokens is {shard.loss_tokens}, its packs hold"
                f" {loss_tokens}; build the set again"
            )
    origins = [np.zeros((0, 3), np.int64), *(shard["seq_origin"] for shard in shard_set.shards)]
    distinct, counts = np.unique(np.concatenate(origins), axis=0, return_counts=True)
    for index, source in enumerate(manifest.sources):
        for name, stated, actual in (
            ("tokens", source.tokens, sums.tokens[index]),
            ("loss_tokens", source.loss_tokens, sums.loss_tokens[index]),
        ):
            if stated != actual:
                raise ArtifactError(
                    f"{path}: source {source.name!r} has {name} = {stated}, its sequences hold"
                    f" {actual}; build the set again"
                )
        # Each (source, row, start) occurs once, or as often as the epochs of the source repeat it.
        of_source = distinct[:, 0] == index
        epochs: Any = source.details.get("epochs")
        allowed = int(np.ceil(epochs)) if epochs else 1
        often = np.flatnonzero(of_source & (counts > allowed))
        if len(often):
            raise ArtifactError(
                f"{path}: source {source.name!r} row {distinct[often[0], 1]} is used"
                f" {counts[often[0]]} times; expected at most {allowed}. Build the set again"
            )
        rows = len(np.unique(distinct[of_source, 1]))
        if rows != source.rows_used:
            raise ArtifactError(
                f"{path}: source {source.name!r} has rows_used = {source.rows_used}, its"
                f" sequences come from {rows} rows; build the set again"
            )


def _fault(shard_set: ShardSet, block: _Block, fault: MaskFault) -> ArtifactError:
    """Return the error that names the pack, the sequence, the row and the token of a fault."""
    sequence = int(np.searchsorted(block.seq_offsets, fault.token, side="right")) - 1
    pack = int(np.searchsorted(block.pack_offsets, sequence, side="right")) - 1
    within = sequence - int(block.pack_offsets[pack])
    source, row, _ = shard_set.shards[block.shard]["seq_origin"][
        block.first_sequence + sequence
    ].tolist()
    name = shard_set.manifest.sources[source].name
    token = fault.token - int(block.seq_offsets[sequence])
    return ArtifactError(
        f"{_shard_name(shard_set, block.shard)} pack {block.first_pack + pack}, sequence {within}"
        f" ({name} row {row}), token {token}: {fault.what}; build the set again"
    )


def _shard_name(shard_set: ShardSet, shard: int) -> str:
    return f"{shard_set.path}/{shard_set.manifest.shards[shard].path}"
