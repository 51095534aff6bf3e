"""Program for tests: the gradients of step 0 by the real engine, for several jobs. Run by torchrun or alone.

Arguments: shard set, directory of models, output directory, then jobs
MODEL:NORM:PACKS_PER_STEP:PACKS_PER_MICRO_BATCH:ZERO_STAGE; job N writes N.pt. Stage "auto" is that of the ranks.
"""

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from shared.shard_reader import ShardSet, open_shard_set
from train.attention import choose_attention
from train.config import EngineConfig, LossConfig, ModelConfig, OptimConfig
from train.distributed import Ranks, process_group, sum_over_ranks
from train.engine import accumulate, consolidated_weights, deepspeed_config, shard_while_building, start_engine, update
from train.feed import Feed
from train.model import LossModel, build_model
from train.plan import make_order
from train.zero_stage import ZeroStage, resolve_zero_stage

# with eps = 1 the first update is g / (|g| + 1), smooth in the gradient: AdamW's usual eps would amplify rounding
OPTIM = OptimConfig(learning_rate=1.0, eps=1.0, max_grad_norm=0.0)


def load_model(folder: Path, shard_set: ShardSet, attention: str) -> LossModel:
    config = ModelConfig(name=str(folder))
    return build_model(config, shard_set.manifest, attention=attention, dtype=torch.float32, seed=1)


def feed_for(shard_set: ShardSet, norm: str, *, packs_per_step: int, per_micro: int, rank: int, world: int) -> Feed:
    order = make_order(
        fingerprint=shard_set.manifest.fingerprint, seed=0, unit="pack", num_units=shard_set.num_packs,
        units_per_step=packs_per_step, epochs=1.0, max_steps=None,
    )  # fmt: skip
    return Feed(
        shard_set=shard_set,
        order=order,
        loss=LossConfig(norm=norm),
        rank=rank,
        world_size=world,
        packs_per_micro_batch=per_micro,
    )  # type: ignore[arg-type]


def main(shards: str, models: str, out_dir: str, *jobs: str) -> None:
    shard_set = open_shard_set(Path(shards))
    with process_group() as ranks:
        for number, job in enumerate(jobs):
            kind, norm, packs_per_step, per_micro, stage = job.split(":")
            feed = feed_for(
                shard_set, norm, packs_per_step=int(packs_per_step), per_micro=int(per_micro), rank=ranks.rank,
                world=ranks.world_size,
            )  # fmt: skip
            wanted = EngineConfig(zero_stage="auto" if stage == "auto" else int(stage))  # type: ignore[arg-type]
            resolved = resolve_zero_stage(wanted, world_size=ranks.world_size)
            result = one_step(shard_set, feed, Path(models) / kind, resolved, ranks)
            if ranks.is_main:
                torch.save(result, Path(out_dir) / f"{number}.pt")


def one_step(shard_set: ShardSet, feed: Feed, model: Path, stage: ZeroStage, ranks: Ranks) -> dict[str, object]:
    optim = OPTIM
    settings = deepspeed_config(stage, optim, dtype=torch.float32)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # shard even the smallest parameter
    sharding = shard_while_building(settings)
    attention = choose_attention("auto", device=ranks.device, dtype=torch.float32)
    engine = start_engine(load_model(model, shard_set, attention), optim, settings)
    del sharding
    loss = sum_over_ranks(accumulate(engine, feed.make(0).micro_batches, ranks), ranks)
    gradients = {}
    if stage == 0:
        gradients = {name: p.grad for name, p in engine.module.named_parameters()}
    elif stage == 3:  # in the others DeepSpeed does not show them between backward and update
        gradients = {name: safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()}
    update(engine, learning_rate=optim.learning_rate)
    return {"loss": loss.item(), "gradients": gradients, "weights": consolidated_weights(engine)}


if __name__ == "__main__":
    main(*sys.argv[1:])
