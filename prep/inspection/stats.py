"""Numbers of a shard set: what it holds, where it comes from, what is trained.

Reads no tokens, only their kinds and masks.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from prep.selection.eval_split import num_held_out
from shared import config
from shared.shard_format import EVAL_DIR, KIND_MASK, OTHER_GROUPS
from shared.shard_reader import ShardSet, read_manifest

_PERCENTILES = (5, 25, 50, 75, 95, 99)
_BLOCK_TOKENS = 1 << 24
# why rows are missing: key of the manifest -> word in the tables
_REASONS = {
    "rows_rejected": "rejected",
    "rows_unrendered": "unrendered",
    "rows_dropped": "left out",
}


def stats(shard_set: ShardSet) -> dict[str, Any]:
    """Return the numbers of `shard_set`, ready for JSON."""
    manifest = shard_set.manifest
    totals = manifest.totals
    none = np.zeros(0, np.int64)
    lengths = [none, *(np.diff(shard["seq_offsets"]) for shard in shard_set.shards)]
    per_pack = [none, *(np.diff(shard["pack_offsets"]) for shard in shard_set.shards)]
    held_out = None
    if num_held_out(manifest):
        evaluation = read_manifest(shard_set.path / EVAL_DIR)
        held_out = {
            "fingerprint": evaluation.fingerprint,
            "rows_used": {source.name: source.rows_used for source in evaluation.sources},
            **config.to_plain(evaluation.totals),
        }
    return {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer.name,
        "template": manifest.chat_template.name,
        "split_markers": manifest.chat_template.split_markers,
        "max_seq_len": manifest.max_seq_len,
        "shards": len(manifest.shards),
        "bytes": sum(entry.bytes for shard in manifest.shards for entry in shard.files.values()),
        "packs": totals.packs,
        "sequences": totals.sequences,
        "tokens": totals.tokens,
        "loss_tokens": totals.loss_tokens,
        "loss_share": _share(totals.loss_tokens, totals.tokens),
        "density": totals.density,
        "sequence_length": _spread(np.concatenate(lengths)),
        "sequences_per_pack": _spread(np.concatenate(per_pack)),
        "kinds": _kinds(shard_set),
        "held_out": held_out,
        "sources": [
            {
                "name": source.name,
                "format": source.details.get("format", "messages"),
                "epochs_used": source.details.get("epochs_used", 1.0),
                "group_of": source.details.get("group_of"),
                "rows_read": source.own_rows,
                "rows_used": source.rows_used,
                "rows_rejected": source.rows_rejected,
                "rows_unrendered": source.rows_unrendered,
                "rows_dropped": {
                    key: rows for key, rows in source.rows_dropped.items() if key != OTHER_GROUPS
                },
                "rows_truncated": source.rows_truncated,
                "rows_without_terminator": source.rows_without_terminator,
                "tokens": source.tokens,
                "token_share": _share(source.tokens, totals.tokens),
                "loss_tokens": source.loss_tokens,
                "loss_share": _share(source.loss_tokens, totals.loss_tokens),
            }
            for source in manifest.sources
        ],
    }


def stats_lines(shard_set: ShardSet) -> list[str]:
    """Return the numbers as plain text tables, and every reason why a row is missing."""
    numbers = stats(shard_set)
    mib = numbers["bytes"] / 2**20
    lines = [
        line.format(mib=mib, **numbers)
        for line in (
            "{name}  {fingerprint:.16}  tokenizer {tokenizer}, template {template}",
            "{packs:,} packs of {max_seq_len:,} in {shards} shards, {mib:,.1f} MiB,"
            " density {density:.2%}",
            "{tokens:,} tokens, {loss_tokens:,} of them trained ({loss_share:.1%}), in"
            " {sequences:,} sequences",
        )
    ]
    if split_markers := numbers["split_markers"]:
        listed = ", ".join(f"{marker} ({count})" for marker, count in split_markers.items())
        lines.append(f"markers of the template that take several tokens: {listed}")
    if held_out := numbers["held_out"]:
        lines.append(
            f"held out in {EVAL_DIR}/: {held_out['packs']:,} packs, {held_out['tokens']:,} tokens,"
            f" {held_out['loss_tokens']:,} of them with loss, in {held_out['sequences']:,}"
            f" sequences; sft-prep stats {shard_set.path / EVAL_DIR}"
        )
    rows = []
    for label, key in (
        ("tokens per sequence", "sequence_length"),
        ("sequences per pack", "sequences_per_pack"),
    ):
        spread = numbers[key].items()
        rows.append([label, *(f"{n:,.1f}" if name == "mean" else f"{n:,}" for name, n in spread)])
    lines += _table(["", "mean", "min", *(f"p{p}" for p in _PERCENTILES), "max"], rows)
    rows = []
    for name, kind in numbers["kinds"].items():
        tokens, trained = kind["tokens"], kind["loss_tokens"]
        if tokens:
            share = _share(tokens, numbers["tokens"])
            rows.append([name, f"{tokens:,}", f"{share:.1%}", f"{trained:,}"])
    lines += _table(["kind", "tokens", "share", "trained"], rows)
    rows = []
    for source in numbers["sources"]:
        counts = [source["rows_read"], source["rows_used"]]
        counts += [sum(source[key].values()) for key in _REASONS]
        counts += [source["rows_truncated"], source["tokens"], source["loss_tokens"]]
        texts = [f"{count:,}" for count in counts]
        rows.append([source["name"], source["format"], *texts, f"{source['loss_share']:.1%}"])
    columns = ["source", "format", "rows", "used", *_REASONS.values()]
    lines += _table([*columns, "cut", "tokens", "trained", "loss share"], rows)
    for source in numbers["sources"]:
        if source["epochs_used"] > 1:
            lines.append(f"{source['name']}: used {source['epochs_used']:g} times")
        lines += [
            f"{source['name']}: {count:,} {word}: {reason}"
            for key, word in _REASONS.items()
            for reason, count in source[key].items()
        ]
    return lines


def _spread(values: npt.NDArray[np.int64]) -> dict[str, float]:
    if not len(values):
        return {}
    percentiles = np.percentile(values, _PERCENTILES, method="inverted_cdf").tolist()
    return {
        "mean": float(values.mean()),
        "min": int(values.min()),
        **{f"p{p}": int(value) for p, value in zip(_PERCENTILES, percentiles, strict=True)},
        "max": int(values.max()),
    }


def _kinds(shard_set: ShardSet) -> dict[str, dict[str, int]]:
    """Return tokens and loss tokens of each kind."""
    tokens, trained = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for shard in shard_set.shards:
        for start in range(0, len(shard["kind"]), _BLOCK_TOKENS):
            block = slice(start, start + _BLOCK_TOKENS)
            kind = shard["kind"][block] & KIND_MASK
            tokens += np.bincount(kind, minlength=256)
            trained += np.bincount(kind[shard["loss_mask"][block] == 1], minlength=256)
    return {
        name: {"tokens": int(tokens[number]), "loss_tokens": int(trained[number])}
        for name, number in shard_set.manifest.kinds.items()
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Return an empty line and a table, the first column flush left, the others flush right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=1000, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return ["", *(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))]
