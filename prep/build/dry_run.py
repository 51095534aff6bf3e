"""`sft-prep build --dry-run`: tokenise, select and pack, and report what a build would write."""

from collections import Counter
from pathlib import Path

import numpy as np

from prep.build.choose_encoder import check_compatibility
from prep.build.request import BuildRequest, known_facts
from prep.build.select import select
from prep.build.tokenise import encoder_for, tokenise_sources
from prep.inputs import resolve_inputs
from prep.tokenization.tokenizer import load_tokenizer
from prep.writing.shard_set import PackedSequences, pack_sequences
from shared.shard_format import EVAL_DIR, OTHER_GROUPS


def dry_run(request: BuildRequest) -> list[str]:
    """Return what a build would write, line by line. The samples stay in the store."""
    inputs = resolve_inputs(request.mixture, request.base, known_facts(request))
    loaded = load_tokenizer(inputs.tokenizer, inputs.mixture.tokenizer.add_tokens)
    check_compatibility(inputs, loaded)
    spec, _ = encoder_for(inputs, loaded)
    sources = tokenise_sources(
        inputs, spec, store=request.store, workers=request.workers, scheduler=request.scheduler
    )
    selections = select(request, inputs, sources)
    max_seq_len = request.mixture.max_seq_len
    packed = pack_sequences(selections.train, max_seq_len)
    lines = [_size_line(request.out, packed, max_seq_len)]
    for selected in selections.train:
        counts, dropped = selected.source.counts, Counter(selected.selection.dropped)
        # Rows of the other groups of a split source are none of this one.
        rows = counts.rows - dropped.pop(OTHER_GROUPS, 0)
        reasons = [f"rejected {len(counts.rejects):,}", f"unrendered {len(counts.unrendered):,}"]
        reasons += [f"{reason} {number:,}" for reason, number in sorted(dropped.items())]
        lines.append(
            f"  {selected.source.name}: {rows:,} rows,"
            f" {len(selected.selection.sequences):,} sequences; {', '.join(reasons)}"
        )
    if selections.num_held_out:
        packed = pack_sequences(selections.held_out, max_seq_len)
        lines.append(_size_line(request.out / EVAL_DIR, packed, max_seq_len))
        lines += [
            f"  {selected.source.name}: {len(selected.selection.sequences):,} sequences"
            for selected in selections.held_out
        ]
    return lines


def _size_line(out: Path, packed: PackedSequences, max_seq_len: int) -> str:
    sequences, packs = packed.sequences, len(packed.pack_offsets) - 1
    tokens = int(sequences["length"].sum(dtype=np.int64))
    loss_tokens = int(sequences["loss_tokens"].sum(dtype=np.int64))
    # Six bytes a token: four of its id, one of its kind, one of its mask.
    density, size = tokens / (packs * max_seq_len), tokens * 6 / 2**20
    return (
        f"{out} would hold {packs:,} packs of {max_seq_len:,}, {len(sequences):,} sequences,"
        f" {tokens:,} tokens, {loss_tokens:,} loss tokens, density {density:.2%}, about"
        f" {size:,.1f} MiB"
    )
