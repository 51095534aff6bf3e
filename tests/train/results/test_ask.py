"""An exported model answers in a batch as it answers each prompt alone; right answers count per
skill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows
from train_runs import train_here
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from shared import config
from shared.errors import ArtifactError, ConfigError, DataError
from train.publish.export import export_model
from train.publish.model_card import card_facts
from train.recipe_file import load_recipe
from train.results.ask import ask, read_questions

PROMPTS = ("Hi", "What is 2 + 2?", "Goodbye, and thanks for all the fish. " * 3)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model: its answers are nonsense, but the same nonsense each time."""
    folder = tmp_path_factory.mktemp("ask")
    rows = write_rows(folder / "rows.jsonl", [chat("Hi", "Hello there!")])
    shard_set = build_set(mixture_of([rows], small_tokenizer(folder / "tokenizer")), folder / "set")
    torch.manual_seed(0)
    model_config = Qwen3Config(
        vocab_size=shard_set.manifest.tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
    )
    recipe = config.to_plain(load_recipe("tiny"))
    export_model(
        state_dict=dict(AutoModelForCausalLM.from_config(model_config).state_dict()),
        model_config=model_config,
        shard_set=shard_set,
        card=card_facts({"recipe": recipe, "versions": {}}, shard_set.manifest, []),
        out_dir=folder / "model",
    )
    return folder / "model"


@pytest.fixture(scope="module")
def answers(model_dir: Path) -> list[str]:
    """What the model answers to each prompt alone, called as in the manual of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    alone = []
    for prompt in PROMPTS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        alone.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    assert len(set(alone)) > 1
    return alone


def _questions(path: Path, answers: list[str], *, field: str = "skill") -> Path:
    """The first answer of each skill is right, later ones are wrong."""
    rows: list[dict[str, Any]] = [
        {field: "short", **chat(PROMPTS[0], answers[0])},
        {field: "short", **chat(PROMPTS[1], "not this")},
        {field: "long", **chat(PROMPTS[2], answers[2])},
    ]
    return write_rows(path, rows)


def test_prompts_in_one_batch_get_the_answers_that_each_gets_alone(
    model_dir: Path, answers: list[str]
) -> None:
    text = "\n".join(ask(model_dir, prompts=PROMPTS, questions=None, show=0, max_new_tokens=8))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert f"user: {prompt}\n  model: {answer}" in text


@pytest.mark.parametrize("field", ["skill", "source"])
def test_right_answers_are_counted_per_skill_and_in_all(
    model_dir: Path, answers: list[str], tmp_path: Path, field: str
) -> None:
    questions = _questions(tmp_path / "questions.jsonl", answers, field=field)
    lines = ask(model_dir, prompts=(), questions=questions, show=0, max_new_tokens=8)
    assert lines == [
        "long   100.0%  (1 of 1)",
        "short   50.0%  (1 of 2)",
        "exact match:  66.7%  (2 of 3)",
    ]


def test_samples_take_skills_in_turn_and_show_what_was_expected(
    model_dir: Path, answers: list[str], tmp_path: Path
) -> None:
    questions = _questions(tmp_path / "questions.jsonl", answers)
    text = "\n".join(ask(model_dir, prompts=(), questions=questions, show=2, max_new_tokens=8))
    assert f"user: {PROMPTS[0]}\n  model: {answers[0]}\n  expected: {answers[0]}" in text
    assert f"user: {PROMPTS[2]}\n  model: {answers[2]}" in text
    assert "not this" not in text


def test_the_command_prints_the_count(model_dir: Path, answers: list[str], tmp_path: Path) -> None:
    questions = _questions(tmp_path / "questions.jsonl", answers)
    result = train_here(
        "ask", model_dir, "--questions", questions, "--show", 0, "--max-new-tokens", 8
    )
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "exact match:  66.7%  (2 of 3)"


def test_nothing_to_ask_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --prompt TEXT or --questions FILE"):
        ask(tmp_path, prompts=(), questions=None, show=0, max_new_tokens=8)


def test_a_directory_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no config\.json"):
        ask(tmp_path, prompts=("Hi",), questions=None, show=0, max_new_tokens=8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: expected an object with `messages`"),
        ("[1]", "line 2: expected an object with `messages`"),
        (
            json.dumps({"messages": [{"role": "user"}]}),
            "line 2: expected an object with `messages`",
        ),
        (
            json.dumps(chat("a question without an answer")),
            "line 2: the conversation does not end in an assistant's",
        ),
    ],
)
def test_a_bad_question_is_named_by_its_line(tmp_path: Path, row: str, message: str) -> None:
    path = write_rows(tmp_path / "questions.jsonl", [chat("Hi", "Hello"), row])
    with pytest.raises(DataError, match=message):
        read_questions(path)


def test_a_missing_or_empty_file_of_questions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no questions"):
        read_questions(tmp_path / "empty.jsonl")
