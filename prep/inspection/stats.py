"""Numbers of a shard set: what it holds, where it comes from, what carries loss. Reads no
tokens."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.selection.eval_split import num_held_out
from shared import config
from shared.shard_format import EVAL_DIR, KIND_MASK, OTHER_GROUPS, Manifest
from shared.shard_reader import ShardSet, read_manifest

_PERCENTILES = (5, 25, 50, 75, 95, 99)
_BLOCK_TOKENS = 1 << 24


def stats(shard_set: ShardSet) -> dict[str, Any]:
    """Return the numbers of `shard_set`, ready for JSON."""
    manifest = shard_set.manifest
    lengths = np.concatenate(
        [np.diff(shard["seq_offsets"]) for shard in shard_set.shards] or [np.zeros(0, np.int64)]
    )
    per_pack = np.concatenate(
        [np.diff(shard["pack_offsets"]) for shard in shard_set.shards] or [np.zeros(0, np.int64)]
    )
    files = [entry.bytes for shard in manifest.shards for entry in shard.files.values()]
    totals = manifest.totals
    held_out = read_manifest(shard_set.path / EVAL_DIR) if num_held_out(manifest) else None
    return {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer.name,
        "template": manifest.chat_template.name,
        "split_markers": manifest.chat_template.split_markers,
        "max_seq_len": manifest.max_seq_len,
        "shards": len(manifest.shards),
        "bytes": sum(files),
        "packs": totals.packs,
        "sequences": totals.sequences,
        "tokens": totals.tokens,
        "loss_tokens": totals.loss_tokens,
        "loss_share": _share(totals.loss_tokens, totals.tokens),
        "density": totals.density,
        "sequence_length": _spread(lengths),
        "sequences_per_pack": _spread(per_pack),
        "kinds": _kinds(shard_set),
        "held_out": _held_out(held_out) if held_out is not None else None,
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
    """Return the numbers as plain text tables."""
    found = stats(shard_set)
    lines = [
        (
            f"{found['name']}  {found['fingerprint'][:16]}  tokenizer {found['tokenizer']},"
            f" template {found['template']}"
        ),
        (
            f"{found['packs']:,} packs of {found['max_seq_len']:,} in {found['shards']} shards, "
            f"{found['bytes'] / 2**20:,.1f} MiB, density {found['density']:.2%}"
        ),
        (
            f"{found['tokens']:,} tokens, {found['loss_tokens']:,} of them trained"
            f" ({found['loss_share']:.1%}), in {found['sequences']:,} sequences"
        ),
        "",
    ]
    if found["split_markers"]:
        told = ", ".join(f"{marker} ({count})" for marker, count in found["split_markers"].items())
        lines[-1:] = [f"markers of the template that take several tokens: {told}", ""]
    if found["held_out"]:
        held = found["held_out"]
        lines[-1:] = [
            (
                f"held out in {EVAL_DIR}/: {held['packs']:,} packs, {held['tokens']:,} tokens,"
                f" {held['loss_tokens']:,} of them with loss, in {held['sequences']:,} sequences;"
                f" sft-prep stats {shard_set.path / EVAL_DIR}"
            ),
            "",
        ]
    lines += _table(
        ["", "mean", "min", *(f"p{p}" for p in _PERCENTILES), "max"],
        [[label, *_spread_cells(found[key])] for label, key in (
            ("tokens per sequence", "sequence_length"),
            ("sequences per pack", "sequences_per_pack"),
        )],
    )  # fmt: skip
    lines += ["", *_table(
        ["kind", "tokens", "share", "trained"],
        [[name, f"{kind['tokens']:,}", f"{_share(kind['tokens'], found['tokens']):.1%}",
          f"{kind['loss_tokens']:,}"]
         for name, kind in found["kinds"].items() if kind["tokens"]],
    )]  # fmt: skip
    columns = [
        "source",
        "format",
        "rows",
        "used",
        "rejected",
        "unrendered",
        "left out",
        "cut",
        "tokens",
        "trained",
        "loss share",
    ]
    rows = [[*_source_cells(source), f"{source['loss_share']:.1%}"] for source in found["sources"]]
    lines += ["", *_table(columns, rows)]
    return lines + list(_reason_lines(found["sources"]))


def _held_out(manifest: Manifest) -> dict[str, Any]:
    return {
        "fingerprint": manifest.fingerprint,
        "rows_used": {source.name: source.rows_used for source in manifest.sources},
        **config.to_plain(manifest.totals),
    }


def _source_cells(source: dict[str, Any]) -> list[str]:
    lost = [
        sum(source[key].values()) for key in ("rows_rejected", "rows_unrendered", "rows_dropped")
    ]
    numbers = [source["rows_read"], source["rows_used"], *lost, source["rows_truncated"]]
    return [
        source["name"],
        source["format"],
        *(f"{number:,}" for number in (*numbers, source["tokens"], source["loss_tokens"])),
    ]


def _reason_lines(sources: list[dict[str, Any]]) -> Iterator[str]:
    """Yield why rows are missing, source by source: nothing left out unsaid."""
    for source in sources:
        if source["epochs_used"] > 1:
            yield f"{source['name']}: used {source['epochs_used']:g} times"
        for key, word in (
            ("rows_rejected", "rejected"),
            ("rows_unrendered", "unrendered"),
            ("rows_dropped", "left out"),
        ):
            for reason, count in source[key].items():
                yield f"{source['name']}: {count:,} {word}: {reason}"


def _spread(values: npt.NDArray[np.int64]) -> dict[str, float]:
    if not len(values):
        return {}
    percentiles = np.percentile(values, _PERCENTILES, method="inverted_cdf")
    named = {f"p{p}": int(value) for p, value in zip(_PERCENTILES, percentiles, strict=True)}
    return {
        "mean": float(values.mean()),
        "min": int(values.min()),
        **named,
        "max": int(values.max()),
    }


def _spread_cells(spread: dict[str, float]) -> list[str]:
    return [
        f"{value:,.1f}" if name == "mean" else f"{value:,.0f}" for name, value in spread.items()
    ]


def _kinds(shard_set: ShardSet) -> dict[str, dict[str, int]]:
    """Return tokens and loss tokens of each kind."""
    tokens, trained = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for shard in shard_set.shards:
        for start in range(0, len(shard["kind"]), _BLOCK_TOKENS):
            kind = shard["kind"][start : start + _BLOCK_TOKENS] & KIND_MASK
            tokens += np.bincount(kind, minlength=256)
            trained += np.bincount(
                kind[shard["loss_mask"][start : start + _BLOCK_TOKENS] == 1], minlength=256
            )
    return {
        name: {"tokens": int(tokens[number]), "loss_tokens": int(trained[number])}
        for name, number in shard_set.manifest.kinds.items()
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
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
    return [line.rstrip() for line in capture.get().rstrip("\n").split("\n")]
