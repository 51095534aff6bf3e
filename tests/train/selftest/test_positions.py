"""The check of positions sees angles that depend on the whole row, up to the longest sequence."""

import copy

import pytest
import torch
from rope_models import make
from transformers import PretrainedConfig, PreTrainedModel

from shared.errors import ConfigError
from train.model.attention import register_attention
from train.model.rotary import separate_rotary
from train.selftest import startup_check
from train.selftest.positions import position_check, register_local
from train.selftest.startup_check import check_isolation

ON_THE_ROW = ["phi3-longrope", "llama-dynamic", "phimoe", "phimoe-linear", "olmo3-mixed"]


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two networks of the same weights with local attention."""
    networks = (make(name), make(name))
    for network in networks:
        network.set_attn_implementation(register_local())
    return networks


@pytest.mark.parametrize("longest", [40, 64, 90])
@pytest.mark.parametrize("name", [*ON_THE_ROW, "llama-yarn"])
def test_a_model_with_separate_angles_passes(name: str, longest: int) -> None:
    packed, plain = pair(name)
    separate_rotary(packed)
    assert position_check(packed, plain, longest=longest).is_ok


@pytest.mark.parametrize("name", ON_THE_ROW)
def test_a_model_with_the_angles_of_the_row_fails(name: str) -> None:
    packed, plain = pair(name)
    assert not position_check(packed, plain, longest=40).is_ok


def test_learned_positions_that_do_not_restart_fail() -> None:
    packed, plain = pair("llama-yarn")
    embeddings = packed.get_input_embeddings()
    shift = torch.linspace(-0.5, 0.5, 200)[:, None]
    embeddings.register_forward_hook(lambda _layer, _ids, out: out + shift[: out.shape[1]])
    plain.get_input_embeddings().register_forward_hook(
        lambda _layer, _ids, out: out + shift[: out.shape[1]]
    )
    assert not position_check(packed, plain, longest=40).is_ok


def test_outputs_that_are_not_finite_fail() -> None:
    """Of the pack or of the sequences alone, and of the last sequence too."""
    packed, plain = pair("llama-yarn")
    torch.nn.init.constant_(plain.get_output_embeddings().weight[:1], float("nan"))
    assert not position_check(packed, plain, longest=40).is_ok
    assert not position_check(plain, packed, longest=40).is_ok


def check(config: PretrainedConfig, longest: int) -> None:
    check_isolation(
        config,
        register_attention("per_sequence"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        longest=longest,
    )


@pytest.mark.parametrize("name", ON_THE_ROW)
def test_the_check_at_the_start_of_a_run_sees_angles_of_the_row(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(name).config
    check(config, 200)
    monkeypatch.setattr(startup_check, "separate_rotary", lambda _network: None)
    with pytest.raises(ConfigError, match=r"fails the check '(packed = alone|positions)'"):
        check(config, 200)


def test_the_check_at_the_start_goes_past_any_original_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = copy.deepcopy(make("phi3-longrope").config)
    config.rope_parameters["original_max_position_embeddings"] = 300
    monkeypatch.setattr(startup_check, "_MOST_PRODUCTS", 1)
    check(config, 400)
    monkeypatch.setattr(startup_check, "separate_rotary", lambda _network: None)
    with pytest.raises(ConfigError, match="'positions': logits of a pack with a sequence of 301"):
        check(config, 400)
