"""`sft-prep build`: the stages, once each; an existing set is left alone or refused, never replaced
by surprise.

    resolve inputs -> tokenise sources -> select rows -> pack sequences -> write shards -> manifest

All of it happens in a directory beside the set, which is renamed last; what the mixture holds out
goes the same way into `eval/` in that directory, before the manifest.
"""

import logging
import platform
import time
from pathlib import Path
from typing import Any

from prep.build.choose_encoder import check_fit
from prep.build.request import BuildRequest, known_facts
from prep.build.select import select
from prep.build.tokenise import encoder_for, tokenise_sources
from prep.inputs import Inputs, resolve_inputs
from prep.selection.eval_split import num_held_out
from prep.selection.source import SelectedSource
from prep.tokenization.at_inference import compare_with_inference
from prep.tokenization.tokenizer import LoadedTokenizer, load_tokenizer
from prep.writing import replaceable_set
from prep.writing.rejects import write_rejects
from prep.writing.shard_set import Vocabulary, pack_sequences, write_set
from shared import atomic
from shared.disk import writing_to
from shared.errors import ArtifactError
from shared.shard_format import BUILD_INFO_NAME, EVAL_DIR, MANIFEST_NAME, Manifest, sealed
from shared.shard_reader import read_manifest

logger = logging.getLogger(__name__)


def build(request: BuildRequest, *, rebuild: bool) -> Manifest:
    """Make the shard set, or return the manifest of the one that is there if its inputs are these.

    Raises ArtifactError where a set made from other inputs is in the way, unless `rebuild` is set.
    """
    out = request.out
    replaceable_set.place_of(out)
    lock = out.parent / f".{out.name}.lock"
    with writing_to(out), atomic.exclusive_lock(lock, f"building {out}"):
        replaceable_set.clear(out)
        if rebuild or (out.is_symlink() and not out.exists()):
            replaceable_set.check_replaceable(out)
        inputs = resolve_inputs(request.mixture, request.base, known_facts(request))
        if not replaceable_set.is_free(out) and not rebuild:
            manifest = _existing(out, inputs)
            logger.info("%s is up to date (%s)", out, manifest.fingerprint[:16])
            return manifest
        return _build(request, inputs)


def _existing(out: Path, inputs: Inputs) -> Manifest:
    manifest = read_manifest(out)
    changed = inputs.differences(manifest.inputs)
    if changed:
        raise ArtifactError(
            f"{out} was made from other inputs: {'; '.join(changed)}. Give another --out, or"
            " --rebuild to replace it"
        )
    if num_held_out(manifest):
        read_manifest(out / EVAL_DIR)  # it may have been removed
    return manifest


def _build(request: BuildRequest, inputs: Inputs) -> Manifest:
    seconds = {"began": time.monotonic()}
    loaded = load_tokenizer(inputs.tokenizer, inputs.mixture.tokenizer.add_tokens)
    split_markers = check_fit(inputs, loaded)
    at_inference = _at_inference(inputs, loaded)
    spec, encoder = encoder_for(inputs, loaded)
    sources = tokenise_sources(
        inputs, spec, store=request.store, workers=request.workers, scheduler=request.scheduler
    )
    seconds["tokenise"] = time.monotonic()
    selections = select(request, inputs, sources)
    packed = pack_sequences(selections.train, inputs.mixture.max_seq_len)
    seconds["pack"] = time.monotonic()
    vocabulary = Vocabulary(loaded, encoder, split_markers)
    with atomic.staged_dir(request.out, remove_old=replaceable_set.remove) as staging:
        if selections.num_held_out:
            _write_eval_set(staging / EVAL_DIR, inputs, vocabulary, selections.held_out)
        manifest = write_set(staging, inputs, vocabulary, selections.train, packed)
        write_rejects(staging, selections.train)
        seconds["write"] = time.monotonic()
        info = _build_info(request, inputs, encoder.spec.backend, seconds)
        atomic.write_json(
            staging / BUILD_INFO_NAME, {**info, "tokenizer_at_inference": at_inference}
        )
        atomic.write_json(staging / MANIFEST_NAME, sealed(manifest))
    return manifest


def _at_inference(inputs: Inputs, loaded: LoadedTokenizer) -> dict[str, Any]:
    """Return how transformers loads the base model's tokenizer, without tokens that the mixture
    adds."""
    of_model = load_tokenizer(inputs.tokenizer) if loaded.new_ids else loaded
    return compare_with_inference(inputs.tokenizer, of_model)


def _write_eval_set(
    out: Path, inputs: Inputs, vocabulary: Vocabulary, sources: list[SelectedSource]
) -> None:
    """Write the rows that are held out as a set of their own."""
    out.mkdir()
    packed = pack_sequences(sources, inputs.mixture.max_seq_len)
    manifest = write_set(out, inputs.of_eval_set(), vocabulary, sources, packed)
    atomic.write_json(out / MANIFEST_NAME, sealed(manifest))


def _build_info(
    request: BuildRequest, inputs: Inputs, backend: str, times: dict[str, float]
) -> dict[str, Any]:
    """Return what is worth knowing of a build and decides nothing; `times` are the ends of its
    stages, in order."""
    names, ends = list(times), list(times.values())
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": inputs.tree["versions"],
        "workers": request.workers,
        "backend": backend,
        "seconds": {
            name: round(end - start, 3)
            for name, start, end in zip(names[1:], ends, ends[1:], strict=False)
        },
        "known": inputs.memory(),
    }
