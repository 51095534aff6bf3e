"""One rank shards nothing, several shard everything, unless the recipe sets a stage."""

import pytest

from shared.errors import ConfigError
from train.config import EngineConfig
from train.sizing.zero_stage import resolve_zero_stage


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3), (8, 3)])
def test_auto_is_no_sharding_for_one_rank_and_full_sharding_for_more(
    ranks: int, stage: int
) -> None:
    assert resolve_zero_stage(EngineConfig(), world_size=ranks) == stage


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_of_the_recipe_holds_for_any_number_of_ranks(stage: int, ranks: int) -> None:
    engine = EngineConfig(zero_stage=stage)  # type: ignore[arg-type]
    assert resolve_zero_stage(engine, world_size=ranks) == stage


def test_several_ranks_cannot_share_nothing() -> None:
    with pytest.raises(
        ConfigError, match=r"engine\.zero_stage = 0 is for one rank, this run has 2"
    ):
        resolve_zero_stage(EngineConfig(zero_stage=0), world_size=2)


@pytest.mark.parametrize(
    "setting",
    [
        {"offload_optimizer": "cpu"},
        {"offload_params": "cpu"},
        {"hpz_partition_size": 2},
        {"quantized_weights": True},
        {"quantized_gradients": True},
    ],
)
def test_a_setting_of_zero_on_one_rank_needs_a_stage(setting: dict[str, object]) -> None:
    engine = EngineConfig(**setting)  # type: ignore[arg-type]
    assert resolve_zero_stage(engine, world_size=2) == 3
    with pytest.raises(ConfigError, match=rf"engine\.{next(iter(setting))} needs ZeRO"):
        resolve_zero_stage(engine, world_size=1)
