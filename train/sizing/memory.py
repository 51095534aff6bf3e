"""How much memory a rank needs at its peak, part by part: pure functions of counts.

tests/train/sizing/test_memory.py compares them with counted bytes, tests/bench/bench_memory.py with
processes.

The state stays for the whole run. In addition there is either a backward pass, with the activations
of one micro-batch, or the update. Letters: P parameters, T trained parameters, W ranks, b bytes of
a weight (2 in bf16, 4 in fp32), N tokens of a micro-batch on one rank, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace

from train.sizing.model_size import ModelSize
from train.sizing.zero_stage import ZeroStage

GIB = 2**30

# Elements: `reduce_bucket_size` of train/engine/engine.py.
_BUCKET = 50_000_000
# Elements: `stage3_max_live_parameters`, and DeepSpeed's default `sub_group_size`.
_MAX_LIVE = 1_000_000_000
# Bytes of a weight in 4 bits with its doubly quantised scales (Dettmers et al. 2023, section 3).
_QUANTIZED = 0.516
# Two allowances: for the CUDA context, kernels and NCCL; and, as a share of all else, for the gaps
# between the blocks of torch's allocator.
_CONTEXT = 2.0 * GIB
_FRAGMENTED = 0.04


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What decides memory besides the model."""

    world_size: int
    zero_stage: ZeroStage
    weight_bytes: int
    tokens: int
    """Positions of a micro-batch on one rank: packs x max_seq_len / `sequence_parallel`."""
    micro_batches: int
    """Micro-batches of one rank in a step."""
    gradient_checkpointing: bool
    mlp_tiles: int = 1
    quantized: bool = False
    optimizer_offloaded: bool = False
    params_offloaded: bool = False
    second_copy: int = 1
    """`hpz_partition_size` of ZeRO++: ranks that share a second copy of the weights; 1 for none."""
    on_gpu: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank, by part."""

    weights: float
    optimizer: float
    """fp32 master weights, if the weights are not fp32, and AdamW's two moments."""
    gradients: float
    activations: float
    """What the forward pass of a micro-batch keeps."""
    layer: float
    """The backward pass of one layer: recomputed activations and gradients of activations."""
    loss: float
    """Logits of a chunk of rows and the gradient of the LM head, freed before the layers' backward
    passes."""
    communication: float
    """Gathered weights and buckets of gradients."""
    update: float
    """Copies during the update."""
    reserve: float
    """An allowance: context, kernels, NCCL, fragmentation."""
    gradients_grow: bool
    """With one micro-batch per step, gradients appear as activations are freed."""

    @property
    def state(self) -> float:
        return self.weights + self.optimizer + (0.0 if self.gradients_grow else self.gradients)

    @property
    def phases(self) -> dict[str, float]:
        """What each phase of a step needs in addition to the state."""
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
    mlp = size.mlp_bytes / setup.mlp_tiles
    input_bytes = float(setup.weight_bytes * size.hidden_size)
    full = size.layer_bytes  # all that autograd saves in a layer, per token
    if setup.mlp_tiles > 1:
        full = size.layer_bytes - size.mlp_bytes + input_bytes
    # With gradient checkpointing the forward pass keeps the input of each layer only, and the
    # backward pass computes the rest again, layer by layer. Tiles of an mlp do so within a layer.
    saved, again = (input_bytes, full) if setup.gradient_checkpointing else (full, 0.0)
    tile_again = mlp if setup.mlp_tiles > 1 else 0.0
    # Gradients of activations that exist at the same time: two as wide as the feed-forward layer,
    # which keeps four such tensors, and four of the norms in fp32.
    passing = mlp / 2 + 16.0 * size.hidden_size
    memory = Memory(
        weights=weights,
        optimizer=optimizer,
        gradients=gradients,
        activations=setup.tokens * (size.num_layers * saved + size.other_bytes),
        layer=setup.tokens * (again + tile_again + passing) + setup.weight_bytes * size.largest,
        loss=_loss(size, setup),
        communication=_communication(size, setup),
        update=update,
        reserve=0.0,
        gradients_grow=setup.zero_stage == 0 and setup.micro_batches == 1,
    )
    if not setup.on_gpu:
        return memory
    return replace(memory, reserve=_CONTEXT + _FRAGMENTED * memory.total)


def _state(size: ModelSize, setup: Setup) -> tuple[float, float, float, float]:
    """Return the bytes of weights, optimizer and gradients, and what the update adds.

    One rank (train/engine/single_rank_adamw.py): b P weights, 4 T masters if b is 2, 8 T moments,
    4 T gradients. ZeRO (Rajbhandari et al. 2020, section 5): b P weights (b P / W in stage 3),
    12 T / W masters and moments, even beside fp32 weights, and 4 T gradients, summed in fp32
    (4 T / W from stage 2 on). The update of ZeRO copies a rank's gradients: three times in stage 1,
    and in stage 3 a sub-group of them beside the weights that stay gathered. Offloaded state is on
    the host, from stage 2 on with its gradients.
    """
    trained, ranks, stage = float(size.trained), setup.world_size, setup.zero_stage
    per_weight = float(setup.weight_bytes)
    frozen = _QUANTIZED if setup.quantized else per_weight
    weights = frozen * (size.parameters - trained) + per_weight * trained
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


def _loss(size: ModelSize, setup: Setup) -> float:
    """Return what the fused loss needs: the head's gradient in fp32 and in the head's dtype, a
    chunk of logits, hidden states and their gradients.

    A chunk has as many logits as there are hidden states on a GPU, N D / V rows, and 2^24 logits in
    fp32 on a CPU, but at least 256 rows.
    """
    head = float(size.vocab_size * size.hidden_size)
    copy = setup.weight_bytes * head if setup.weight_bytes < 4 else 0.0
    logits = float(setup.tokens * size.hidden_size if setup.on_gpu else 2**24)
    rows = min(setup.tokens, max(256.0, logits / size.vocab_size))
    chunk = rows * size.vocab_size * (setup.weight_bytes if setup.on_gpu else 4)
    return 4.0 * head + copy + chunk + 2.0 * setup.tokens * setup.weight_bytes * size.hidden_size


def _communication(size: ModelSize, setup: Setup) -> float:
    """Return the buckets of gradients and, in stage 3, the gathered weights.

    A bucket is filled by copies; from stage 2 on it has its full size, however small the model.
    """
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
    """Return what stage 3 holds for the whole step: a bucket and up to _MAX_LIVE weights."""
    return 4.0 * _BUCKET + setup.weight_bytes * min(size.parameters, _MAX_LIVE)
