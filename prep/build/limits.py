"""Limits of a build: it ends or warns where too few of its rows are left."""

import logging
from collections import Counter
from collections.abc import Sequence

from prep.config import MixtureConfig
from prep.selection.mixture import Selections
from prep.selection.source import Source
from shared.errors import DataError
from shared.shard_format import OTHER_GROUPS

_EXAMPLES = 5
_MAX_DEVIATION = 0.25  # of the fraction to hold out

logger = logging.getLogger(__name__)


def check_row(source: Source, mixture: MixtureConfig, template: str) -> None:
    """Raise DataError for a row of `source` that ends the build by the rules of the mixture."""
    counts = source.counts
    if mixture.rows.on_error == "stop" and counts.rejects:
        _, reason, detail = counts.rejects[0]
        raise DataError(
            f"{detail} ({reason}); correct the row, or leave such rows out with rows.on_error ="
            ' "skip"'
        )
    if mixture.rows.unknown == "error" and counts.unrendered:
        row, reason = counts.unrendered[0]
        raise DataError(
            f"source {source.name!r} row {row}: the template {template!r} does not render all of it"
            f' ({reason}); use one that does, or set rows.unknown = "leave_out"'
        )


def check_budgets(sources: Sequence[Source], mixture: MixtureConfig, template: str) -> None:
    """Raise DataError, with reasons and examples, where more rows are lost than the mixture
    allows."""
    rows, policy = sum(source.counts.rows for source in sources), mixture.rows
    rejects = [(source.name, *reject) for source in sources for reject in source.counts.rejects]
    if len(rejects) > policy.reject_budget * rows:
        reasons = Counter(f"{name}: {reason}" for name, _, reason, _ in rejects)
        raise DataError(
            f"{len(rejects):,} of {rows:,} rows are malformed or unverifiable, more than"
            f" rows.reject_budget = {policy.reject_budget} allows. {_in_words(reasons)}. For"
            f" example: {'; '.join(detail for *_, detail in rejects[:_EXAMPLES])}"
        )
    unrendered = [(source.name, *row) for source in sources for row in source.counts.unrendered]
    if len(unrendered) > policy.max_unrendered * rows:
        reasons = Counter(f"{name}: {reason}" for name, _, reason in unrendered)
        raise DataError(
            f"{len(unrendered):,} of {rows:,} rows hold something that the template {template!r}"
            f" would drop, more than rows.max_unrendered = {policy.max_unrendered} allows."
            f" {_in_words(reasons)}. Use a template that renders them"
        )


def check_selections(
    sources: Sequence[Source], selections: Selections, mixture: MixtureConfig
) -> None:
    """Raise DataError where nothing is left to train on.

    Warns where nothing, or far from the fraction of the mixture, is held out.
    """
    fraction, names = mixture.eval.fraction, ", ".join(source.name for source in sources)
    if not any(len(source.selection.sequences) for source in selections.train):
        if selections.num_held_out:
            raise DataError(
                f"every prompt of {names} is held out by eval.fraction = {fraction}; give a smaller"
                " fraction"
            )
        reasons = Counter(
            reason
            for source in sources
            for _, reason, *_ in [*source.counts.rejects, *source.counts.unrendered]
        )
        for source in selections.train:
            reasons += source.selection.dropped
        del reasons[OTHER_GROUPS]  # each row is counted in its own group
        why = ", ".join(f"{reason} {rows:,}" for reason, rows in reasons.most_common())
        rejects = (reject for source in sources for reject in source.counts.rejects)
        first = next((f"; the first: {detail}" for *_, detail in rejects), "")
        raise DataError(
            f"no row of {names} can be used ({why or 'there is none'}{first}); look at the rows, at"
            " max_seq_len, at the template and at lengths.min_loss_tokens"
        )
    if not fraction:
        return
    if not selections.num_held_out:
        logger.warning(
            "eval.fraction = %s holds none of the prompts of %s out: there are too few, so there is"
            " no eval set",
            fraction,
            names,
        )
        return
    prompts, rows = selections.prompts, selections.rows
    message = (
        f"eval.fraction = {fraction} holds out {prompts.held_out:,} of {prompts.total:,} prompts"
        f" ({prompts.share:.1%}) with {rows.held_out:,} of {rows.total:,} rows ({rows.share:.1%})"
    )
    if abs(prompts.share - fraction) > fraction * _MAX_DEVIATION:
        logger.warning(
            "%s: prompts are drawn by hash, and of so few the share varies; another seed draws"
            " others",
            message,
        )
    elif abs(rows.share - fraction) > fraction * _MAX_DEVIATION:
        logger.warning("%s: a prompt is held out with all its rows, and some have many", message)
    else:
        logger.info("%s", message)


def _in_words(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
