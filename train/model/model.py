"""The model: a Hugging Face causal LM, loaded or random, in a module whose forward pass returns the
loss.

`forward` computes the loss because ZeRO-3 gathers the weight of the LM head there. Logits exist
only for the positions that have a loss.
"""

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from shared.errors import ArtifactError, ConfigError, one_line
from shared.shard_format import Manifest
from train.config import LoraConfig, ModelConfig
from train.data.micro_batch import MicroBatch
from train.model.lora import add_adapters, quantization
from train.model.loss import weighted_cross_entropy
from train.model.new_tokens import add_new_rows, head_weight
from train.model.rotary import separate_rotary
from train.model.router_loss import experts_per_token, load_balancing_loss
from train.model.source_loss import add_rows
from train.model.tiled_mlp import tile_mlps

logger = logging.getLogger(__name__)

# Changes that models of transformers make to their logits after the head, none of them supported.
_LOGIT_CHANGES = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "output_multiplier_scale",
    "dim_model_base",
)
NO_LORA = LoraConfig()
# What configs, constructors and forward passes of transformers raise.
CANNOT_BUILD = (
    *(ValueError, TypeError, AttributeError, RuntimeError, LookupError, ArithmeticError),
    *(NotImplementedError, AssertionError, ImportError, StrictDataclassError),
)
_LAYER_KEYS = ("layer_types", "layers_block_type", "block_types", "_block_types")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}


class LossModel(torch.nn.Module):
    """A causal LM whose forward pass returns the weighted loss of a micro-batch, fp32 []."""

    def __init__(self, model: PreTrainedModel, *, balancing_weight: float = 0.0) -> None:
        super().__init__()
        self.balancing_weight = balancing_weight
        self.router_top_k = experts_per_token(model.config) if balancing_weight else 0
        self.model = model
        self.logit_scale = logit_scale(model.config)
        self.row = separate_rotary(model)

    def forward(
        self,
        batch: MicroBatch,
        source_totals: torch.Tensor | None = None,
        balancing: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss; add the rows' cross-entropies and their number to `source_totals`
        (train/model/source_loss.py).

        The load balancing loss (train/model/router_loss.py) counts by the micro-batch's share of
        the step's tokens. It is added to the loss with its weight, and to `balancing`, fp32 [1],
        without it.
        """
        if self.row is not None:
            self.row.first = batch.first
        outputs = self.model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            # with a cache transformers would build a mask that lets sequences see each other
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
            **({"output_router_logits": True} if self.balancing_weight else {}),
        )
        # Only rows with a loss go through the head: 4,096 tokens x 128k logits take 2 GB in fp32.
        hidden = outputs.last_hidden_state[0].index_select(0, batch.rows)  # [N, D] -> [R, D]
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        head = head_weight(self.model)  # [V, D], gathered here under ZeRO-3
        row_losses = torch.empty(len(batch.rows), dtype=torch.float32, device=hidden.device)
        loss = weighted_cross_entropy(
            hidden,
            head,
            batch.targets,
            batch.weights,
            uniform=batch.uniform_weight,
            row_losses=row_losses,
        )
        if source_totals is not None:
            add_rows(source_totals, batch.row_sources, row_losses)
        # Evaluation reports the cross-entropy alone.
        if self.balancing_weight and torch.is_grad_enabled():
            imbalance = batch.token_share * load_balancing_loss(
                outputs.router_logits, top_k=self.router_top_k
            )
            loss = loss + self.balancing_weight * imbalance
            if balancing is not None:
                balancing += imbalance.detach()
        return loss


def build_model(
    model: ModelConfig,
    manifest: Manifest,
    *,
    attention: str,
    dtype: torch.dtype,
    seed: int,
    lora: LoraConfig = NO_LORA,
    balancing_weight: float = 0.0,
) -> LossModel:
    """Return the model in training mode, checked against the shard set of `manifest`.

    Under ZeRO-3 the caller keeps an HfDeepSpeedConfig alive during the call, so that weights are
    sharded as they are created. Raises ConfigError or ArtifactError.
    """
    config = model_config(model, manifest)
    # Random weights must be the same on every rank.
    torch.manual_seed(seed)
    if model.config is not None:
        try:
            network = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=dtype
            )
        except torch.OutOfMemoryError:
            raise
        except CANNOT_BUILD as exc:
            raise ConfigError(
                f"model.config cannot be built: {type(exc).__name__}: {one_line(exc)}"
            ) from exc
        _check_parameters(network)
    else:
        network = _load_weights(
            model, config, attention=attention, dtype=dtype, quantization=quantization(lora, dtype)
        )
    check_head(network)
    # Random weights have rows for all tokens of the shards already.
    new_ids = manifest.tokenizer.new_ids if model.config is None else ()
    if new_ids:
        logger.info(
            "embedding and LM head get new rows for the tokens that the mixture added, ids %s",
            list(new_ids),
        )
    if lora.is_on:
        add_adapters(network, lora, seed=seed)
        if new_ids:
            add_new_rows(network, new_ids, seed=seed)
    elif config.vocab_size <= max((manifest.max_token_id, *new_ids)):
        network.resize_token_embeddings(manifest.tokenizer.vocab_size, mean_resizing=False)
    if model.mlp_tiles > 1:
        tile_mlps(network, model.mlp_tiles)
    if model.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return LossModel(network, balancing_weight=balancing_weight).train()


def model_config(model: ModelConfig, manifest: Manifest) -> PretrainedConfig:
    """Return the transformers config of the model.

    Raises ConfigError for a model that cannot be trained or does not fit the shard set, and
    ArtifactError for one that cannot be read.
    """
    tokenizer = manifest.tokenizer
    config = network_config(
        model,
        max_seq_len=manifest.max_seq_len,
        from_shards={
            "vocab_size": max(tokenizer.vocab_size, manifest.max_token_id + 1),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    new_ids = tokenizer.new_ids
    # Room for all tokens but those that the mixture added, which get new rows.
    has_room = bool(new_ids) and config.vocab_size >= new_ids[0]
    if config.vocab_size <= manifest.max_token_id and not model.resize_vocab and not has_room:
        raise ConfigError(
            f"the model has {config.vocab_size} tokens, but the shards hold token"
            f" {manifest.max_token_id}: they were built with another tokenizer"
            f" ({manifest.tokenizer.name}). Tokens that the mixture adds (tokenizer.add_tokens) get"
            " new rows automatically; for a tokenizer that came with added tokens, set"
            " model.resize_vocab = true (without [lora])"
        )
    return config


def network_config(
    model: ModelConfig, *, max_seq_len: int, from_shards: Mapping[str, int | None]
) -> PretrainedConfig:
    """Return the transformers config of the model, for sequences of up to `max_seq_len` tokens.

    `from_shards`: values for keys that a [model.config] table omits. Raises ConfigError for a model
    that cannot be trained, and ArtifactError for one that cannot be read.
    """
    if model.config is not None:
        config = _config_from_table(model.config, max_seq_len, from_shards)
    elif model.name:
        try:
            config = AutoConfig.from_pretrained(
                model.name, revision=model.revision, trust_remote_code=False
            )
        except (OSError, *CANNOT_BUILD) as exc:
            where = "" if Path(model.name).is_dir() else "no such directory, and not on the hub: "
            raise ArtifactError(
                f"cannot read the model {model.name!r}: {where}{one_line(exc)}"
            ) from exc
        assert isinstance(config, PretrainedConfig)
    else:
        raise ConfigError(
            "no model: give --model NAME|DIR, or set model.name or [model.config] in the recipe"
        )
    check_supported(config)
    limit = _get(config, "max_position_embeddings")
    if isinstance(limit, int) and limit < max_seq_len:
        raise ConfigError(
            f"the model takes {limit} positions (max_position_embeddings), but the shards have"
            f" sequences of up to {max_seq_len}; build them with max_seq_len = {limit}, or"
            " use another model"
        )
    return config


def check_supported(config: PretrainedConfig) -> None:
    """Raise ConfigError for a model whose packed loss would differ from the loss of its sequences
    alone."""
    name = config.model_type
    for key in _LOGIT_CHANGES:
        if _get(config, key) not in (None, 1, 1.0):
            raise ConfigError(
                f"model type {name!r} changes its logits ({key} = {_get(config, key)}), which"
                " training does not support; use another model"
            )
    layers = {kind for key in _LAYER_KEYS for kind in _get(config, key) or ()}
    if foreign := sorted(layers - _ATTENTION_LAYERS):
        raise ConfigError(
            f"model type {name!r} has layers of type {', '.join(foreign)}, which pass state from"
            " one sequence of a pack to the next; use a model with attention layers only"
        )
    if config.is_encoder_decoder:
        raise ConfigError(f"model type {name!r} has an encoder; expected a causal LM")
    # A multimodal config holds the config of its text model.
    text = config.get_text_config(decoder=True)
    if text is not config or not isinstance(getattr(config, "vocab_size", None), int):
        raise ConfigError(
            f"model type {name!r} holds several models ({', '.join(config.sub_configs)}); expected"
            f" a causal LM alone, such as one of type {text.model_type!r}"
        )
    heads, key_heads = (
        getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")
    )
    if (
        isinstance(heads, int)
        and isinstance(key_heads, int)
        and (key_heads < 1 or heads < 1 or heads % key_heads)
    ):
        raise ConfigError(
            f"the model has {heads} attention heads (num_attention_heads) and {key_heads} key heads"
            " (num_key_value_heads); the number of key heads must divide the number of heads"
        )
    network_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if network_class is None:
        raise ConfigError(
            f"model type {name!r} has no causal LM in transformers; use another model"
        )
    if not network_class._supports_attention_backend:
        raise ConfigError(
            f"model type {name!r} does not let its attention be replaced, so sequences of a pack"
            " would see each other; use another model"
        )


def check_head(network: PreTrainedModel) -> None:
    """Raise ConfigError unless the LM head is a plain matrix."""
    name = network.config.model_type
    head = network.get_output_embeddings()
    if (
        not isinstance(head, torch.nn.Linear)
        or head.bias is not None
        or network.base_model is network
    ):
        raise ConfigError(
            f"model type {name!r} has no plain LM head (a linear layer without bias); use another"
            " model"
        )


def logit_scale(config: PretrainedConfig) -> float:
    """Return the factor from head(hidden) to the logits: Granite divides, Cohere multiplies."""
    divisor, factor = _get(config, "logits_scaling"), _get(config, "logit_scale")
    return float(factor or 1.0) / float(divisor or 1.0)


def _config_from_table(
    table: dict[str, Any], max_seq_len: int, from_shards: Mapping[str, int | None]
) -> PretrainedConfig:
    """Return the config of a [model.config] table. Keys that it omits follow from the shards:
    vocabulary, special ids, longest sequence."""
    values = dict(table)
    model_type = values.pop("model_type", None)
    try:
        plain = AutoConfig.for_model(model_type)
    except (ValueError, KeyError, AttributeError) as exc:
        raise ConfigError(
            f"model.config.model_type = {model_type!r} is not a model type of transformers"
        ) from exc
    except StrictDataclassError as exc:
        # The defaults of the type alone are not a valid config.
        raise ConfigError(
            f"model type {model_type!r} cannot be built from a table: {one_line(exc)}"
        ) from exc
    defaults = plain.to_dict()
    # Many types read head_dim, few declare it.
    known = {*defaults, *plain.attribute_map, "head_dim"}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"unknown key 'model.config.{key}' for model type {model_type!r}{hint}"
            )
    derived = {
        **from_shards,
        "max_position_embeddings": max(
            int(defaults.get("max_position_embeddings") or 0), max_seq_len
        ),
        # Nothing is padded, and torch would never train the embedding of a padding token.
        "pad_token_id": None,
    }
    try:
        config = AutoConfig.for_model(model_type, **{**derived, **values})
    except CANNOT_BUILD as exc:
        raise ConfigError(
            f"model.config is not a valid {model_type!r} config: {one_line(exc)}"
        ) from exc
    assert isinstance(config, PretrainedConfig)
    return config


def _load_weights(
    model: ModelConfig,
    config: PretrainedConfig,
    *,
    attention: str,
    dtype: torch.dtype,
    quantization: Any,
) -> PreTrainedModel:
    try:
        network, loading = AutoModelForCausalLM.from_pretrained(
            model.name,
            config=config,
            revision=model.revision,
            trust_remote_code=False,
            attn_implementation=attention,
            dtype=dtype,
            quantization_config=quantization,
            output_loading_info=True,
        )
    except (OSError, *CANNOT_BUILD) as exc:
        raise ArtifactError(f"cannot load the model {model.name!r}: {one_line(exc)}") from exc
    wrong = sorted(loading["missing_keys"]) or sorted(map(str, loading["mismatched_keys"]))
    if wrong:
        raise ArtifactError(
            f"the weights of {model.name!r} lack or contradict {len(wrong)} parameters of its"
            f" config, such as {wrong[0]}, which would start random; use complete weights"
        )
    assert isinstance(network, PreTrainedModel)
    _check_parameters(network)
    return network


def _check_parameters(network: PreTrainedModel) -> None:
    """Raise ArtifactError for weights that are not finite, ConfigError for empty ones.

    Under ZeRO-3 a rank checks its share. This reads the weights once; a step does so many times.
    """
    for name, parameter in network.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if 0 in shape:
            raise ConfigError(
                f"the model's parameter {name} has the shape {list(shape)}; expected no side of 0"
            )
        # A sum in fp64 of finite numbers is finite, so one pass without a mask is enough.
        share = getattr(parameter, "ds_tensor", parameter).detach()
        if share.is_floating_point() and not torch.isfinite(share.sum(dtype=torch.float64)):
            count = int((~torch.isfinite(share)).sum())
            raise ArtifactError(
                f"the weights of {network.config.name_or_path!r} hold {count} numbers that are not"
                f" finite in {name}, as loaded; expected none: use intact weights"
            )


def _get(config: PretrainedConfig, key: str) -> Any:
    """Return the value of a key that only some model types have."""
    return config.to_dict().get(key)
