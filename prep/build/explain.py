"""`sft-prep explain`: field by field, why an existing shard set or sample store does or does not
match."""

from prep.build.request import BuildRequest, known_facts
from prep.inputs import difference_lines, resolve_inputs
from prep.sources.detect_format import conversion_of
from prep.store.sample_store import is_complete, known_inputs, store_path
from shared.shard_reader import read_manifest


def explain(request: BuildRequest) -> list[str]:
    """Return, line by line, what a build would find and make. Nothing is tokenised or written."""
    inputs = resolve_inputs(request.mixture, request.base, known_facts(request))
    if not request.out.exists():
        lines = [f"{request.out} does not exist: a build would make it"]
    elif changed := inputs.differences(read_manifest(request.out).inputs):
        lines = [f"{request.out} was made from other inputs:", *changed]
    else:
        lines = [f"{request.out} is up to date: every input is the same"]

    # Which backend "auto" takes is known only with the tokenizer loaded. Samples of either count.
    backend = request.mixture.tokenizer.backend
    backends = ("gigatoken", "transformers") if backend == "auto" else (backend,)
    stores = known_inputs(request.store)
    for source, config in zip(inputs.sources, request.mixture.sources, strict=True):
        conversion = conversion_of(source, config, request.store)
        trees = [inputs.store_inputs(source, conversion, backend) for backend in backends]
        paths = [store_path(request.store, tree) for tree in trees]
        if any(map(is_complete, paths)):
            lines.append(f"samples of {source.name}: in {request.store}, nothing to tokenise")
        elif begun := [path for path in paths if path in stores]:
            lines.append(f"samples of {source.name}: begun in {begun[0]}, a build resumes there")
        else:
            lines.append(f"samples of {source.name}: to be tokenised")
            # Say how the most similar store differs, if one has the same source or settings.
            tree = trees[0]
            related = {
                path: difference_lines(other, tree)
                for path, other in stores.items()
                if other.get("source") == tree["source"]
                or {**other, "source": None} == {**tree, "source": None}
            }
            if not related:
                lines.append(f"  {request.store} has none of this source")
                continue
            path = min(related, key=lambda path: (len(related[path]), path.name))
            lines += [f"  {path.name[:12]}... differs: {line}" for line in related[path]]
    return lines
