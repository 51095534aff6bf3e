"""How much memory a rank needs at its peak, by part: pure functions of counts.

tests/train/sizing/test_device_memory.py checks them to the byte where bytes can be counted,
tests/bench/bench_memory.py on processes.

State stays for the whole run; besides it there is either a backward pass, with the activations of
one micro-batch, or the update. Letters: P parameters, T those that train, W ranks, b bytes of a
weight (2 in bf16, 4 in fp32), N tokens of a micro-batch on one rank, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace

from train.sizing.model_size import ModelSize
from train.sizing.zero_stage import ZeroStage

GIB = 2**30

_BUCKET = 50_000_000  # elements; `reduce_bucket_size` of train/engine/engine.py
# elements; `stage3_max_live_parameters`, and DeepSpeed's default `sub_group_size`
_MAX_LIVE = 1_000_000_000
# bytes of a weight in 4 bits with its doubly quantised scales (Dettmers et al. 2023, section 3)
_QUANTIZED = 0.516
_CONTEXT = 2.0 * GIB  # CUDA context, kernels, NCCL: an allowance
_FRAGMENTED = 0.04  # of all else, lost between the blocks of torch's allocator: an allowance


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What besides the model decides on memory."""

    world_size: int
    zero_stage: ZeroStage
    weight_bytes: int
    tokens: int
    """Positions of a micro-batch on one rank: packs x max_seq_len, shared by `sequence_parallel`
    ranks."""
    micro_batches: int
    """Of one rank in a step."""
    gradient_checkpointing: bool
    mlp_tiles: int = 1
    quantized: bool = False
    optimizer_offloaded: bool = False
    params_offloaded: bool = False
    second_copy: int = 1
    """`hpz_partition_size` of ZeRO++: ranks that share out one more copy of the weights; 1 for
    none."""
    on_gpu: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    optimizer: float
    """Master weights in fp32, where the weights are not, and AdamW's two moments."""
    gradients: float
    activations: float
    """What the forward pass of a micro-batch keeps."""
    layer: float
    """The backward pass of one layer: what it computes again, and gradients of activations."""
    loss: float
    """Logits of some rows and the gradient of the LM head; over when the layers' backward passes
    begin."""
    communication: float
    """Gathered weights and buckets of gradients."""
    update: float
    """Copies that only the update makes."""
    reserve: float
    """An allowance: context, kernels, NCCL, fragmentation."""
    gradients_grow: bool
    """There is no gradient before the first backward pass: gradients come as activations go."""

    @property
    def state(self) -> float:
        return self.weights + self.optimizer + (0.0 if self.gradients_grow else self.gradients)

    @property
    def phases(self) -> dict[str, float]:
        """What the phases of a step need beside the state."""
        grown = self.gradients if self.gradients_grow else 0.0
        return {
            "loss": self.activations + self.loss + self.communication,
            "backward pass": max(self.activations, grown) + self.layer + self.communication,
            "update": self.update + grown,
        }

    @property
    def peak_in(self) -> str:
        phases = self.phases
        return max(phases, key=lambda name: phases[name])

    @property
    def total(self) -> float:
        return self.state + max(self.phases.values()) + self.reserve


def memory_of(size: ModelSize, setup: Setup) -> Memory:
    """Return the memory of one rank."""
    weights, optimizer, gradients, update = _state(size, setup)
    memory = Memory(
        weights=weights,
        optimizer=optimizer,
        gradients=gradients,
        activations=_activations(size, setup),
        layer=_layer(size, setup),
        loss=_loss(size, setup),
        communication=_communication(size, setup),
        update=update,
        reserve=0.0,
        gradients_grow=setup.zero_stage == 0 and setup.micro_batches == 1,
    )
    return (
        replace(memory, reserve=_CONTEXT + _FRAGMENTED * memory.total) if setup.on_gpu else memory
    )


def _state(size: ModelSize, setup: Setup) -> tuple[float, float, float, float]:
    """Return bytes of weights, optimizer and gradients, and what the update adds.

    One rank (train/engine/single_rank_adamw.py): b P weights, 4 T masters where b is 2, 8 T
    moments, 4 T gradients. ZeRO (Rajbhandari et al. 2020, section 5) keeps 12 T / W masters and
    moments, also beside fp32 weights, b P weights (b P / W in stage 3), and 4 T gradients, summed
    in fp32 (4 T / W from stage 2 on). Its update copies a rank's gradients, in stage 1 three times,
    in stage 3 a sub-group of them beside what stays gathered. What is offloaded lies on the host,
    from stage 2 on with its gradients.
    """
    own, trained, ranks, stage = (
        float(size.parameters),
        float(size.trained),
        setup.world_size,
        setup.zero_stage,
    )
    per_weight = float(setup.weight_bytes)
    frozen = _QUANTIZED if setup.quantized else per_weight
    weights = frozen * (own - trained) + per_weight * trained
    if stage == 0:
        masters = 4.0 * trained if setup.weight_bytes < 4 else 0.0
        return weights, masters + 8.0 * trained, 4.0 * trained, 0.0
    optimizer = 0.0 if setup.optimizer_offloaded else 12.0 * trained / ranks
    gradients = 4.0 * trained / (ranks if stage > 1 else 1)
    update = (12.0 if stage == 1 else 4.0) * trained / ranks
    if stage == 3:
        update = 4.0 * min(trained / ranks, _MAX_LIVE) + _resident(size, setup)
        copy = weights / setup.second_copy if setup.second_copy > 1 else 0.0
        weights = copy + (0.0 if setup.params_offloaded else weights / ranks)
    if setup.optimizer_offloaded:
        return weights, optimizer, gradients if stage == 1 else 0.0, 0.0
    return weights, optimizer, gradients, update


def _activations(size: ModelSize, setup: Setup) -> float:
    """Return what the forward pass keeps: of each layer all that autograd saves, or its input
    alone."""
    kept = (
        _layer_input(size, setup) if setup.gradient_checkpointing else _kept_by_layer(size, setup)
    )
    return setup.tokens * (size.num_layers * kept + size.other_bytes)


def _layer(size: ModelSize, setup: Setup) -> float:
    """Return what the backward pass of one layer adds: what it computes again and the gradients
    that pass through.

    These are two gradients as wide as the feed-forward layer, which keeps four such tensors, four
    of the norms in fp32, and the largest gradient of a weight.
    """
    again = _kept_by_layer(size, setup) if setup.gradient_checkpointing else 0.0
    mlp = size.mlp_bytes / setup.mlp_tiles
    tile_again = mlp if setup.mlp_tiles > 1 else 0.0
    return (
        setup.tokens * (again + tile_again + mlp / 2 + 16.0 * size.hidden_size)
        + setup.weight_bytes * size.largest
    )


def _kept_by_layer(size: ModelSize, setup: Setup) -> float:
    if setup.mlp_tiles == 1:
        return size.layer_bytes
    return size.layer_bytes - size.mlp_bytes + _layer_input(size, setup)


def _layer_input(size: ModelSize, setup: Setup) -> float:
    return float(setup.weight_bytes * size.hidden_size)


def _loss(size: ModelSize, setup: Setup) -> float:
    """Return what the fused loss needs: the head's gradient in fp32 and in the head's dtype, a
    chunk of logits, rows.

    A chunk has N D / V rows on a GPU, as many logits as hidden states; on a CPU 2^24 logits, in
    fp32. 256 rows or more.
    """
    head = float(size.vocab_size * size.hidden_size)
    copy = setup.weight_bytes * head if setup.weight_bytes < 4 else 0.0
    logits = float(setup.tokens * size.hidden_size if setup.on_gpu else 2**24)
    rows = min(setup.tokens, max(256.0, logits / size.vocab_size))
    chunk = rows * size.vocab_size * (setup.weight_bytes if setup.on_gpu else 4)
    return 4.0 * head + copy + chunk + 2.0 * setup.tokens * setup.weight_bytes * size.hidden_size


def _communication(size: ModelSize, setup: Setup) -> float:
    """Return gathered weights and buckets of gradients: a whole one from stage 2 on, and copies of
    what fills it."""
    match setup.zero_stage:
        case 0:
            return 0.0
        case 1:
            return 4.0 * min(_BUCKET, size.trained)
        case 2:
            return 4.0 * (_BUCKET + min(2 * _BUCKET, size.trained))
        case 3:
            return _resident(size, setup) + 4.0 * min(_BUCKET, size.trained)


def _resident(size: ModelSize, setup: Setup) -> float:
    """Return what stage 3 holds for the whole step: a bucket, however small the model, and up to
    _MAX_LIVE weights."""
    return 4.0 * _BUCKET + setup.weight_bytes * min(size.parameters, _MAX_LIVE)
