"""What a build prints at its end: the set, then each source, with every row that was left out."""

from pathlib import Path

from prep.selection.eval_split import num_held_out
from shared.shard_format import EVAL_DIR, OTHER_GROUPS, Manifest
from shared.shard_reader import read_manifest


def summary_lines(manifest: Manifest, out: Path) -> list[str]:
    """Return a line for the set and one for each source, then the same for its evaluation set."""
    totals = manifest.totals
    lines = [
        (
            f"{out}: {totals.packs:,} packs of {manifest.max_seq_len:,}, {totals.sequences:,}"
            f" sequences, {totals.tokens:,} tokens, {totals.loss_tokens:,} loss tokens, density"
            f" {totals.density:.2%}"
        ),
        f"fingerprint {manifest.fingerprint}",
    ]
    for source in manifest.sources:
        left_out = {
            **{f"rejected ({k})": rows for k, rows in source.rows_rejected.items()},
            **{f"unrendered ({k})": rows for k, rows in source.rows_unrendered.items()},
            **{f"left out ({k})": rows for k, rows in source.rows_dropped.items()},
            "truncated": source.rows_truncated,
            "without terminator": source.rows_without_terminator,
        }
        # What a split source gives to its other groups is not left out of this one.
        left_out.pop(f"left out ({OTHER_GROUPS})", None)
        notes = "".join(f"; {what} {count:,}" for what, count in left_out.items() if count)
        if calls := source.details.get("calls_not_json", 0):
            notes += (
                f"; arguments that are no JSON object, printed as they are: {calls:,} tool calls"
            )
        if (epochs := source.details.get("epochs_used", 1.0)) > 1:
            notes += f"; used {epochs:g} times"
        if (format_name := source.details.get("format", "messages")) != "messages":
            notes += f"; format {format_name}"
        lines.append(
            f"  {source.name}: {source.rows_used:,} of {source.own_rows:,} rows, {source.tokens:,}"
            f" tokens, {source.loss_tokens:,} loss tokens{notes}"
        )
    if num_held_out(manifest):
        # eval.fraction is one of prompts, each with all its rows: say what that is in rows.
        evaluation = read_manifest(out / EVAL_DIR)
        tokens = evaluation.totals.tokens
        rows = sum(source.rows_used for source in evaluation.sources)
        usable = rows + sum(
            source.rows_used + source.rows_dropped.get("not_chosen", 0)
            for source in manifest.sources
        )
        lines.append(
            f"held out by eval.fraction = {manifest.config['eval']['fraction']} of the prompts:"
            f" {rows:,} of {usable:,} usable rows ({rows / usable:.1%}),"
            f" {tokens / (tokens + totals.tokens):.1%} of the tokens"
        )
        lines += summary_lines(evaluation, out / EVAL_DIR)
    return lines
