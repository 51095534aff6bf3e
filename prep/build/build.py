"""`sft-prep build`: the stages, once each. An existing set is kept or refused, and replaced only
where that is asked for.

    resolve inputs -> tokenise sources -> select rows -> pack sequences -> write shards -> manifest

All of it happens in a directory beside the set, which is renamed last. What the mixture holds out
goes the same way into `eval/` in that directory, before the manifest.
"""

import logging
import platform
import time
from typing import Any

from prep.build.choose_encoder import check_compatibility
from prep.build.request import BuildRequest, known_facts
from prep.build.select import select
from prep.build.tokenise import encoder_for, tokenise_sources
from prep.inputs import Inputs, resolve_inputs
from prep.selection.eval_split import num_held_out
from prep.tokenization.at_inference import compare_with_inference
from prep.tokenization.tokenizer import load_tokenizer
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
    """Make the shard set, or return the manifest of an existing one that has the same inputs.

    Raises ArtifactError where a set made from other inputs is in the way, unless `rebuild` is set.
    """
    out = request.out
    replaceable_set.place_of(out)
    # The lock lies beside the set, because a rebuild renames the directory itself.
    lock = out.parent / f".{out.name}.lock"
    with writing_to(out), atomic.exclusive_lock(lock, f"building {out}"):
        replaceable_set.clear(out)
        # Refuse what may not be replaced now, and not after hours of work.
        if rebuild or (out.is_symlink() and not out.exists()):
            replaceable_set.check_replaceable(out)
        inputs = resolve_inputs(request.mixture, request.base, known_facts(request))
        if rebuild or replaceable_set.is_free(out):
            return _build(request, inputs)
        manifest = read_manifest(out)
        if changed := inputs.differences(manifest.inputs):
            raise ArtifactError(
                f"{out} was made from other inputs: {'; '.join(changed)}. Give another --out, or"
                " --rebuild to replace it"
            )
        if num_held_out(manifest):
            read_manifest(out / EVAL_DIR)  # raises where the eval set was removed
        logger.info("%s is up to date (%s)", out, manifest.fingerprint[:16])
        return manifest


def _build(request: BuildRequest, inputs: Inputs) -> Manifest:
    stage_ends = {"started": time.monotonic()}
    mixture = inputs.mixture
    loaded = load_tokenizer(inputs.tokenizer, mixture.tokenizer.add_tokens)
    split_markers = check_compatibility(inputs, loaded)
    # What transformers loads for the base model does not have the tokens that the mixture adds.
    of_model = load_tokenizer(inputs.tokenizer) if loaded.new_ids else loaded
    at_inference = compare_with_inference(inputs.tokenizer, of_model)
    spec, encoder = encoder_for(inputs, loaded)
    sources = tokenise_sources(
        inputs, spec, store=request.store, workers=request.workers, scheduler=request.scheduler
    )
    # From here on only integers move, and no tokenizer is called.
    stage_ends["tokenise"] = time.monotonic()
    selections = select(request, inputs, sources)
    packed = pack_sequences(selections.train, mixture.max_seq_len)
    stage_ends["pack"] = time.monotonic()
    vocabulary = Vocabulary(loaded, encoder, split_markers)
    with atomic.staged_dir(request.out, remove_old=replaceable_set.remove) as staging:
        if selections.num_held_out:
            # The eval set is whole before the set that it belongs to.
            eval_dir = staging / EVAL_DIR
            eval_dir.mkdir()
            eval_packed = pack_sequences(selections.held_out, mixture.max_seq_len)
            eval_manifest = write_set(
                eval_dir, inputs.of_eval_set(), vocabulary, selections.held_out, eval_packed
            )
            atomic.write_json(eval_dir / MANIFEST_NAME, sealed(eval_manifest))
        manifest = write_set(staging, inputs, vocabulary, selections.train, packed)
        write_rejects(staging, selections.train)
        stage_ends["write"] = time.monotonic()
        info = {
            **_build_info(request, inputs, encoder.spec.backend, stage_ends),
            "tokenizer_at_inference": at_inference,
        }
        atomic.write_json(staging / BUILD_INFO_NAME, info)
        # The manifest comes last: a directory that has one is a whole set.
        atomic.write_json(staging / MANIFEST_NAME, sealed(manifest))
    return manifest


def _build_info(
    request: BuildRequest, inputs: Inputs, backend: str, stage_ends: dict[str, float]
) -> dict[str, Any]:
    """Return what is worth knowing of a build but decides nothing; `stage_ends` are in order."""
    ends = list(stage_ends.values())
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": inputs.tree["versions"],
        "workers": request.workers,
        "backend": backend,
        "seconds": {
            stage: round(end - start, 3)
            for stage, start, end in zip(list(stage_ends)[1:], ends, ends[1:], strict=False)
        },
        "known": inputs.known_hashes(),
    }
