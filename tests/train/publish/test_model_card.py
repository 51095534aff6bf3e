"""The card of a model: data, recipe, result and software, and no path of the machine it was made
on."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from shard_sets import random_packs, write_shard_set

from shared import config
from shared.shard_format import Manifest
from shared.shard_reader import read_manifest
from train.publish.model_card import CardFacts, card_facts, render_card
from train.recipe_file import load_recipe

RECORDS = [{"step": 7, "train_loss": 1.25, "total_tokens": 12345}]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    packs = random_packs(num_packs=3, max_seq_len=32, vocab_size=50)
    return read_manifest(write_shard_set(tmp_path / "set", packs, max_seq_len=32, vocab_size=50))


def facts_of(
    manifest: Manifest, *, name: str, records: list[dict[str, Any]] | None = None
) -> CardFacts:
    recipe = config.to_plain(load_recipe("tiny"))
    recipe["model"] |= {"name": name, "config": None}
    description = {"recipe": recipe, "versions": {"torch": "2.0", "gone": None}}
    return card_facts(description, manifest, RECORDS if records is None else records)


def test_the_card_names_data_recipe_result_and_software(manifest: Manifest) -> None:
    card = render_card(facts_of(manifest, name="some/model"))
    assert manifest.fingerprint in card
    assert "| rows |" in card
    assert '"learning_rate": 0.001' in card
    assert "| train_loss | 1.25 |" in card
    assert "| total_tokens | 12,345 |" in card
    assert "torch 2.0" in card
    assert "gone" not in card


def test_a_hub_base_model_is_in_the_front_matter_and_a_local_path_is_nowhere(
    manifest: Manifest,
) -> None:
    card = render_card(facts_of(manifest, name="some/model"))
    assert card.split("\n---\n")[0].splitlines()[-4] == 'base_model: "some/model"'
    card = render_card(facts_of(manifest, name="/home/someone/base"))
    assert "base_model:" not in card
    assert "/home/someone" not in card
    assert "Fine-tuned from `base` (a local directory)" in card


def test_random_weights_are_called_so(manifest: Manifest) -> None:
    card = render_card(facts_of(manifest, name=""))
    assert "Trained from random weights." in card
    assert "base_model:" not in card


@pytest.mark.parametrize(
    ("evaluated", "expected"), [([7], "| eval_loss | 2 |"), ([3], None), ([], None)]
)
def test_the_result_is_the_last_training_record_and_the_evaluation_of_its_step(
    evaluated: list[int], expected: str | None, manifest: Manifest
) -> None:
    records = [
        *({"step": step, "eval_loss": 2.0} for step in evaluated),
        {"step": 3, "train_loss": 9.5},
        *RECORDS,
    ]
    card = render_card(facts_of(manifest, name="", records=records))
    assert "| train_loss | 1.25 |" in card
    assert "9.5" not in card
    assert expected in card if expected else "eval_loss |" not in card


def test_a_run_without_records_and_with_a_plot(manifest: Manifest) -> None:
    facts = facts_of(manifest, name="", records=[])
    assert "Nothing was logged." in render_card(facts)
    assert "![curves of the run](loss.png)" in render_card(facts, has_plot=True)
    assert "loss.png" not in render_card(facts)


def test_a_name_with_quotes_does_not_break_the_front_matter(manifest: Manifest) -> None:
    facts = dataclasses.replace(facts_of(manifest, name="some/model"), base_model='a"b: c')
    assert '\nbase_model: "a\\"b: c"\n' in render_card(facts)
