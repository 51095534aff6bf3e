"""The keys of a recipe: how `sft-train` trains. Derived values are elsewhere; train/recipe_file.py
reads the files."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.errors import ConfigError

# The largest count: more is a typing error, and would not fit in memory.
_MOST = 2**31 - 1
_MOST_NAME = 100


def _check_range(
    name: str, value: float | None, low: float, high: float, *, above: bool = False
) -> None:
    """Raise ConfigError unless `value` is None or from `low` to `high`; `above` excludes `low`."""
    if value is None or ((low < value if above else low <= value) and value <= high):
        return
    if above:
        raise ConfigError(f"{name} = {value}; expected more than {low:g}, at most {high:g}")
    raise ConfigError(f"{name} = {value}; expected {low:g} or more, at most {high:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    name: str = ""
    """Hub id or directory of a Hugging Face causal LM. Empty when `config` describes a new one."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    config: dict[str, Any] | None = None
    """A model with random weights: `model_type` and the keys of its transformers config."""
    attention: Literal["auto", "per_sequence", "flash", "varlen"] = "auto"
    """Kernel that keeps the sequences of a pack apart; `auto` is the fastest one on the device."""
    gradient_checkpointing: bool = False
    """Recompute the activations of each layer in the backward pass: less memory, about a third more
    time."""
    mlp_tiles: int = 1
    """Number of parts of a row in which feed-forward layers run, for long rows: less memory, a
    little more time."""
    resize_vocab: bool = False
    """Enlarge the embedding if the shards hold ids that the model does not have, instead of an
    error. Tokens that the mixture added (tokenizer.add_tokens) do not need it."""
    check_tokenizer: bool = True
    """Refuse shards whose tokenizer gives other ids than the tokenizer.json beside the model's
    weights."""

    def __post_init__(self) -> None:
        # Each tile costs two calls of every layer.
        _check_range("mlp_tiles", self.mlp_tiles, 1, 64)
        if not self.revision.strip():
            raise ConfigError(
                f"revision = {self.revision!r}; expected a branch, tag or commit, such as 'main'"
            )
        try:
            json.dumps(self.config, allow_nan=False)
        except (ValueError, TypeError) as exc:
            # The run writes its recipe as JSON.
            raise ConfigError(
                f"config = {self.config!r:.200}; expected finite numbers, text, lists and tables"
                " only"
            ) from exc
        if "\0" in self.name or "\0" in self.revision:
            raise ConfigError(
                f"name = {self.name!r}, revision = {self.revision!r}; expected text without NUL"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW. Weight decay applies to matrices only, not to norms and biases."""

    learning_rate: float
    """The peak rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay, times the learning rate."""
    max_grad_norm: float = 1.0
    """Limit of the global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        _check_range("learning_rate", self.learning_rate, 0.0, 100.0, above=True)
        _check_range("eps", self.eps, 0.0, 1.0, above=True)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas = {list(self.betas)}; expected two numbers from 0 to below 1")
        _check_range("weight_decay", self.weight_decay, 0.0, 1e9)
        _check_range("max_grad_norm", self.max_grad_norm, 0.0, 1e9)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    kind: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate goes on after the warm-up: straight or by half a cosine to 0, or not at all."""
    warmup_ratio: float = 0.03
    """Warm-up steps = ceil(warmup_ratio x total steps)."""
    epochs: float = 1.0
    """Passes over the shard set; the last step may be smaller."""
    max_steps: int | None = None
    """Total number of steps; overrides `epochs`."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise ConfigError(
                f"warmup_ratio = {self.warmup_ratio}; expected a fraction from 0 to 1"
            )
        _check_range("epochs", self.epochs, 0.0, 1e6, above=True)
        _check_range("max_steps", self.max_steps, 1, _MOST)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Exactly one of the first three sets the size of a step; gradient accumulation follows."""

    packs_per_step: int | None = None
    """Packs per optimiser step over all ranks."""
    tokens_per_step: int | None = None
    """The same in tokens: a multiple of the shards' max_seq_len."""
    conversations_per_step: int | None = None
    """Conversations per optimiser step, exactly; they are packed within the step, and any number of
    ranks works."""
    packs_per_micro_batch: int = 1
    """Packs, or rows of max_seq_len tokens, of one forward and backward pass on one rank. Changes
    memory and speed, never the gradient."""

    def __post_init__(self) -> None:
        sizes = ("packs_per_step", "tokens_per_step", "conversations_per_step")
        keys = [name for name in sizes if getattr(self, name) is not None]
        if len(keys) != 1:
            raise ConfigError(
                f"set one of {sizes[0]}, {sizes[1]} and {sizes[2]}; found"
                f" {' and '.join(keys) or 'none'}. To replace the table of a recipe: --set"
                " 'batch={conversations_per_step=128}'"
            )
        for name in (*sizes, "packs_per_micro_batch"):
            _check_range(name, getattr(self, name), 1, _MOST)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    norm: Literal["token", "sample", "sum"] = "token"
    """`token`: mean over the loss tokens of the step. `sample`: mean over its conversations of
    their means. `sum`: sum over its loss tokens, divided by `divisor`."""
    divisor: float = 1.0
    """Divides `sum`: for a trainer that sums over tokens and divides by ranks x accumulation, the
    conversations per step. It sets the scale on which `optim.max_grad_norm` clips."""

    load_balancing_weight: float = 0.0
    """Weight of the auxiliary loss that keeps the experts of a mixture-of-experts model evenly used
    (train/model/router_loss.py). Unlike the rest of the loss it depends on the split into
    micro-batches, since shares are counted within each of them."""

    def __post_init__(self) -> None:
        _check_range("load_balancing_weight", self.load_balancing_weight, 0.0, 1e6)
        _check_range("divisor", self.divisor, 0.0, 1e30, above=True)
        if self.divisor != 1.0 and self.norm != "sum":
            raise ConfigError(
                f"divisor = {self.divisor} with norm = {self.norm!r}; only norm = 'sum' has one"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """What DeepSpeed shards over the ranks: nothing (0), optimizer state (1), gradients too (2),
    weights too (3). `auto` is 3 for two ranks or more, and 0 for one, where sharding costs time and
    memory and saves neither."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of weights and activations; `auto` is bf16 on a GPU and fp32 on a CPU. Master weights
    and sums are fp32."""
    sequence_parallel: int = 1
    """Ranks that share each row, for rows longer than one GPU can hold (Ulysses); a divisor of the
    model's heads."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where master weights and moments are held and updates computed: less GPU memory, slower
    steps."""
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Where the shards of the weights are held until a layer needs them; stage 3 only."""
    nvme_path: str = ""
    """Directory on a fast local disk for state that is offloaded to "nvme"."""
    hpz_partition_size: int = 1
    """ZeRO++: the number of ranks (those of a node) that share a second copy of the weights for the
    backward pass; stage 3 only."""
    quantized_weights: bool = False
    """ZeRO++: gather weights in 8 bits; stage 3 on GPUs only. It changes results a little."""
    quantized_gradients: bool = False
    """ZeRO++: reduce gradients in 4 bits; stage 3 on GPUs only. It changes results a little."""

    def __post_init__(self) -> None:
        for name in ("sequence_parallel", "hpz_partition_size"):
            _check_range(name, getattr(self, name), 1, _MOST)
        on_disk = "nvme" in (self.offload_optimizer, self.offload_params)
        if on_disk != bool(self.nvme_path):
            raise ConfigError(
                f"nvme_path = {self.nvme_path!r:.200} with offload_optimizer ="
                f" {self.offload_optimizer!r} and offload_params = {self.offload_params!r};"
                " expected a path if one of them is nvme, else none"
            )
        if self.zero_stage not in ("auto", 3) and (keys := self.stage_3_keys()):
            raise ConfigError(
                f"{', '.join(keys)} with zero_stage = {self.zero_stage}; expected zero_stage = 3"
            )
        if self.zero_stage == 0 and self.offload_optimizer != "none":
            raise ConfigError(
                "offload_optimizer with zero_stage = 0; expected one of the stages 1 to 3"
            )

    def stage_3_keys(self) -> list[str]:
        """Return the keys with a value that needs ZeRO stage 3."""
        needs_stage_3 = {
            "offload_params": self.offload_params != "none",
            "hpz_partition_size": self.hpz_partition_size > 1,
            "quantized_weights": self.quantized_weights,
            "quantized_gradients": self.quantized_gradients,
        }
        return [key for key, is_on in needs_stage_3.items() if is_on]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Train low-rank adapters beside frozen weights (LoRA); a rank of 0 trains the weights
    themselves."""

    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves."""
    alpha: float = 16.0
    """The product of an adapter's matrices is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as "q_proj"; empty for all. The LM head
    never gets one."""
    quantize: Literal["none", "nf4"] = "none"
    """Hold the frozen weights in 4 bits (QLoRA); needs bitsandbytes and engine.zero_stage below
    3."""
    export: Literal["merged", "adapter"] = "merged"
    """`merged`: a whole model. `adapter`: the adapters alone, which peft loads beside the base
    model."""

    def __post_init__(self) -> None:
        _check_range("rank", self.rank, 0, 65536)
        _check_range("alpha", self.alpha, 0.0, 1e6, above=True)
        if not all(target.strip() for target in self.targets):
            raise ConfigError(
                f"targets = {list(self.targets)}; expected names of linear layers, none empty"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout = {self.dropout}; expected a fraction from 0 to below 1")
        if not self.rank and (
            self.targets or self.dropout or self.quantize != "none" or self.export != "merged"
        ):
            raise ConfigError(
                "the table sets how to train adapters, but rank = 0 trains none; set lora.rank"
            )

    @property
    def is_on(self) -> bool:
        return self.rank > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: int = 500
    """A checkpoint is also written at the last step and when the run is asked to stop."""
    keep_last: int = 3
    """Older checkpoints are removed, but never the newest whole one nor the best one."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            _check_range(name, getattr(self, name), 1, _MOST)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """How to evaluate if there is an evaluation set: --eval-shards, or the one inside the shard
    set."""

    every_steps: int = 0
    """Steps between evaluations; 0 evaluates at every scheduled checkpoint. The last step is always
    evaluated."""
    max_packs: int = 0
    """Number of packs to evaluate, the same sample each time; 0 evaluates all."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "max_packs"):
            _check_range(name, getattr(self, name), 0, _MOST)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    every_steps: int = 1
    """Steps per logged line; the host waits for the device once per line."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Log to Weights & Biases: to its server, or to files for `wandb sync`."""
    wandb_project: str = "sft"
    """Its project."""
    wandb_name: str = ""
    """Default: the name of the run directory."""
    spike_sigma: float = 6.0
    """A loss this many deviations above the recent median is reported with its rows
    (RUN/spikes.jsonl); 0 reports none."""

    def __post_init__(self) -> None:
        _check_range("every_steps", self.every_steps, 1, _MOST)
        _check_range("spike_sigma", self.spike_sigma, 0.0, 1e6)
        if not self.wandb_project.strip():
            raise ConfigError(f"wandb_project = {self.wandb_project!r}; expected a name")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    seed: int = 0
    """Seed of the data order, of random weights and of dropout."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """At a step whose loss or gradient is not finite: stop before the update, or skip the step and
    continue."""
    max_skipped: int = 10
    """Number of steps that `skip` may skip in the whole run; at the next one the run stops."""
    hang_timeout_minutes: float = 30.0
    """If no step ends for this long, each rank writes its stacks to RUN/stacks and the run ends."""

    def __post_init__(self) -> None:
        _check_range("seed", self.seed, -(2**63), 2**63 - 1)
        _check_range("max_skipped", self.max_skipped, 0, _MOST)
        _check_range("hang_timeout_minutes", self.hang_timeout_minutes, 0.0, 100_000, above=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    name: str
    """The recipe's name, up to 100 printable characters; part of the default run directory."""
    optim: OptimConfig
    batch: BatchConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not self.name.isprintable() or len(self.name) > _MOST_NAME or not self.name.strip():
            raise ConfigError(
                f"name = {self.name[:_MOST_NAME]!r}; expected up to {_MOST_NAME} printable"
                " characters"
            )
        if "/" in self.name or self.name.startswith("."):
            raise ConfigError(
                f"name = {self.name!r}; expected a plain file name, since it becomes runs/NAME"
            )
        if self.model.config is not None and self.model.name:
            raise ConfigError("model.name and model.config are both set; keep one of them")
        if self.lora.is_on and (self.model.config is not None or self.model.resize_vocab):
            raise ConfigError(
                "[lora] needs existing weights: use model.name (--model NAME|DIR), without"
                " model.config and model.resize_vocab"
            )
