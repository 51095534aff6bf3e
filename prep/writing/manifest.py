"""What is counted, listed and said of a build: budgets, the rejects file, the manifest."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.inputs import Inputs
from prep.selection.eval_split import num_held_out
from prep.selection.mixture import Selections
from prep.selection.sequences import Selection
from prep.store.source_counts import Tally
from prep.tokenization.encoder import Encoder
from prep.tokenization.tokenizer import CANARY_TEXT, LoadedTokenizer
from prep.writing.columns import Assembled
from shared.errors import DataError
from shared.shard_format import (
    EVAL_DIR,
    FORMAT_VERSION,
    OTHER_PARTS,
    REJECTS_NAME,
    FileEntry,
    Kind,
    Manifest,
    SourceEntry,
    TemplateEntry,
    TokenizerEntry,
    Totals,
    fingerprint_of,
)
from shared.shard_reader import read_manifest

_EXAMPLES = 5
_FAR = 0.25  # of the fraction to hold out

logger = logging.getLogger(__name__)


def check_budgets(inputs: Inputs, tallies: list[Tally]) -> None:
    """Raise DataError, with reasons and examples, where more rows are lost than the mixture
    allows."""
    rows = sum(tally.rows for tally in tallies)
    policy = inputs.mixture.rows
    rejects = [
        (s.name, *r)
        for s, tally in zip(inputs.sources, tallies, strict=True)
        for r in tally.rejects
    ]
    if len(rejects) > policy.reject_budget * rows:
        reasons = Counter(f"{name}: {reason}" for name, _, reason, _ in rejects)
        raise DataError(
            f"{len(rejects):,} of {rows:,} rows are malformed or unverifiable, more than"
            f" rows.reject_budget = {policy.reject_budget} allows. {_table(reasons)}. For example:"
            f" {'; '.join(detail for *_, detail in rejects[:_EXAMPLES])}"
        )
    lost = [
        (s.name, *u)
        for s, tally in zip(inputs.sources, tallies, strict=True)
        for u in tally.uncarried
    ]
    if len(lost) > policy.max_uncarried * rows:
        reasons = Counter(f"{name}: {reason}" for name, _, reason in lost)
        raise DataError(
            f"{len(lost):,} of {rows:,} rows hold something that the template"
            f" {inputs.template.name!r} would drop, more than rows.max_uncarried ="
            f" {policy.max_uncarried} allows. {_table(reasons)}. Use a template that carries them"
        )


def check_selections(inputs: Inputs, selections: Selections, tallies: list[Tally]) -> None:
    """Raise DataError where nothing is left to train on; warn where nothing is held out although it
    is asked for."""
    fraction, names = (
        inputs.mixture.eval.fraction,
        ", ".join(source.name for source in inputs.sources),
    )
    if not any(len(selection.sequences) for selection in selections.train):
        if selections.num_held_out:
            raise DataError(
                f"every prompt of {names} is held out by eval.fraction = {fraction}; give a smaller"
                " fraction"
            )
        reasons = Counter(
            reason for tally in tallies for _, reason, *_ in [*tally.rejects, *tally.uncarried]
        )
        for selection in selections.train:
            reasons += selection.dropped
        del reasons[OTHER_PARTS]
        why = (
            ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
            or "there is none"
        )
        first = next(
            (f"; the first: {detail}" for tally in tallies for *_, detail in tally.rejects), ""
        )
        raise DataError(
            f"no row of {names} can be used ({why}{first}); look at the rows, at max_seq_len, at"
            " the template and at lengths.min_loss_tokens"
        )
    if selections.num_held_out:
        _say_held_out(fraction, selections)
    if fraction and not selections.num_held_out:
        logger.warning(
            "eval.fraction = %s holds none of the prompts of %s out: there are too few; there is no"
            " eval set",
            fraction,
            names,
        )


def _say_held_out(fraction: float, selections: Selections) -> None:
    """Say how many prompts are held out; warn where prompts or their rows are far from the share
    that is asked for."""
    prompts, rows = selections.prompts, selections.rows
    text = f"eval.fraction = {fraction} holds out {prompts.held_out:,} of {prompts.total:,} prompts"
    text += (
        f" ({prompts.share:.1%}) with {rows.held_out:,} of {rows.total:,} rows ({rows.share:.1%})"
    )
    if abs(prompts.share - fraction) > fraction * _FAR:
        logger.warning(
            "%s: prompts are drawn by hash, and of so few the share varies; another seed draws"
            " others",
            text,
        )
    elif abs(rows.share - fraction) > fraction * _FAR:
        logger.warning("%s: a prompt is held out with all its rows, and some have many", text)
    else:
        logger.info("%s", text)


def write_rejects(
    out: Path, inputs: Inputs, tallies: list[Tally], selections: list[Selection]
) -> None:
    """List every row that was left out or cut: one JSON object a line, by source and row,
    zstd-compressed."""
    import zstandard

    lines = []
    for source, tally, selection in zip(inputs.sources, tallies, selections, strict=True):
        events = [(row, reason, detail) for row, reason, detail in tally.rejects]
        events += [(row, "uncarried", reason) for row, reason in tally.uncarried]
        events += selection.listed
        for row, reason, detail in sorted(events):
            event = {"source": source.name, "row": row, "reason": reason, "detail": detail}
            lines.append(json.dumps(event, sort_keys=True, ensure_ascii=False) + "\n")
    (out / REJECTS_NAME).write_bytes(zstandard.compress("".join(lines).encode("utf-8", "replace")))


def make_manifest(
    inputs: Inputs,
    loaded: LoadedTokenizer,
    encoder: Encoder,
    tokenizer_files: dict[str, FileEntry],
    assembled: Assembled,
    tallies: list[Tally],
    selections: list[Selection],
    split_markers: dict[str, int],
) -> Manifest:
    """Return the manifest of a set whose shards are written."""
    mixture = inputs.mixture
    totals = {
        key: sum(getattr(shard, key) for shard in assembled.shards)
        for key in ("packs", "sequences", "tokens", "loss_tokens")
    }
    return Manifest(
        format_version=FORMAT_VERSION,
        name=mixture.name,
        fingerprint=fingerprint_of(
            max_seq_len=mixture.max_seq_len,
            tokenizer_files=tokenizer_files,
            template_sha256=inputs.template.sha256,
            source_names=[source.name for source in inputs.sources],
            shards=assembled.shards,
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
                sorted(assembled.terminators, key=lambda i: (-assembled.terminators[i], i))
            ),
            canary_ids=tuple(encoder.ids_of(CANARY_TEXT)),
            new_ids=loaded.new_ids,
        ),
        chat_template=TemplateEntry(
            name=inputs.template.name, sha256=inputs.template.sha256, split_markers=split_markers
        ),
        kinds={kind.name.lower(): int(kind) for kind in Kind},
        max_seq_len=mixture.max_seq_len,
        max_token_id=assembled.max_token_id,
        sources=tuple(
            _source_entry(inputs, index, tally, selection, int(assembled.loss_tokens[index]))
            for index, (tally, selection) in enumerate(zip(tallies, selections, strict=True))
        ),
        totals=Totals(density=totals["tokens"] / (totals["packs"] * mixture.max_seq_len), **totals),
        shards=tuple(assembled.shards),
    )


def summary_lines(manifest: Manifest, out: Path) -> list[str]:
    """Return what a build says at its end: the set, then a line for each source, nothing left out
    unsaid.

    What is held out of the set follows in the same way.
    """
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
        left_out |= {f"uncarried ({k})": v for k, v in source.rows_uncarried.items()}
        left_out |= {
            f"left out ({k})": v for k, v in source.rows_dropped.items() if k != OTHER_PARTS
        }
        left_out |= {"truncated": source.rows_truncated} if source.rows_truncated else {}
        left_out |= (
            {"without terminator": source.rows_without_terminator}
            if source.rows_without_terminator
            else {}
        )
        notes = "".join(f"; {what} {count:,}" for what, count in left_out.items())
        calls = source.details.get("calls_not_json", 0)
        notes += (
            f"; arguments that are no JSON object, printed as they are: {calls:,} tool calls"
            if calls
            else ""
        )
        form, epochs = (
            source.details.get("format", "messages"),
            source.details.get("epochs_used", 1.0),
        )
        notes += f"; used {epochs:g} times" if epochs > 1 else ""
        notes += f"; format {form}" if form != "messages" else ""
        lines.append(
            f"  {source.name}: {source.rows_used:,} of {source.own_rows:,} rows, {source.tokens:,}"
            f" tokens, {source.loss_tokens:,} loss tokens{notes}"
        )
    return lines + held_out


def _held_out_line(manifest: Manifest, evaluation: Manifest) -> str:
    """Return what share is held out: the fraction asked is one of prompts, each with all its
    rows."""
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


def _source_entry(
    inputs: Inputs, index: int, tally: Tally, selection: Selection, loss_tokens: int
) -> SourceEntry:
    source, asked = inputs.sources[index], inputs.mixture.sources[index]
    used = selection.sequences
    _, first = np.unique(used["row"], return_index=True)  # a repeated row counts once
    rows = used[first]
    cut_short = rows["length"] < rows["full_length"]
    is_split = inputs.mixture.lengths.over_length == "split"
    return SourceEntry(
        name=source.name,
        hub_id=source.hub_id,
        revision=source.revision,
        content_sha256=source.content_sha256,
        rows_read=tally.rows,
        rows_used=len(rows),
        rows_rejected=_counts(reason for _, reason, _ in tally.rejects),
        rows_uncarried=_counts(reason for _, reason in tally.uncarried),
        rows_dropped=dict(sorted(selection.dropped.items())),
        rows_truncated=0 if is_split else int(cut_short.sum()),
        rows_without_terminator=int((~_last_of_each_row(used)["terminated"]).sum()),
        tokens=int(used["length"].sum(dtype=np.int64)),
        loss_tokens=loss_tokens,
        details={
            **({"part_of": source.part_of, "split_by": asked.split_by} if source.part_of else {}),
            "format": tally.conversion.format,
            "columns": dict(tally.conversion.columns),
            "sequences": len(used),
            "epochs_used": round(selection.epochs_used, 6),
            "fraction": asked.fraction,
            "rows": asked.rows,
            "epochs": selection.epochs_asked,
            "rows_by_hand": tally.rows_by_hand,
            "rows_refereed": tally.rows_refereed,
            "rows_audited": tally.rows_audited,
            "rows_split": int(cut_short.sum()) if is_split else 0,
            "messages_dropped": tally.messages_dropped,
            "messages_untrained": tally.messages_untrained,
            "calls_not_json": tally.calls_not_json,
        },
    )


def _last_of_each_row(sequences: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Return of each row the sequence that holds its end, or the latest there is."""
    ordered = sequences[np.lexsort((sequences["first"], sequences["row"]))]
    last: npt.NDArray[np.void] = ordered[
        np.append(np.diff(ordered["row"]) > 0, True)[: len(ordered)]
    ]
    return last


def _counts(reasons: Any) -> dict[str, int]:
    return dict(sorted(Counter(reasons).items()))


def _table(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
