"""The shipped recipes and mixtures against the facts of the runs that they mirror."""

from dataclasses import dataclass

import pytest

from prep.config import load_mixture, shipped_mixtures
from shared.config import first_comment
from shared.errors import ConfigError
from train.data.step_order import check_divides
from train.recipe_file import load_recipe, shipped_recipes


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """The facts of a run, from scripts, papers and model cards."""

    model: str
    rate: float
    rows_per_step: int
    packs_per_step: int  # rows x about 490 tokens / 4096
    checkpointing: bool
    ranks: tuple[int, ...]  # over which the fast form divides


FACTS = {
    "tulu3-8b": Fact(
        model="meta-llama/Llama-3.1-8B",
        rate=5e-6,
        rows_per_step=128,
        packs_per_step=16,
        checkpointing=True,
        ranks=(1, 2, 4, 8, 16),
    ),
    "olmo2-7b": Fact(
        model="allenai/OLMo-2-1124-7B",
        rate=2e-5,
        rows_per_step=128,
        packs_per_step=16,
        checkpointing=False,
        ranks=(1, 2, 4, 8, 16),
    ),
    "olmo2-13b": Fact(
        model="allenai/OLMo-2-1124-13B",
        rate=5e-6,
        rows_per_step=64,
        packs_per_step=8,
        checkpointing=True,
        ranks=(1, 2, 4, 8),
    ),
    "olmo2-32b": Fact(
        model="allenai/OLMo-2-0325-32B",
        rate=4e-6,
        rows_per_step=256,
        packs_per_step=32,
        checkpointing=True,
        ranks=(1, 2, 4, 8, 16, 32),
    ),
}
FORMS = [name + form for name in FACTS for form in ("", "-released")]


@pytest.mark.parametrize("name", FORMS)
def test_a_recipe_has_the_facts_of_its_run(name: str) -> None:
    fact, recipe = FACTS[name.removesuffix("-released")], load_recipe(name)
    assert recipe.model.name == fact.model
    assert recipe.model.gradient_checkpointing is fact.checkpointing
    assert recipe.optim.learning_rate == fact.rate
    assert (recipe.optim.betas, recipe.optim.eps, recipe.optim.weight_decay) == (
        (0.9, 0.999),
        1e-8,
        0.0,
    )
    assert recipe.optim.max_grad_norm == 1.0
    assert (recipe.schedule.kind, recipe.schedule.warmup_ratio, recipe.schedule.epochs) == (
        "linear",
        0.03,
        2,
    )
    assert recipe.run.seed == 8
    assert recipe.engine.zero_stage == "auto"


@pytest.mark.parametrize("name", FACTS)
def test_the_fast_form_keeps_the_tokens_of_a_step_and_divides(name: str) -> None:
    fact, recipe = FACTS[name], load_recipe(name)
    assert recipe.loss.norm == "token"
    assert recipe.batch.packs_per_step == fact.packs_per_step
    assert abs(fact.packs_per_step - fact.rows_per_step * 490 / 4096) < 1.5
    for ranks in fact.ranks:
        check_divides(packs_per_step=fact.packs_per_step, packs_per_micro_batch=1, world_size=ranks)
    with pytest.raises(ConfigError, match="do not divide"):
        check_divides(packs_per_step=fact.packs_per_step, packs_per_micro_batch=1, world_size=64)


@pytest.mark.parametrize("name", FACTS)
def test_the_released_form_sums_over_exactly_as_many_conversations(name: str) -> None:
    fact, recipe = FACTS[name], load_recipe(f"{name}-released")
    assert recipe.batch.conversations_per_step == fact.rows_per_step
    assert (recipe.loss.norm, recipe.loss.divisor) == ("sum", fact.rows_per_step)


def test_the_debug_run() -> None:
    recipe, (mixture, _) = load_recipe("debug"), load_mixture("tulu3-debug")
    assert (recipe.model.name, recipe.batch.conversations_per_step) == ("Qwen/Qwen3-0.6B", 4)
    assert (recipe.optim.learning_rate, recipe.schedule.epochs, recipe.run.seed) == (5e-6, 2, 123)
    assert (mixture.max_seq_len, mixture.sources[0].rows, mixture.recipe) == (1024, 100, "debug")
    assert mixture.sources[0].path == "allenai/tulu-3-sft-personas-algebra"


@pytest.mark.parametrize(
    ("name", "tokenizer", "add_bos", "data"),
    [
        ("tulu3", "meta-llama/Llama-3.1-8B", False, "allenai/tulu-3-sft-mixture"),
        ("olmo2", "allenai/OLMo-2-1124-7B", True, "allenai/tulu-3-sft-olmo-2-mixture-0225"),
    ],
)
def test_a_mixture_has_the_facts_of_its_runs(
    name: str, tokenizer: str, add_bos: bool, data: str
) -> None:
    mixture, _ = load_mixture(name)
    assert (mixture.tokenizer.name, mixture.template.name, mixture.template.add_bos) == (
        tokenizer,
        "tulu",
        add_bos,
    )
    assert mixture.max_seq_len == 4096
    assert [source.path for source in mixture.sources] == [data]
    assert mixture.sources[0].rows is mixture.sources[0].fraction is None  # the whole mixture
    assert (mixture.mask.train_on, mixture.mask.boundary) == ("assistant", "inside")


@pytest.mark.parametrize("name", shipped_mixtures())
def test_every_mixture_names_a_recipe_that_ships(name: str) -> None:
    mixture, _ = load_mixture(name)
    assert mixture.name == name
    assert mixture.recipe in shipped_recipes()


@pytest.mark.parametrize("path", [*shipped_mixtures().values(), *shipped_recipes().values()])
def test_every_file_begins_with_a_line_about_its_purpose(path: object) -> None:
    assert first_comment(path)  # type: ignore[arg-type]
