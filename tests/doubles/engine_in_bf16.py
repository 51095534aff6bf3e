"""Program for tests, run by torchrun or alone: start the engine in bf16 and record which dtypes it
really uses.

Arguments: shard set, recipe, output file, ZeRO stage.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from shared.shard_reader import open_shard_set
from train.config import EngineConfig
from train.data.micro_batch import MicroBatch, make_micro_batch
from train.engine.engine import accumulate, deepspeed_config, start_engine
from train.engine.process_group import process_group
from train.model.attention import register_attention
from train.model.model import build_model
from train.recipe_file import load_recipe
from train.sizing.zero_stage import resolve_zero_stage

# The sum of 33 equal gradients needs more digits than bf16 has.
PASSES = 33


def main(shards: str, recipe_file: str, out: str, zero_stage: str) -> None:
    recipe, shard_set = load_recipe(recipe_file), open_shard_set(Path(shards))
    pack = shard_set.pack(0)
    num_loss_tokens = int(pack.loss_mask.sum())
    weights = torch.full((num_loss_tokens,), 1 / num_loss_tokens).numpy()
    batch = make_micro_batch([pack], [weights], uniform_weight=1 / num_loss_tokens)
    with process_group() as ranks:
        wanted: Any = "auto" if zero_stage == "auto" else int(zero_stage)
        stage = resolve_zero_stage(EngineConfig(zero_stage=wanted), world_size=ranks.world_size)
        settings = deepspeed_config(stage, recipe.optim, dtype=torch.bfloat16)
        attention = register_attention("per_sequence")
        model = build_model(
            recipe.model, shard_set.manifest, attention=attention, dtype=torch.bfloat16, seed=1
        )
        # Without dropout each pass has the same gradient.
        engine = start_engine(model.eval(), recipe.optim, settings)
        config = {"generated": settings, "ran_with": engine._config._param_dict}
        dtypes = described(engine)
        error, dtype = error_of_sums(engine, [batch], ranks)
        if ranks.is_main:
            results = {**config, **dtypes, "error_of_sums": error, "sums": dtype}
            Path(out).write_text(json.dumps(results))


def described(engine: Any) -> dict[str, Any]:
    masters = [p for group in engine.optimizer.param_groups for p in group["params"]]
    if engine.zero_optimization_stage() == 3:
        masters = engine.optimizer.fp32_partitioned_groups_flat
    return {
        "weights": sorted({str(p.dtype) for p in engine.module.parameters()}),
        "masters": sorted({str(p.dtype) for p in masters}),
        "accumulated_in": str(engine.get_data_types()[1]),
        "sent_in": str(engine.communication_data_type),
        "stage": engine.zero_optimization_stage(),
        "optimizer": type(engine.optimizer).__name__,
    }


def error_of_sums(engine: Any, batches: list[MicroBatch], ranks: Any) -> tuple[float, str]:
    """Return how far the sum of PASSES equal gradients is from PASSES times the first, and the
    dtype of the sum."""
    accumulate(engine, batches, ranks)
    first = sums(engine).double()
    accumulate(engine, batches * (PASSES - 1), ranks)
    total = sums(engine)
    error = (total.double() - PASSES * first).abs().max() / (PASSES * first).abs().max()
    return error.item(), str(total.dtype)


def sums(engine: Any) -> torch.Tensor:
    """Return a copy of this rank's sums of gradients, flat."""
    match engine.zero_optimization_stage():
        case 0:
            gradients = [p.grad for group in engine.optimizer.param_groups for p in group["params"]]
        case 1:
            gradients = engine.optimizer.fp32_groups_gradients_flat
        case _:
            gradients = [engine.optimizer.grad_partitions_flat_buffer]
    return torch.cat([gradient.flatten() for gradient in gradients])


if __name__ == "__main__":
    main(*sys.argv[1:])
