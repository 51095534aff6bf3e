"""The manifest of a set: what was built from what, counts, and hashes of every file."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from prep.inputs import Inputs
from prep.selection.source import SelectedSource
from prep.tokenization.encoder import Encoder
from prep.tokenization.tokenizer import CANARY_TEXT, LoadedTokenizer
from prep.writing.columns import WrittenColumns
from shared.shard_format import (
    FORMAT_VERSION,
    FileEntry,
    Kind,
    Manifest,
    SourceEntry,
    TemplateEntry,
    TokenizerEntry,
    Totals,
    fingerprint_of,
)


def make_manifest(
    inputs: Inputs,
    loaded: LoadedTokenizer,
    encoder: Encoder,
    tokenizer_files: dict[str, FileEntry],
    written: WrittenColumns,
    sources: Sequence[SelectedSource],
    split_markers: dict[str, int],
) -> Manifest:
    """Return the manifest of a set whose other files are written."""
    mixture = inputs.mixture
    totals = {
        key: sum(getattr(shard, key) for shard in written.shards)
        for key in ("packs", "sequences", "tokens", "loss_tokens")
    }
    return Manifest(
        format_version=FORMAT_VERSION,
        name=mixture.name,
        fingerprint=fingerprint_of(
            max_seq_len=mixture.max_seq_len,
            tokenizer_files=tokenizer_files,
            template_sha256=inputs.template.sha256,
            source_names=[selected.source.name for selected in sources],
            shards=written.shards,
        ),
        inputs_digest=inputs.digest,
        inputs=inputs.tree,
        config=inputs.tree["config"],
        recipe=mixture.recipe,
        tokenizer=TokenizerEntry(
            name=inputs.tokenizer.name,
            revision=inputs.tokenizer.revision,
            files=tokenizer_files,
            vocab_size=encoder.vocab_size,
            bos_token_id=loaded.special_ids.get("bos_token"),
            eos_token_id=loaded.special_ids.get("eos_token"),
            pad_token_id=loaded.special_ids.get("pad_token"),
            terminator_ids=tuple(
                sorted(written.terminators, key=lambda i: (-written.terminators[i], i))
            ),
            canary_ids=tuple(encoder.ids_of(CANARY_TEXT)),
            new_ids=loaded.new_ids,
        ),
        chat_template=TemplateEntry(
            name=inputs.template.name, sha256=inputs.template.sha256, split_markers=split_markers
        ),
        kinds={kind.name.lower(): int(kind) for kind in Kind},
        max_seq_len=mixture.max_seq_len,
        max_token_id=written.max_token_id,
        sources=tuple(
            _source_entry(
                selected,
                int(loss_tokens),
                is_split=mixture.lengths.over_length == "split",
            )
            for selected, loss_tokens in zip(sources, written.loss_tokens, strict=True)
        ),
        totals=Totals(density=totals["tokens"] / (totals["packs"] * mixture.max_seq_len), **totals),
        shards=tuple(written.shards),
    )


def _source_entry(selected: SelectedSource, loss_tokens: int, *, is_split: bool) -> SourceEntry:
    """Return the entry of one source; `is_split`: over-long rows became several sequences."""
    source, counts = selected.source.resolved, selected.source.counts
    config, selection = selected.config, selected.selection
    used = selection.sequences
    _, first = np.unique(used["row"], return_index=True)  # a repeated row counts once
    rows = used[first]
    cut_short = rows["length"] < rows["full_length"]
    # of each row the sequence that holds its end, or else the last one that is left of it
    ordered = used[np.lexsort((used["first"], used["row"]))]
    is_last = np.append(np.diff(ordered["row"]) > 0, True)[: len(ordered)]
    return SourceEntry(
        name=source.name,
        hub_id=source.hub_id,
        revision=source.revision,
        content_sha256=source.content_sha256,
        rows_read=counts.rows,
        rows_used=len(rows),
        rows_rejected=_counts(reason for _, reason, _ in counts.rejects),
        rows_unrendered=_counts(reason for _, reason in counts.unrendered),
        rows_dropped=dict(sorted(selection.dropped.items())),
        rows_truncated=0 if is_split else int(cut_short.sum()),
        rows_without_terminator=int((~ordered["terminated"][is_last]).sum()),
        tokens=int(used["length"].sum(dtype=np.int64)),
        loss_tokens=loss_tokens,
        details={
            **(
                {"group_of": source.group_of, "split_by": config.split_by}
                if source.group_of
                else {}
            ),
            "format": counts.conversion.format,
            "columns": dict(counts.conversion.columns),
            "sequences": len(used),
            "epochs_used": round(selection.epochs_used, 6),
            "fraction": config.fraction,
            "rows": config.rows,
            "epochs": selection.epochs_configured,
            "rows_slow_path": counts.rows_slow_path,
            "rows_cross_checked": counts.rows_cross_checked,
            "rows_audited": counts.rows_audited,
            "rows_split": int(cut_short.sum()) if is_split else 0,
            "messages_dropped": counts.messages_dropped,
            "messages_untrained": counts.messages_untrained,
            "calls_not_json": counts.calls_not_json,
        },
    )


def _counts(reasons: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(reasons).items()))
