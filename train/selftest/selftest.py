"""`sft-train selftest`: on this machine and with this model, does a packed step train what its
sequences train alone?

Real packs, cut short, go through the model, kernels and dtype that a run would use. Weights are the
model's own where they fit; else layers with random weights, and the report says so. One process:
how ranks divide a step is not tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

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
_COPIES = 4  # weights, two sets of gradients, and room for activations


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was tested, in words, and what was found."""

    tested: str
    findings: list[Finding]

    def lines(self) -> list[str]:
        """Return the table that the command prints."""
        rows = [("check", "what was measured", "worst", "tolerance", "")]
        rows += [
            (
                f.check,
                f.measured,
                f"{f.worst:.1e}",
                f"{f.tolerance:.0e}",
                "ok" if f.is_ok else "FAILED",
            )
            for f in self.findings
        ]
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
                " tolerance. This model does not train exactly on this machine: use another"
                " model.attention or engine.dtype"
            )


def selftest(request: TrainRequest, *, layers: int | None, tokens: int) -> Report:
    """Test the model of `request` on its shards, on `tokens` tokens at most. Raises ConfigError or
    ArtifactError.

    `layers`: so many, with random weights; None takes the whole model where it fits.
    """
    recipe, shard_set = open_inputs(request)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(recipe.engine.dtype, device)
    attention = choose_attention(recipe.model.attention, device=device, dtype=dtype)
    config = model_config(recipe.model, shard_set.manifest)
    check_supported(config)
    chosen = min(_PACKS, shard_set.num_packs)
    packs = [
        every_target(shard_set.pack(index), max(2, tokens // chosen)) for index in range(chosen)
    ]
    why = ""
    if layers is None and not _fits(config, device, dtype):
        layers, why = _LAYERS_WITHOUT_ROOM, " (the whole model does not fit)"
    seed = seed_from("weights", recipe.run.seed)
    if layers is None:
        model = build_model(
            recipe.model, shard_set.manifest, attention=attention, dtype=dtype, seed=seed
        )
        weights = "the whole model"
    else:
        config.vocab_size = max(config.vocab_size, shard_set.manifest.max_token_id + 1)
        model = _few_layers(config, layers, attention=attention, dtype=dtype, seed=seed)
        weights = f"{model.model.config.num_hidden_layers} layers with random weights{why}"
    num_tokens = sum(len(pack.tokens) for pack in packs)
    tested = (
        f"{config.model_type}, {weights}; {device.type}, {dtype}, attention"
        f" {attention.removeprefix('sft_')}; {num_tokens} tokens in"
        f" {sum(len(pack.seq_offsets) - 1 for pack in packs)} sequences of {chosen} packs"
    )
    return Report(tested=tested, findings=measure(model.to(device), packs))


def measure(model: LossModel, packs: list[Pack]) -> list[Finding]:
    """Return every check for `packs` in which, as `every_target` leaves them, all tokens are
    targets."""
    network = model.model
    device = network.get_input_embeddings().weight.device
    batch = _batch(packs, packs).to(device)
    ids, bounds = batch.input_ids[0], batch.cu_seqlens.tolist()
    with evaluating(model):
        packed = _gradients(model, [batch])
        split = _gradients(model, [_batch([pack], packs).to(device) for pack in packs])
        alone = _gradients_alone(model, batch)
    tolerance = SAME[network.dtype]
    return [
        *isolation_of(network, ids, bounds),
        Finding(
            check="gradients alone",
            measured="gradient of each parameter, packed against alone",
            worst=_distance(packed, alone),
            tolerance=tolerance,
        ),
        Finding(
            check="split",
            measured=f"gradient of 1 micro-batch against {len(packs)}",
            worst=_distance(packed, split),
            tolerance=tolerance,
        ),
        Finding(
            check="loss kernel",
            measured="loss and gradient of hidden states against plain fp64",
            worst=_loss_difference(model, batch),
            tolerance=tolerance,
        ),
    ]


def _few_layers(
    config: PretrainedConfig, layers: int, *, attention: str, dtype: torch.dtype, seed: int
) -> LossModel:
    values = with_layers(config.to_dict(), layers)
    small = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(small, attn_implementation=attention, dtype=dtype)
    assert isinstance(network, PreTrainedModel)
    check_head(network)
    return LossModel(network)


def _fits(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights and two sets of gradients have room. No weights are made to find out."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    needed: int = (
        _COPIES * dtype.itemsize * sum(parameter.numel() for parameter in network.parameters())
    )
    if device.type == "cuda":
        return needed < int(torch.cuda.mem_get_info(device)[0])
    lines = dict(
        line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    )
    return needed < int(lines["MemAvailable"].split()[0]) * 1024


def every_target(pack: Pack, tokens: int) -> Pack:
    """Return the first `tokens` tokens of a pack, the last sequence cut; every token a target that
    can be one."""
    length = min(tokens, len(pack.tokens))
    bounds = np.append(pack.seq_offsets[pack.seq_offsets < length], length)
    mask = np.ones(length, np.uint8)
    mask[bounds[:-1]] = 0
    return Pack(pack.tokens[:length], mask, bounds, pack.seq_origin[: len(bounds) - 1])


def _batch(packs: list[Pack], of_step: list[Pack]) -> MicroBatch:
    """Return `packs` as a micro-batch of a step that holds `of_step`, with a mean over its loss
    tokens."""
    weight = 1.0 / max(1, sum(int(pack.loss_mask.sum()) for pack in of_step))
    weights = [np.full(int(pack.loss_mask.sum()), weight, np.float32) for pack in packs]
    return make_micro_batch(packs, weights, uniform_weight=weight)


def _gradients(model: LossModel, batches: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
    """Return the fp32 sums of the gradients of `batches`, as the engine adds them up."""
    total: dict[str, torch.Tensor] = {}
    for batch in batches:
        loss: torch.Tensor = model(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, gradient in _take_gradients(model).items():
            total[name] = total[name] + gradient if name in total else gradient
    return total


def _gradients_alone(model: LossModel, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """The same loss by the model's own forward pass, eager attention and torch's cross-entropy, by
    sequence."""
    bounds = batch.cu_seqlens.tolist()
    with eager_attention(model.model):
        for start, end in pairwise(bounds):
            if end - start > 1:
                ids = batch.input_ids[:, start:end]
                logits = model.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
                (loss * batch.weights[0]).backward()  # type: ignore[no-untyped-call]
    return _take_gradients(model)


def _take_gradients(model: LossModel) -> dict[str, torch.Tensor]:
    found = {
        name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return found


def _distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest |found - expected| / |expected| of a parameter, by Euclidean norms.

    A parameter whose gradient is next to nothing of the whole is measured against a thousandth of
    the whole.
    """
    floor = 1e-3 * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    distances = [
        (
            float((found[name] - gradient).norm() / gradient.norm().clamp(min=floor))
            if name in found
            else float("inf")
        )
        for name, gradient in expected.items()
    ]
    return max(float("inf") if distance != distance else distance for distance in distances)


def _loss_difference(model: LossModel, batch: MicroBatch) -> float:
    """The kernel that a run takes on this device, on real hidden states, against logits in fp64."""
    network = model.model
    head = network.get_output_embeddings().weight.detach()
    with torch.no_grad():
        hidden = outputs_of(network, batch.input_ids[0], batch.cu_seqlens.tolist())[batch.rows][
            :_LOSS_ROWS
        ]
    targets = batch.targets[:_LOSS_ROWS]
    hidden = hidden.clone().requires_grad_()
    ones = torch.ones(len(targets), dtype=torch.float32, device=hidden.device)
    loss = weighted_cross_entropy(hidden, head, targets, ones, uniform=1.0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        exact @ head.double().t(), targets, reduction="sum"
    )
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    of_loss = abs(loss.item() - expected.item()) / abs(expected.item())
    of_gradient = float((gradient.double() - expected_gradient).norm() / expected_gradient.norm())
    return (
        float("inf")
        if of_loss != of_loss or of_gradient != of_gradient
        else max(of_loss, of_gradient)
    )
