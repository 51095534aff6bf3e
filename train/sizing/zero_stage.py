"""What DeepSpeed shards in a run. The recipe and the number of ranks decide it, before torch is
imported."""

from typing import Literal

from shared.errors import ConfigError
from train.config import EngineConfig

ZeroStage = Literal[0, 1, 2, 3]


def resolve_zero_stage(engine: EngineConfig, *, world_size: int) -> ZeroStage:
    """Return the stage that a run on `world_size` ranks uses. Raises ConfigError for stage 0 on
    several ranks.

    "auto" is 3 for two ranks or more. One rank has no one to share with, and sharding would only
    cost it time and memory: there "auto" is 0, which is `OneRankAdamW` of
    train/engine/single_rank_adamw.py on whole weights.
    """
    if engine.zero_stage == "auto":
        if world_size > 1:
            return 3
        # Offloading and ZeRO++ are features of ZeRO, which stage 0 does not use.
        keys = engine.stage_3_keys()
        if engine.offload_optimizer != "none":
            keys.append("offload_optimizer")
        if keys:
            raise ConfigError(
                f"engine.{keys[0]} needs ZeRO, which a single rank does not use by default; set"
                " engine.zero_stage = 3"
            )
        return 0
    if engine.zero_stage == 0 and world_size > 1:
        raise ConfigError(
            f"engine.zero_stage = 0 is for one rank, this run has {world_size}; set auto, 1, 2 or 3"
        )
    return engine.zero_stage
