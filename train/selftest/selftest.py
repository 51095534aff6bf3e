"""`sft-train selftest`: does a packed step train what its sequences train alone, with this model on
this machine?

Real packs, truncated, go through the model, kernels and dtype that a run would use. If the weights
of the model do not fit, a few layers with random weights stand in, and the report tells. There is
one process: how ranks divide a step is not tested.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from shared.errors import PrerequisiteError
from shared.hashing import seed_from
from shared.shard_reader import Pack
from train.data.micro_batch import MicroBatch, make_micro_batch
from train.engine.engine import choose_dtype
from train.model.attention import choose_attention
from train.model.loss import weighted_cross_entropy
from train.model.model import LossModel, build_model, check_head, check_supported, model_config
from train.run.prepare import TrainRequest, open_inputs
from train.selftest.isolation import (
    SAME,
    Finding,
    eager_attention,
    evaluating,
    isolation_of,
    outputs_of,
)
from train.selftest.startup_check import with_layers

_PACKS = 3
_LAYERS_WITHOUT_ROOM = 2
_LOSS_ROWS = 128
# Weights, two sets of gradients, and room for activations.
_COPIES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was tested, in words, and the results."""

    tested: str
    findings: list[Finding]

    def lines(self) -> list[str]:
        """Return the table that the command prints."""
        rows = [("check", "what was measured", "worst", "tolerance", "")]
        for f in self.findings:
            result = "ok" if f.is_ok else "FAILED"
            rows.append((f.check, f.measurement, f"{f.worst:.1e}", f"{f.tolerance:.0e}", result))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return [self.tested, *table]

    def check(self) -> None:
        """Raise PrerequisiteError if a check failed."""
        if failed := [finding.check for finding in self.findings if not finding.is_ok]:
            raise PrerequisiteError(
                f"selftest failed: {', '.join(failed)}; expected every difference within its"
                " tolerance. This model would not train exactly on this machine: use another"
                " model.attention or engine.dtype"
            )


def selftest(request: TrainRequest, *, layers: int | None, tokens: int) -> Report:
    """Test the model of `request` on at most `tokens` tokens of its shards. Raises ConfigError or
    ArtifactError.

    `layers`: the number of layers with random weights to test; None tests the whole model if it
    fits.
    """
    recipe, shard_set = open_inputs(request)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(recipe.engine.dtype, device)
    attention = choose_attention(recipe.model.attention, device=device, dtype=dtype)
    config = model_config(recipe.model, shard_set.manifest)
    check_supported(config)
    num_packs = min(_PACKS, shard_set.num_packs)
    packs = [
        every_target(shard_set.pack(index), max(2, tokens // num_packs))
        for index in range(num_packs)
    ]
    reason = ""
    if layers is None and not _fits(config, device, dtype):
        layers, reason = _LAYERS_WITHOUT_ROOM, " (the whole model does not fit)"
    seed = seed_from("weights", recipe.run.seed)
    if layers is None:
        model = build_model(
            recipe.model, shard_set.manifest, attention=attention, dtype=dtype, seed=seed
        )
        weights = "the whole model"
    else:
        config.vocab_size = max(config.vocab_size, shard_set.manifest.max_token_id + 1)
        values = with_layers(config.to_dict(), layers)
        small = AutoConfig.for_model(values.pop("model_type"), **values)
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(
            small, attn_implementation=attention, dtype=dtype
        )
        check_head(network)
        model = LossModel(network)
        weights = f"{small.num_hidden_layers} layers with random weights{reason}"
    num_tokens = sum(len(pack.tokens) for pack in packs)
    num_sequences = sum(len(pack.seq_offsets) - 1 for pack in packs)
    tested = (
        f"{config.model_type}, {weights}; {device.type}, {dtype}, attention"
        f" {attention.removeprefix('sft_')}; {num_tokens} tokens in {num_sequences} sequences of"
        f" {num_packs} packs"
    )
    return Report(tested=tested, findings=measure(model.to(device), packs))


def measure(model: LossModel, packs: list[Pack]) -> list[Finding]:
    """Return every check for `packs` in which, as `every_target` makes them, all tokens are
    targets."""
    network = model.model
    device = network.get_input_embeddings().weight.device
    batch = _batch(packs, packs).to(device)
    ids, bounds = batch.input_ids[0], batch.cu_seqlens.tolist()
    with evaluating(model):
        # The same loss in one micro-batch, in one for each pack, and sequence by sequence.
        packed = _gradients(model, [batch])
        split = _gradients(model, [_batch([pack], packs).to(device) for pack in packs])
        # The same loss, sequence by sequence, by the forward pass and eager attention of
        # transformers and torch's cross-entropy.
        with eager_attention(network):
            for start, end in pairwise(bounds):
                if end - start > 1:
                    sequence = ids[start:end]
                    logits = network(input_ids=sequence[None], use_cache=False).logits[0, :-1]
                    loss = cross_entropy(logits.float(), sequence[1:], reduction="sum")
                    (loss * batch.weights[0]).backward()  # type: ignore[no-untyped-call]
        alone = _take_gradients(model)
    tolerance = SAME[network.dtype]
    return [
        *isolation_of(network, ids, bounds),
        Finding(
            check="gradients alone",
            measurement="gradient of each parameter, packed against alone",
            worst=_distance(packed, alone),
            tolerance=tolerance,
        ),
        Finding(
            check="split",
            measurement=f"gradient of 1 micro-batch against {len(packs)}",
            worst=_distance(packed, split),
            tolerance=tolerance,
        ),
        Finding(
            check="loss kernel",
            measurement="loss and gradient of hidden states against plain fp64",
            worst=_loss_difference(model, batch),
            tolerance=tolerance,
        ),
    ]


def _fits(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether there is memory for weights and two sets of gradients, without allocating any
    weights."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    num_weights = sum(parameter.numel() for parameter in network.parameters())
    needed: int = _COPIES * dtype.itemsize * num_weights
    if device.type == "cuda":
        return needed < int(torch.cuda.mem_get_info(device)[0])
    # MemAvailable is in KiB.
    lines = dict(
        line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    )
    return needed < int(lines["MemAvailable"].split()[0]) * 1024


def every_target(pack: Pack, tokens: int) -> Pack:
    """Return the first `tokens` tokens of a pack, in which all tokens but the first of a sequence
    are targets."""
    length = min(tokens, len(pack.tokens))
    bounds = np.append(pack.seq_offsets[pack.seq_offsets < length], length)
    mask = np.ones(length, np.uint8)
    mask[bounds[:-1]] = 0
    return Pack(pack.tokens[:length], mask, bounds, pack.seq_origin[: len(bounds) - 1])


def _batch(packs: list[Pack], of_step: list[Pack]) -> MicroBatch:
    """Return `packs` as a micro-batch of a step that holds `of_step` and averages over its loss
    tokens."""
    weight = 1.0 / max(1, sum(int(pack.loss_mask.sum()) for pack in of_step))
    weights = [np.full(int(pack.loss_mask.sum()), weight, np.float32) for pack in packs]
    return make_micro_batch(packs, weights, uniform_weight=weight)


def _gradients(model: LossModel, batches: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
    """Return the fp32 sums of the gradients of `batches`, added up as the engine does."""
    total: dict[str, torch.Tensor] = {}
    for batch in batches:
        loss: torch.Tensor = model(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, gradient in _take_gradients(model).items():
            total[name] = total[name] + gradient if name in total else gradient
    return total


def _take_gradients(model: LossModel) -> dict[str, torch.Tensor]:
    gradients = {
        name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return gradients


def _distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest |actual - expected| / |expected| of a parameter, by Euclidean norms.

    A parameter with a gradient near zero is compared with a thousandth of the whole gradient.
    """
    floor = 1e-3 * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    worst = 0.0
    for name, gradient in expected.items():
        if name not in actual:
            return math.inf
        distance = float((actual[name] - gradient).norm() / gradient.norm().clamp(min=floor))
        worst = max(worst, math.inf if math.isnan(distance) else distance)
    return worst


def _loss_difference(model: LossModel, batch: MicroBatch) -> float:
    """Compare the loss kernel of this device, on real hidden states, with logits in fp64."""
    network = model.model
    head = network.get_output_embeddings().weight.detach()
    with torch.no_grad():
        hidden = outputs_of(network, batch.input_ids[0], batch.cu_seqlens.tolist())
    targets = batch.targets[:_LOSS_ROWS]
    hidden = hidden[batch.rows[:_LOSS_ROWS]].requires_grad_()
    ones = torch.ones(len(targets), dtype=torch.float32, device=hidden.device)
    loss = weighted_cross_entropy(hidden, head, targets, ones, uniform=1.0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = cross_entropy(exact @ head.double().t(), targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    of_loss = abs(loss.item() - expected.item()) / abs(expected.item())
    of_gradient = float((gradient.double() - expected_gradient).norm() / expected_gradient.norm())
    worst = max(of_loss, of_gradient)
    return math.inf if math.isnan(of_loss + of_gradient) else worst
