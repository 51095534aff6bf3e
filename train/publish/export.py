"""A trained model as a directory that transformers loads: weights, tokenizer, chat template,
generation config, card.

The directory is whole or absent: it is staged beside its place, loaded once, and renamed.
"""

import contextlib
import filecmp
import itertools
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from shared import atomic
from shared.config import build
from shared.disk import library_writing_to
from shared.errors import ArtifactError, ConfigError, FingerprintMismatchError
from shared.hashing import canonical_json
from shared.shard_format import TokenizerEntry
from shared.shard_reader import ShardSet, open_shard_set
from train.config import TrainConfig
from train.engine.engine import WEIGHTS_PREFIX
from train.model.lora import Adapted, adapted_by, adapter_weights, merged_model, write_adapter
from train.publish.model_card import PLOT_NAME, CardFacts, card_facts, render_card
from train.run.checkpoint_layout import (
    ENGINE_DIR,
    ENGINE_TAG,
    MODEL_DIR,
    RUN_NAME,
    check_digest,
    read_state_file,
)
from train.run.directory import RunDir
from train.run.records import read_records

logger = logging.getLogger(__name__)

# DeepSpeed's name for the weights where every rank has them whole
WHOLE_WEIGHTS_NAME = "mp_rank_00_model_states.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFiles:
    """How weights are written."""

    dtype: Literal["trained", "bf16", "fp32"] = "trained"
    max_file_size: str = "5GB"
    """More weights than this go into several files with an index, as transformers counts sizes:
    500MB, 5GB."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*[KMG]i?B", self.max_file_size):
            raise ConfigError(
                f"--max-file-size {self.max_file_size!r}; expected a number and a unit: 500MB, 5GB"
            )


AS_TRAINED = WeightFiles()


def export_model(
    *,
    state_dict: dict[str, torch.Tensor],
    model_config: PretrainedConfig,
    shard_set: ShardSet,
    card: CardFacts,
    out_dir: Path,
    adapted: Adapted | None = None,
    plot: Path | None = None,
    files: WeightFiles = AS_TRAINED,
    replace: bool = False,
) -> None:
    """Write the model to `out_dir`; one process calls it, with the full weights.

    With `replace` it replaces what is there; files that the new export does not hold again, byte
    for byte, are kept in `NAME-old-NUMBER` beside it. Where a model was `adapted`, `state_dict`
    holds its adapters only. Raises ArtifactError, with `out_dir` unchanged, if the weights do not
    fill the model that the config describes.
    """
    staging = _replacing(out_dir) if replace else atomic.staged_dir(out_dir)
    with staging as staged, library_writing_to(out_dir.parent):
        _write_tokenizer(staged, shard_set)
        (staged / "README.md").write_text(
            render_card(card, has_plot=plot is not None), encoding="utf-8"
        )
        if plot is not None:
            shutil.copyfile(plot, staged / PLOT_NAME)
        new_ids = shard_set.manifest.tokenizer.new_ids
        if adapted is not None and adapted.lora.export == "adapter":
            trained = adapter_weights(state_dict)
            write_adapter(staged, trained, lora=adapted.lora, model=adapted.model, new_ids=new_ids)
            if new_ids:
                logger.info(
                    "%s holds rows for tokens %s: before peft loads it, resize the base model's"
                    " embedding to %d",
                    out_dir,
                    list(new_ids),
                    shard_set.manifest.tokenizer.vocab_size,
                )
        else:
            if adapted is not None:
                trained = adapter_weights(state_dict)
                state_dict, model_config = merged_model(
                    adapted.model, adapted.lora, trained, new_ids=new_ids
                )
            generation = generation_config(shard_set.manifest.tokenizer)
            _write_weights(staged, state_dict, model_config, generation, files)
        # safetensors makes files that only their owner can read
        for file in staged.iterdir():
            file.chmod((staged / "README.md").stat().st_mode)


def export_checkpoint(checkpoint_dir: Path, out_dir: Path, files: WeightFiles = AS_TRAINED) -> None:
    """Write the model of a checkpoint to `out_dir`, which must not exist. Needs the shard set at
    the path where the run had it.

    Raises ArtifactError for a checkpoint that is not whole or has changed, and for another shard
    set at that path.
    """
    if os.path.lexists(out_dir):
        raise ArtifactError(f"{out_dir} exists; give a path that does not, or remove it")
    state = read_state_file(checkpoint_dir)
    for name, entry in state["files"].items():
        check_digest(checkpoint_dir, name, entry)
    description = json.loads((checkpoint_dir / RUN_NAME).read_bytes())
    recipe = build(TrainConfig, description["recipe"], str(checkpoint_dir / RUN_NAME))
    path, fingerprint = Path(description["shards"]["path"]), description["shards"]["fingerprint"]
    shard_set = open_shard_set(path)
    if shard_set.manifest.fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"{checkpoint_dir} was trained on shards with fingerprint {fingerprint[:16]}..., {path}"
            f" now has {shard_set.manifest.fingerprint[:16]}...; put the shard set back that it was"
            " trained on"
        )
    config = AutoConfig.from_pretrained(checkpoint_dir / MODEL_DIR)
    metrics = RunDir(checkpoint_dir.resolve().parent.parent).metrics
    records = read_records(metrics) if metrics.exists() else []
    records = [record for record in records if record["step"] <= state["step"]]
    export_model(
        state_dict=_offline_weights(
            checkpoint_dir, state, config.dtype or torch.float32, frozen_left_out=recipe.lora.is_on
        ),
        model_config=config,
        shard_set=shard_set,
        card=card_facts(description, shard_set.manifest, records),
        out_dir=out_dir,
        adapted=adapted_by(recipe),
        files=files,
    )


def _replacing(out_dir: Path) -> AbstractContextManager[Path]:
    """Yield a staged directory that will replace `out_dir`; old files that it does not hold again
    are kept."""
    numbered = (out_dir.with_name(f"{out_dir.name}-old-{number}") for number in itertools.count(1))
    old = next(path for path in numbered if not os.path.lexists(path))

    def remove_copies(old: Path) -> None:
        if old.is_dir() and not old.is_symlink():
            # children before their folders, so that a folder that has become empty goes too
            for path in [*sorted(old.rglob("*"), reverse=True), old]:
                new = out_dir / path.relative_to(old)
                if path.is_symlink():
                    continue
                if path.is_dir():
                    if new.is_dir() and not any(path.iterdir()):
                        path.rmdir()
                elif path.is_file() and new.is_file() and filecmp.cmp(path, new, shallow=False):
                    path.unlink()
        if os.path.lexists(old):
            logger.warning(
                "files of %s that are not the same in the new export are kept in %s", out_dir, old
            )

    return atomic.staged_dir(out_dir, remove_old=remove_copies, old=old)


def generation_config(tokenizer: TokenizerEntry) -> GenerationConfig:
    """Return a config of greedy generation that stops at every id that ended a trained turn, and at
    EOS."""
    ends = dict.fromkeys(tokenizer.terminator_ids)
    if tokenizer.eos_token_id is not None:
        ends[tokenizer.eos_token_id] = None
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends) or None,
        pad_token_id=_pad_token_id(tokenizer),
    )


def _pad_token_id(tokenizer: TokenizerEntry) -> int | None:
    """Return the id to pad batches of prompts with. Training never saw one, and the attention mask
    hides it."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.terminator_ids)
    return next((token_id for token_id in ids if token_id is not None), None)


def _write_tokenizer(staged: Path, shard_set: ShardSet) -> None:
    """Copy the tokenizer of the shard set; a pad token, where it has none, goes into its config
    only."""
    for name in shard_set.manifest.tokenizer.files:
        shutil.copyfile(shard_set.tokenizer_dir / name, staged / name)
    pad_token_id = _pad_token_id(shard_set.manifest.tokenizer)
    if shard_set.manifest.tokenizer.pad_token_id is None and pad_token_id is not None:
        file = staged / "tokenizer_config.json"
        settings = json.loads(file.read_bytes()) if file.exists() else {}
        # a token of the plain vocabulary cannot be told from text, so only an added one will do
        added = json.loads((staged / "tokenizer.json").read_bytes()).get("added_tokens", [])
        names = {entry["id"]: str(entry["content"]) for entry in added}
        settings["pad_token"] = names.get(pad_token_id)
        file.write_bytes(canonical_json(settings))


def _write_weights(
    staged: Path,
    state_dict: dict[str, torch.Tensor],
    config: PretrainedConfig,
    generation: GenerationConfig,
    files: WeightFiles,
) -> None:
    """Write the weights, then compare names and shapes as transformers does when it loads them."""
    if files.dtype != "trained":
        dtype = torch.bfloat16 if files.dtype == "bf16" else torch.float32
        state_dict = {
            name: t.to(dtype) if t.is_floating_point() else t for name, t in state_dict.items()
        }
    dtypes = Counter(tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point())
    config.dtype = dtypes.most_common(1)[0][0] if dtypes else torch.float32
    # a model without memory: it knows its parameters, its tied weights and how to save
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    tied = set(model.all_tied_weights_keys)
    weights = {name: tensor.contiguous() for name, tensor in state_dict.items() if name not in tied}
    needed = model.state_dict().keys() - tied
    if missing := sorted(needed - weights.keys()):
        raise ArtifactError(
            f"the weights lack {len(missing)} parameters of the model, e.g. {missing[0]}"
        )
    model.generation_config = generation
    model.save_pretrained(staged, state_dict=weights, max_shard_size=files.max_file_size)
    # on the meta device, so that the weights are not in memory a second time
    _, loading = AutoModelForCausalLM.from_pretrained(
        staged, device_map={"": "meta"}, dtype="auto", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in loading[kind]):
            raise ArtifactError(
                f"the export would load with {len(keys)} {kind.replace('_', ' ')}, e.g."
                f" {keys[0]}; nothing was kept"
            )


def _offline_weights(
    checkpoint_dir: Path, state: dict[str, Any], dtype: torch.dtype, *, frozen_left_out: bool
) -> dict[str, torch.Tensor]:
    """Return the full weights on one CPU, in the dtype that was trained."""
    weights: dict[str, torch.Tensor]
    if state["zero_stage"] == 3:
        # DeepSpeed puts the ranks' shares of the fp32 masters together; it prints while it is
        # imported and at work, but our stdout is for results
        with contextlib.redirect_stdout(sys.stderr):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            weights = get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint_dir / ENGINE_DIR),
                tag=ENGINE_TAG,
                exclude_frozen_parameters=frozen_left_out,
            )
    else:
        # every rank had them whole, and rank 0 wrote them; unpickled only after its digest matched
        file = checkpoint_dir / ENGINE_DIR / ENGINE_TAG / WHOLE_WEIGHTS_NAME
        weights = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
    return {
        name.removeprefix(WEIGHTS_PREFIX): (
            tensor.to(dtype) if tensor.is_floating_point() else tensor
        )
        for name, tensor in weights.items()
    }
