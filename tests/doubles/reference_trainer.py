"""An independent trainer to compare with: each sequence alone, in plain torch, without any code of
this project.

It reads the columns of a shard set with np.load; the caller names the sequences of each step. The
rest is written here again in the plainest way: the loss and its normalisation, clipping, AdamW, the
schedule, the evaluation.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

# The row of the source, and the first token of the sample.
Origin = tuple[int, int]
# The ids and the loss mask of a sequence.
Tokens = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    norm: Literal["token", "sample", "sum"] = "token"
    divisor: float = 1.0
    kind: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.0
    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Trained:
    losses: list[float]
    grad_norms: list[float]
    eval_loss: float
    weights: dict[str, torch.Tensor]


def sequences_of(shards: Path) -> dict[Origin, Tokens]:
    """Return every sequence of a set by where it comes from."""
    sequences = {}
    manifest = json.loads((shards / "manifest.json").read_text())
    for entry in manifest["shards"]:
        columns = ("tokens", "loss_mask", "seq_offsets", "seq_origin")
        tokens, mask, offsets, origin = (
            np.load(shards / entry["path"] / f"{name}.npy") for name in columns
        )
        for number, (_, row, first) in enumerate(origin.tolist()):
            span = slice(offsets[number], offsets[number + 1])
            ids = torch.from_numpy(tokens[span].astype(np.int64))
            sequences[row, first] = (ids, torch.from_numpy(mask[span] == 1))
    return sequences


def train(
    model: Path, steps: Sequence[Sequence[Tokens]], held_out: Sequence[Tokens], settings: Settings
) -> Trained:
    """Train the model in the directory `model` on the sequences of each step, then evaluate it."""
    network = AutoModelForCausalLM.from_pretrained(
        model, attn_implementation="eager", dtype=torch.float32
    ).train()
    parameters = list(network.parameters())
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas)
    losses, norms = [], []
    for number, sequences in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(number, len(steps), settings)
        total = 0.0
        for each in sequences:
            tokens = cross_entropies(network, each)
            if len(tokens):
                part = tokens.sum() * weight(each, sequences, settings)
                part.backward()
                total += part.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item())
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        evaluated = torch.cat([cross_entropies(network.eval(), each) for each in held_out])
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    return Trained(
        losses=losses, grad_norms=norms, eval_loss=evaluated.mean().item(), weights=weights
    )


def cross_entropies(network: PreTrainedModel, sequence: Tokens) -> torch.Tensor:
    """Return the loss of each token that counts, predicted from the tokens before it."""
    ids, counted = sequence
    logits = network(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[counted[1:]]


def weight(sequence: Tokens, of_step: Sequence[Tokens], settings: Settings) -> float:
    """Return the weight of each token of `sequence` in the loss of the step.

    Here a sample is a sequence: no row was split.
    """
    counts = [int(counted.sum()) for _, counted in of_step]
    match settings.norm:
        case "token":
            return 1 / sum(counts)
        case "sum":
            return 1 / settings.divisor
        case "sample":
            return 1 / int(sequence[1].sum()) / sum(count > 0 for count in counts)


def rate(step: int, steps: int, settings: Settings) -> float:
    warmup = math.ceil(settings.warmup_ratio * steps)
    if step < warmup:
        return settings.learning_rate * step / warmup
    done = (step - warmup) / (steps - warmup)
    shapes = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return settings.learning_rate * shapes[settings.kind]
