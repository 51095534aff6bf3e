"""What a build prints at its end: the set, then each source, with all that was left out."""

from pathlib import Path

from prep.selection.eval_split import num_held_out
from shared.shard_format import EVAL_DIR, OTHER_GROUPS, Manifest
from shared.shard_reader import read_manifest


def summary_lines(manifest: Manifest, out: Path) -> list[str]:
    """Return a line for the set and one for each source; the evaluation set, if there is one,
    follows in the same way."""
    held_out: list[str] = []
    if num_held_out(manifest):
        evaluation = read_manifest(out / EVAL_DIR)
        held_out = [
            _held_out_line(manifest, evaluation),
            *summary_lines(evaluation, out / EVAL_DIR),
        ]
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
        left_out = {f"rejected ({k})": v for k, v in source.rows_rejected.items()}
        left_out |= {f"unrendered ({k})": v for k, v in source.rows_unrendered.items()}
        left_out |= {
            f"left out ({k})": v for k, v in source.rows_dropped.items() if k != OTHER_GROUPS
        }
        left_out |= {"truncated": source.rows_truncated} if source.rows_truncated else {}
        left_out |= (
            {"without terminator": source.rows_without_terminator}
            if source.rows_without_terminator
            else {}
        )
        notes = "".join(f"; {what} {count:,}" for what, count in left_out.items())
        if calls := source.details.get("calls_not_json", 0):
            notes += (
                f"; arguments that are no JSON object, printed as they are: {calls:,} tool calls"
            )
        form = source.details.get("format", "messages")
        epochs = source.details.get("epochs_used", 1.0)
        notes += f"; used {epochs:g} times" if epochs > 1 else ""
        notes += f"; format {form}" if form != "messages" else ""
        lines.append(
            f"  {source.name}: {source.rows_used:,} of {source.own_rows:,} rows, {source.tokens:,}"
            f" tokens, {source.loss_tokens:,} loss tokens{notes}"
        )
    return lines + held_out


def _held_out_line(manifest: Manifest, evaluation: Manifest) -> str:
    """Return what share is held out: eval.fraction is one of prompts, each with all its rows."""
    fraction = manifest.config["eval"]["fraction"]
    rows = sum(source.rows_used for source in evaluation.sources)
    kept = sum(
        source.rows_used + source.rows_dropped.get("not_chosen", 0) for source in manifest.sources
    )
    tokens = evaluation.totals.tokens
    return (
        f"held out by eval.fraction = {fraction} of the prompts: {rows:,} of {rows + kept:,} usable"
        f" rows ({rows / (rows + kept):.1%}), {tokens / (tokens + manifest.totals.tokens):.1%} of"
        " the tokens"
    )
