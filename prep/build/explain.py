"""`sft-prep explain`: field by field, why a shard set or a sample store that is there does or does
not match."""

from pathlib import Path
from typing import Any

from prep.build.request import BuildRequest, known_facts
from prep.inputs import Inputs, difference_lines, resolve_inputs
from prep.sources.detect_format import conversion_of
from prep.store.sample_store import is_complete, known_inputs, store_path
from shared.shard_reader import read_manifest


def explain(plan: BuildRequest) -> list[str]:
    """Return, line by line, what a build of `plan` would find and make. Nothing is tokenised or
    written."""
    inputs = resolve_inputs(plan.mixture, plan.base, known_facts(plan))
    return [*_set_lines(plan, inputs), *_store_lines(plan, inputs)]


def _set_lines(plan: BuildRequest, inputs: Inputs) -> list[str]:
    if not plan.out.exists():
        return [f"{plan.out} does not exist: a build would make it"]
    changed = inputs.differences(read_manifest(plan.out).inputs)
    if not changed:
        return [f"{plan.out} is up to date: every input is the same"]
    return [f"{plan.out} was made from other inputs:", *changed]


def _store_lines(plan: BuildRequest, inputs: Inputs) -> list[str]:
    known = known_inputs(plan.store)
    lines = []
    for source, entry in zip(inputs.sources, plan.mixture.sources, strict=True):
        conversion = conversion_of(source, entry, plan.store)
        # which backend a build would take is known only with the tokenizer loaded: samples of
        # either are samples
        asked = plan.mixture.tokenizer.backend
        backends = ("gigatoken", "transformers") if asked == "auto" else (asked,)
        wanted = [inputs.store_inputs(source, conversion, backend) for backend in backends]
        paths = [store_path(plan.store, tree) for tree in wanted]
        if any(map(is_complete, paths)):
            lines.append(f"samples of {source.name}: in {plan.store}, nothing to tokenise")
        elif begun := [path for path in paths if path in known]:
            lines.append(f"samples of {source.name}: begun in {begun[0]}, a build goes on there")
        else:
            lines += [
                f"samples of {source.name}: to be tokenised",
                *_nearest(wanted[0], known, plan.store),
            ]
    return lines


def _nearest(wanted: dict[str, Any], known: dict[Path, dict[str, Any]], store: Path) -> list[str]:
    """Return how the store that differs least differs, where one of the same source or settings is
    there."""
    related = {
        path: difference_lines(tree, wanted)
        for path, tree in known.items()
        if tree.get("source") == wanted["source"]
        or {**tree, "source": None} == {**wanted, "source": None}
    }
    if not related:
        return [f"  {store} has none of this source"]
    path = min(related, key=lambda path: (len(related[path]), path.name))
    return [f"  {path.name[:12]}... differs: {line}" for line in related[path]]
