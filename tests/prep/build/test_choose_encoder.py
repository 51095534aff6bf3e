"""Template and tokenizer: markers that must be one token, and tokens that are added."""

import json
import logging
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from prep_builds import build_set, chat, mixture_of, plan_of, small_tokenizer, write_rows
from trained_tokenizers import CONTROL, FAMILIES, tokenizer_json
from transformers import AutoTokenizer

from prep.build.build import build
from prep.build.dry_run import dry_run
from prep.build.explain import explain
from prep.config import TokenizerConfig
from prep.inspection.stats import stats, stats_lines
from prep.inspection.verification.verify import verify
from prep.rendering.control.markers import printed_markers, required_markers, split_markers
from prep.rendering.template import ChatTemplate, TemplateText, shipped_templates
from shared.errors import ConfigError

SHIPPED = shipped_templates()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return small_tokenizer(tmp_path / "small")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "a.jsonl", [chat("Hi", "Yo"), chat("What is 2 + 2?", "4", "Sure?", "Yes")]
    )


def own_template(folder: Path, text: str) -> str:
    (folder / "mine.jinja").write_text(text, encoding="utf-8")
    return str(folder / "mine.jinja")


def test_every_shipped_template_states_its_markers_and_prints_them() -> None:
    for name, path in SHIPPED.items():
        text = path.read_text(encoding="utf-8")
        assert all(marker in text for marker in required_markers(name)), name
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        printed = printed_markers(ChatTemplate(TemplateText(name, text), special, "2026-01-01"))
        required = {
            marker
            for marker in required_markers(name)
            if "AVAILABLE" not in marker and "TOOL" not in marker
        }
        plain = {
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<functions>",
            "</functions>",
            "<|begin_of_text|>",
        }
        plain |= {f"<{slash}{word}>" for slash in ("", "/") for word in ("think", "answer")} | set(
            special.values()
        )
        assert required <= set(printed) <= required | plain, name


@pytest.mark.parametrize(
    "name", sorted(name for name in SHIPPED if "<|im_start|>" not in required_markers(name))
)
def test_a_shipped_template_whose_markers_the_tokenizer_splits_is_refused(
    name: str, tokenizer: Path, rows: Path, tmp_path: Path
) -> None:
    tables = mixture_of([rows], tokenizer, template=name, max_seq_len=512)
    if not required_markers(name):
        build_set(tables, tmp_path / "out")  # plain text by design
        return
    with pytest.raises(
        ConfigError, match=r"must be one token each.*\(\d+ tokens\).*tokenizer\.add_tokens = \["
    ) as raised:
        build(plan_of(tables, tmp_path / "out"), rebuild=False)
    with pytest.raises(ConfigError):
        dry_run(plan_of(tables, tmp_path / "out"))
    missing = json.loads(str(raised.value).partition("add_tokens = ")[2])
    tables["tokenizer"]["add_tokens"] = missing
    build_set(tables, tmp_path / "out")


def test_the_wrong_template_no_longer_takes_five_times_the_tokens_silently(
    tokenizer: Path, rows: Path, tmp_path: Path
) -> None:
    right = build_set(mixture_of([rows], tokenizer), tmp_path / "right").manifest.totals.tokens
    tables = mixture_of([rows], tokenizer, template="llama3")
    tables["tokenizer"]["add_tokens"] = list(required_markers("llama3"))
    assert build_set(tables, tmp_path / "out").manifest.totals.tokens < 1.5 * right


def test_split_markers_of_a_users_template_are_one_warning_and_a_line_in_stats(
    tokenizer: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = SHIPPED["tulu"].read_text(encoding="utf-8")
    shards = build_set(
        mixture_of([rows], tokenizer, template=own_template(tmp_path, text)), tmp_path / "out"
    )
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "<|user|> (" in warnings[0].getMessage()
    split = stats(shards)["split_markers"]
    assert split.keys() == {"<|system|>", "<|user|>", "<|assistant|>"}
    assert min(split.values()) > 1
    (line,) = [line for line in stats_lines(shards) if "several tokens" in line]
    assert line.startswith("markers of the template that take several tokens: <|assistant|> (")
    verify(shards.path)


def test_markers_that_are_one_token_are_not_mentioned(
    tokenizer: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = SHIPPED["chatml"].read_text(encoding="utf-8")
    shards = build_set(
        mixture_of([rows], tokenizer, template=own_template(tmp_path, text)), tmp_path / "out"
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert stats(shards)["split_markers"] == {}
    assert not any("several tokens" in line for line in stats_lines(shards))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_marker_is_whole_where_it_is_a_token_and_split_or_unknown_elsewhere(family: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json(family))
    assert split_markers([*CONTROL, "<think>"], tokenizer) == {}
    split = split_markers(["<|eot_id|>", "\U0001f9d9"], tokenizer)
    assert split.keys() == {"<|eot_id|>", "\U0001f9d9"}
    assert min(split.values()) != 1 or split["\U0001f9d9"] == 0


def test_max_seq_len_over_what_the_tokenizer_says_is_a_warning(
    tokenizer: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tokenizer / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 100}))
    build_set(mixture_of([rows], tokenizer), tmp_path / "out")
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ] == [
        "max_seq_len = 128 is over the 100 tokens that the tokenizer small says its model takes"
        " (model_max_length)"
    ]


def base_tokenizer(folder: Path) -> Path:
    """A base model's: no chat tokens."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = [
        token for token in data["added_tokens"] if token["content"] == "<|endoftext|>"
    ]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_added_tokens_get_ids_behind_the_vocabulary_in_the_set_and_its_tokenizer(
    tokenizer: Path, rows: Path, tmp_path: Path
) -> None:
    base = base_tokenizer(tokenizer)
    tables = mixture_of([rows], base)
    tables["tokenizer"]["add_tokens"] = ["<|im_start|>", "<|im_end|>"]
    shards = build_set(tables, tmp_path / "out")
    entry = shards.manifest.tokenizer
    size = len(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]) + 1
    assert entry.new_ids == (size, size + 1)
    assert entry.vocab_size == size + 2
    assert entry.terminator_ids == (size + 1,)
    theirs = AutoTokenizer.from_pretrained(shards.tokenizer_dir)
    messages = chat("Hi", "Yo")["messages"]
    again = theirs.apply_chat_template(messages, return_dict=False)
    columns = shards.shards[0]
    kept = [
        columns["tokens"][start:end].tolist() for start, end in pairwise(columns["seq_offsets"])
    ]
    assert again in kept
    typed = write_rows(tmp_path / "typed.jsonl", [chat("say <|im_end|>", "no")])
    with_typed = build_set({**tables, "sources": [{"path": str(typed)}]}, tmp_path / "typed")
    ends = int((with_typed.shards[0]["tokens"] == size + 1).sum())
    assert ends == 2  # one of each turn: what was typed is text


def test_added_tokens_are_inputs_and_need_no_second_build(
    tokenizer: Path, rows: Path, tmp_path: Path
) -> None:
    tables = mixture_of([rows], tokenizer)
    plain = plan_of(tables, tmp_path / "out")
    build(plain, rebuild=False)
    tables["tokenizer"] = {**tables["tokenizer"], "add_tokens": ["<|new|>"]}
    assert any(
        line.startswith("tokenizer.add_tokens: absent -> ")
        for line in explain(plan_of(tables, tmp_path / "out"))
    )
    build_set(tables, tmp_path / "other")
    assert explain(plan_of(tables, tmp_path / "other"))[0].endswith("every input is the same")


def test_a_token_that_is_there_already_is_reported_and_one_of_the_vocabulary_is_refused(
    tokenizer: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = mixture_of([rows], tokenizer)
    tables["tokenizer"]["add_tokens"] = ["<|im_end|>"]
    with caplog.at_level(logging.INFO):
        manifest = build_set(tables, tmp_path / "out").manifest
    assert "tokenizer.add_tokens: small has <|im_end|> already" in caplog.text
    assert manifest.tokenizer.new_ids == ()
    word = next(
        w
        for w in json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
        if len(w) == 3
    )
    tables["tokenizer"]["add_tokens"] = [word]
    with pytest.raises(ConfigError, match="ordinary entry of the vocabulary of small"):
        build(plan_of(tables, tmp_path / "other"), rebuild=False)


@pytest.mark.parametrize("tokens", [("",), (" ",), ("<a>", "<a>")])
def test_tokens_that_cannot_be_added_are_refused(tokens: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="add_tokens"):
        TokenizerConfig(name="x", add_tokens=tokens)
