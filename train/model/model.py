"""The model: a Hugging Face causal LM, loaded or random, inside a module whose forward pass returns
the loss.

The loss is computed inside `forward` because under ZeRO-3 that is where the LM head's weight can be
gathered. The logits of a row exist only for the positions that carry loss.
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

# what models of transformers do to their logits besides the head; only the first two are linear and
# handled
_LOGIT_CHANGES = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "output_multiplier_scale",
    "dim_model_base",
)
NO_LORA = LoraConfig()
CANNOT_BUILD = (
    *(
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        LookupError,
        ArithmeticError,
        NotImplementedError,
    ),
    *(AssertionError, ImportError, StrictDataclassError),
)
"""What configs, constructors and forward passes of transformers fail with."""
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

        A load balancing loss (train/model/router_loss.py) is added with its weight, in the share of
        the step's tokens that are here; `balancing`, fp32 [1], gets it added without its weight.
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
        hidden = outputs.last_hidden_state[0]  # [N, D]
        hidden = hidden.index_select(0, batch.rows)  # [R, D]
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
    """Return the model to train, in training mode, checked against the shard set that it is to be
    trained on.

    Under ZeRO-3 the caller keeps an HfDeepSpeedConfig alive meanwhile, so that weights are sharded
    as they are made. Raises ConfigError or ArtifactError.
    """
    config = model_config(model, manifest)
    torch.manual_seed(seed)
    if model.config is not None:
        network = _random_weights(config, attention=attention, dtype=dtype)
    else:
        network = _load_weights(
            model, config, attention=attention, dtype=dtype, quantization=quantization(lora, dtype)
        )
    check_head(network)
    new_ids = manifest.tokenizer.new_ids if model.config is None else ()
    if new_ids:
        logger.info(
            "new rows of embedding and LM head for the tokens that the mixture added, ids %s",
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

    Raises ConfigError for one that cannot be trained or does not fit the shard set.
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
    has_room = (
        bool(new_ids) and config.vocab_size >= new_ids[0]
    )  # for all but what the mixture added
    if config.vocab_size <= manifest.max_token_id and not model.resize_vocab and not has_room:
        raise ConfigError(
            f"the model knows {config.vocab_size} tokens, the shards hold token"
            f" {manifest.max_token_id}: they were made with another tokenizer"
            f" ({manifest.tokenizer.name}). Tokens that the mixture adds to the model's own"
            " (tokenizer.add_tokens) are grown by themselves; for a tokenizer that came with"
            " tokens added, set model.resize_vocab = true (without [lora])"
        )
    return config


def network_config(
    model: ModelConfig, *, max_seq_len: int, from_shards: Mapping[str, int | None]
) -> PretrainedConfig:
    """Return the transformers config of the model, for sequences of up to `max_seq_len` tokens.

    `from_shards` are keys that a table leaves out where the shards decide them. Raises ConfigError
    for a model that cannot be trained.
    """
    if model.config is not None:
        config = _config_from_table(model.config, max_seq_len, from_shards)
    elif model.name:
        config = _config_of_pretrained(model)
    else:
        raise ConfigError(
            "no model: give --model NAME|DIR, or set model.name or [model.config] in the recipe"
        )
    check_supported(config)
    limit = _get(config, "max_position_embeddings")
    if isinstance(limit, int) and limit < max_seq_len:
        raise ConfigError(
            f"the model takes {limit} positions (max_position_embeddings), the shards have"
            f" sequences of up to {max_seq_len}; build them with max_seq_len = {limit} or"
            " use another model"
        )
    return config


def check_supported(config: PretrainedConfig) -> None:
    """Raise ConfigError for a model whose packed loss would not be the loss of its sequences
    alone."""
    name = config.model_type
    for key in _LOGIT_CHANGES:
        if _get(config, key) not in (None, 1, 1.0):
            raise ConfigError(
                f"model type {name!r} changes its logits ({key} = {_get(config, key)}); not"
                " supported yet"
            )
    layers = {kind for key in _LAYER_KEYS for kind in _get(config, key) or ()}
    if foreign := sorted(layers - _ATTENTION_LAYERS):
        raise ConfigError(
            f"model type {name!r} has layers of type {', '.join(foreign)}, which carry state from"
            " one sequence of a pack into the next; use a model with attention layers only"
        )
    if config.is_encoder_decoder:
        raise ConfigError(f"model type {name!r} has an encoder; expected a causal LM")
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
            " (num_key_value_heads); expected a number of key heads that divides that of heads"
        )
    network_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if network_class is None:
        raise ConfigError(
            f"model type {name!r} has no causal LM in transformers; use another model"
        )
    if not network_class._supports_attention_backend:
        raise ConfigError(
            f"model type {name!r} does not let its attention be replaced, so sequences of a pack"
            " would see each other"
        )


def check_head(network: PreTrainedModel) -> None:
    """Raise ConfigError unless logits are head(hidden) with a plain matrix ."""
    name = network.config.model_type
    head = network.get_output_embeddings()
    if (
        not isinstance(head, torch.nn.Linear)
        or head.bias is not None
        or network.base_model is network
    ):
        raise ConfigError(
            f"model type {name!r} has no plain LM head (a linear layer without bias); not"
            " supported yet"
        )


def logit_scale(config: PretrainedConfig) -> float:
    """Return the factor between head(hidden) and the logits of the model: Granite divides, Cohere
    multiplies."""
    divisor, factor = _get(config, "logits_scaling"), _get(config, "logit_scale")
    return float(factor or 1.0) / float(divisor or 1.0)


def _config_from_table(
    table: dict[str, Any], max_seq_len: int, from_shards: Mapping[str, int | None]
) -> PretrainedConfig:
    """What the table leaves out follows from the shards: vocabulary, special ids, longest
    sequence."""
    values = dict(table)
    model_type = values.pop("model_type", None)
    try:
        plain = AutoConfig.for_model(model_type)
    except (ValueError, KeyError, AttributeError) as exc:
        raise ConfigError(
            f"model.config.model_type = {model_type!r} is not a model type of transformers"
        ) from exc
    except StrictDataclassError as exc:  # its own defaults do not make a whole
        raise ConfigError(
            f"model type {model_type!r} cannot be made from a table: {one_line(exc)}"
        ) from exc
    defaults = plain.to_dict()
    known = {
        *defaults,
        *plain.attribute_map,
        "head_dim",
    }  # the last is read by many and declared by few
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
        "pad_token_id": (
            None
        ),  # nothing is padded, and torch would never train the embedding of that token
    }
    try:
        config = AutoConfig.for_model(model_type, **{**derived, **values})
    except CANNOT_BUILD as exc:
        raise ConfigError(
            f"model.config is not a valid {model_type!r} config: {one_line(exc)}"
        ) from exc
    assert isinstance(config, PretrainedConfig)
    return config


def _random_weights(
    config: PretrainedConfig, *, attention: str, dtype: torch.dtype
) -> PreTrainedModel:
    try:
        network = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=dtype
        )
    except CANNOT_BUILD as exc:
        if isinstance(exc, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f"model.config cannot be built: {type(exc).__name__}: {one_line(exc)}"
        ) from exc
    _check_parameters(network)
    assert isinstance(network, PreTrainedModel)
    return network


def _config_of_pretrained(model: ModelConfig) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=False
        )
    except (OSError, *CANNOT_BUILD) as exc:
        where = (
            "" if Path(model.name).is_dir() else "there is no such directory, and not on the hub: "
        )
        raise ArtifactError(
            f"cannot read the model {model.name!r}: {where}{one_line(exc)}"
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
    missing = sorted(loading["missing_keys"])
    if missing or loading["mismatched_keys"]:
        wrong = missing or sorted(str(key) for key in loading["mismatched_keys"])
        raise ArtifactError(
            f"the weights of {model.name!r} lack or contradict {len(wrong)} parameters of its"
            f" config, e.g. {wrong[0]}; they would start random"
        )
    assert isinstance(network, PreTrainedModel)
    _check_parameters(network)
    return network


def _check_parameters(network: PreTrainedModel) -> None:
    """Raise ArtifactError for weights that are not finite, ConfigError for a model without room for
    any.

    Under ZeRO-3 a rank looks at its share. One pass over the weights, which a step makes many
    times.
    """
    for name, parameter in network.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if 0 in shape:
            raise ConfigError(
                f"the model's parameter {name} has the shape {list(shape)}; expected no side of 0"
            )
        here = getattr(parameter, "ds_tensor", parameter).detach()
        if here.is_floating_point() and not torch.isfinite(here.sum(dtype=torch.float64)):
            count = int((~torch.isfinite(here)).sum())
            raise ArtifactError(
                f"the weights of {network.config.name_or_path!r} hold {count} numbers that are not"
                f" finite in {name}, as they were loaded; expected none: use weights that are whole"
            )


def _get(config: PretrainedConfig, key: str) -> Any:
    """The value of a key that only some model types have."""
    return config.to_dict().get(key)
