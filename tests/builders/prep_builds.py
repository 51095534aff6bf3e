"""Small real builds for tests: a tokenizer trained on the spot, rows written to a file, sft-prep's
own build."""

import json
from pathlib import Path
from typing import Any

from repository import SHARED_DATA

from prep.build.build import build
from prep.build.request import BuildRequest
from prep.config import MixtureConfig
from shared import config
from shared.shard_reader import ShardSet, open_shard_set

REAL_DATA = SHARED_DATA
REAL_FIXTURES = REAL_DATA.parent / "fixtures"
CORPUS = [
    "Hello there! What is 2 + 2? The answer is 4.\n",
    "User: Hi\n\nAssistant: Goodbye, and thanks for all the fish.\n",
    (
        "<think>\nLet me see: 12 x 12 = 144.\n</think>\n\nIt is 144. Caf\u00e9 na\u00efve"
        " \u6771\u4eac.\n"
    ),
] * 20


def small_tokenizer(path: Path, *, eos: str = "<|endoftext|>") -> Path:
    """Write a byte-level BPE tokenizer with ChatML's control tokens and a plain `<think>` pair;
    return its place."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    for content, special in (
        ("<|endoftext|>", True),
        ("<|im_start|>", True),
        ("<|im_end|>", True),
        ("<think>", False),
        ("</think>", False),
    ):
        tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": "<|endoftext|>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    return path


def chat(*turns: str, system: str = "") -> dict[str, Any]:
    """Return a row: turns alternate user, assistant."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user" if i % 2 == 0 else "assistant", "content": turn}
        for i, turn in enumerate(turns)
    ]
    return {"messages": messages}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines; a str is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def mixture_of(
    sources: list[Path] | list[dict[str, Any]],
    tokenizer: Path,
    *,
    template: str = "chatml",
    **tables: Any,
) -> dict[str, Any]:
    """Return the tables of a mixture file."""
    return {
        "name": "test",
        "max_seq_len": 128,
        "tokenizer": {"name": str(tokenizer)},
        "template": {"name": template},
        "sources": [
            source if isinstance(source, dict) else {"path": str(source)} for source in sources
        ],
        **tables,
    }


def plan_of(
    tables: dict[str, Any], out: Path, *, store: Path | None = None, workers: int = 1
) -> BuildRequest:
    """Return the plan of a build of `tables` to `out`."""
    mixture = config.build(MixtureConfig, tables, "test.toml")
    return BuildRequest(mixture, out.parent, out, store or out.parent / "samples", workers, False)


def build_set(
    tables: dict[str, Any],
    out: Path,
    *,
    store: Path | None = None,
    workers: int = 1,
    rebuild: bool = False,
) -> ShardSet:
    """Build and open."""
    build(plan_of(tables, out, store=store, workers=workers), rebuild=rebuild)
    return open_shard_set(out)


def write_toml(path: Path, tables: dict[str, Any]) -> Path:
    """Write mixture tables as TOML."""
    lines = [
        f"{key} = {json.dumps(value)}"
        for key, value in tables.items()
        if not isinstance(value, dict | list)
    ]
    for key, value in tables.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in value.items())]
    for source in tables["sources"]:
        lines += ["[[sources]]", *(f"{k} = {json.dumps(v)}" for k, v in source.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
