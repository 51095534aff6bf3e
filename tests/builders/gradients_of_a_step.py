"""Program for tests: the gradients of step 0 by the real engine, run by torchrun or alone.

Arguments: a folder with sets/NAME and models/NAME, an output directory, and a JSON list of jobs;
job N writes N.pt. Neighbouring jobs with the same model and settings share an engine; only the last
of them updates the weights.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed.utils import safe_get_full_grad

from shared.shard_reader import ShardSet, open_shard_set
from train.config import EngineConfig, LossConfig, ModelConfig, OptimConfig
from train.data.loader import StepLoader
from train.data.step_order import StepOrder, Unit, make_order
from train.engine.engine import (
    accumulate,
    consolidated_weights,
    deepspeed_config,
    shard_while_building,
    start_engine,
    update,
)
from train.engine.process_group import Ranks, process_group, sum_over_ranks
from train.model.attention import choose_attention
from train.model.model import LossModel, build_model
from train.sizing.zero_stage import ZeroStage, resolve_zero_stage

# With eps = 1 an update is g / (|g| + 1), smooth in the gradient: AdamW's usual eps would amplify
# rounding. With betas of 0 it remembers nothing of the steps before.
OPTIM = OptimConfig(learning_rate=1.0, betas=(0.0, 0.0), eps=1.0, max_grad_norm=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    per_step: int
    unit: Unit = "pack"
    shards: str = "packed"
    loss: LossConfig = field(default_factory=LossConfig)
    per_micro_batch: int = 1
    model: str = "llama"
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    checkpointing: bool = False
    kernel: str = "chunked"

    def engine(self) -> tuple[object, ...]:
        """What must be equal for two jobs to share an engine."""
        return self.model, self.zero_stage, self.checkpointing, self.kernel


def to_json(jobs: list[Job]) -> str:
    return json.dumps([asdict(job) for job in jobs])


def from_json(text: str) -> list[Job]:
    return [Job(**{**item, "loss": LossConfig(**item["loss"])}) for item in json.loads(text)]


def load_model(
    folder: Path, shard_set: ShardSet, attention: str, *, checkpointing: bool = False
) -> LossModel:
    config = ModelConfig(name=str(folder), gradient_checkpointing=checkpointing)
    return build_model(config, shard_set.manifest, attention=attention, dtype=torch.float32, seed=1)


def order_for(shard_set: ShardSet, job: Job) -> StepOrder:
    num_units = shard_set.num_packs if job.unit == "pack" else shard_set.num_sequences
    return make_order(
        unit=job.unit,
        fingerprint="f",
        seed=0,
        num_units=num_units,
        units_per_step=job.per_step,
        epochs=1.0,
        max_steps=None,
    )


def main(folder: str, out_dir: str, text: str) -> None:
    sets = {path.name: open_shard_set(path) for path in (Path(folder) / "sets").iterdir()}
    jobs = list(enumerate(from_json(text)))
    with process_group() as ranks:
        for _, group in groupby(jobs, key=lambda pair: pair[1].engine()):
            members = list(group)
            engine = start(members[0][1], sets["packed"], Path(folder) / "models", ranks)
            for number, job in members:
                is_last = number == members[-1][0]
                result = one_step(engine, job, sets[job.shards], ranks, is_last=is_last)
                if ranks.is_main:
                    torch.save(result, Path(out_dir) / f"{number}.pt")


def start(job: Job, shard_set: ShardSet, models: Path, ranks: Ranks) -> Any:
    if job.kernel == "liger":
        use_liger()
    stage = stage_of(job, ranks)
    settings = deepspeed_config(stage, OPTIM, dtype=torch.float32)
    # Even the smallest parameter is sharded.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    sharding = shard_while_building(settings)
    attention = choose_attention("auto", device=ranks.device, dtype=torch.float32)
    model = load_model(models / job.model, shard_set, attention, checkpointing=job.checkpointing)
    engine = start_engine(model, OPTIM, settings)
    del sharding
    return engine


def one_step(
    engine: Any, job: Job, shard_set: ShardSet, ranks: Ranks, *, is_last: bool
) -> dict[str, Any]:
    loader = StepLoader(
        shard_set=shard_set,
        order=order_for(shard_set, job),
        loss=job.loss,
        rank=ranks.rank,
        world_size=ranks.world_size,
        packs_per_micro_batch=job.per_micro_batch,
    )
    batch = loader.make(0)
    result: dict[str, Any] = {"micro_batches": len(batch.micro_batches)}
    loss = accumulate(engine, batch.micro_batches, ranks).sum()
    result["loss"] = sum_over_ranks(loss, ranks).item()
    stage = stage_of(job, ranks)
    if stage == 0:
        result["gradients"] = {name: p.grad.clone() for name, p in engine.module.named_parameters()}
    elif stage == 3:
        # In stages 1 and 2 DeepSpeed does not show gradients between backward and update.
        result["gradients"] = {
            name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()
        }
    update(engine, learning_rate=OPTIM.learning_rate if is_last else 0.0)
    if is_last:
        result["weights"] = consolidated_weights(engine)
    return result


def stage_of(job: Job, ranks: Ranks) -> ZeroStage:
    return resolve_zero_stage(EngineConfig(zero_stage=job.zero_stage), world_size=ranks.world_size)


def use_liger() -> None:
    """Let a CPU make the choice that a GPU makes; Triton's interpreter then runs the kernel."""
    from train.model import loss, model

    def as_on_a_gpu(
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        *,
        uniform: float | None,
        row_losses: torch.Tensor,
    ) -> torch.Tensor:
        if uniform is None:
            return loss.chunked_cross_entropy(hidden, head, targets, weights, row_losses)
        return loss.liger_cross_entropy(hidden, head, targets, row_losses) * uniform

    model.weighted_cross_entropy = as_on_a_gpu


if __name__ == "__main__":
    main(*sys.argv[1:])
