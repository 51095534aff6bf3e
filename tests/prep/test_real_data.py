"""Every row of the real conversations against transformers: ids, and masks by the byte-span
definition.

The expectation is made without any code of prep: the text by `apply_chat_template`, the ids and
offsets by the Hugging Face tokenizer, the trained ranges from what is known of the two formats.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prep_builds import REAL_DATA, build_set, mixture_of

from shared.shard_reader import ShardSet

FILES = sorted((REAL_DATA / "conversations").glob("*.jsonl.gz"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILES, reason="the real conversations are not beside this checkout"),
]
LONGEST = 1 << 16  # no row of the data is longer: nothing is cut


@dataclass(frozen=True)
class Built:
    shards: ShardSet
    tables: dict[str, Any]
    root: Path
    tokenizer: Any


def build_real(root: Path, tokenizer: str, template: dict[str, Any]) -> Built:
    from transformers import AutoTokenizer

    folder = REAL_DATA / "tokenizers" / tokenizer
    tables = mixture_of(FILES, folder, max_seq_len=LONGEST)
    tables["template"] = template
    shards = build_set(tables, root / "whole", workers=2)
    return Built(shards, tables, root, AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def tulu(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_real(
        tmp_path_factory.mktemp("tulu"), "olmo2-dolma2", {"name": "tulu", "add_bos": True}
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_real(tmp_path_factory.mktemp("qwen"), "qwen3", {"name": "tokenizer"})


def rows_of(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rb") as stream:
        return [json.loads(line) for line in stream.read().split(b"\n") if line.strip()]


def sequences_of(shards: ShardSet) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    sequences = {}
    for pack in map(shards.pack, range(shards.num_packs)):
        for origin, start, end in zip(
            pack.seq_origin, pack.seq_offsets[:-1], pack.seq_offsets[1:], strict=True
        ):
            sequences[int(origin[0]), int(origin[1])] = (
                pack.tokens[start:end],
                pack.loss_mask[start:end],
            )
    return sequences


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def tulu_ranges(messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """Return the known rendering and the character ranges that are trained."""
    text, ranges = "<|endoftext|>", []
    for index, message in enumerate(messages):
        text += f"<|{message['role']}|>\n"
        if message["role"] == "assistant":
            ranges.append((len(text), len(text) + len(message["content"]) + len("<|endoftext|>")))
            text += (
                message["content"] + "<|endoftext|>" + ("\n" if index < len(messages) - 1 else "")
            )
        else:
            text += message["content"] + "\n"
    return text, ranges


def qwen_ranges(text: str) -> list[tuple[int, int]]:
    return [
        match.span(1)
        for match in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)
    ]


def expected_mask(offsets: list[tuple[int, int]], ranges: list[tuple[int, int]]) -> np.ndarray:
    spans = np.asarray(offsets).reshape(-1, 2)
    mask = np.zeros(len(spans), np.uint8)
    for start, end in ranges:
        mask |= ((spans[:, 0] < end) & (spans[:, 1] > start)).astype(np.uint8)
    mask[:1] = 0
    return mask


def bodies_of(row: dict[str, Any]) -> str:
    return json.dumps([row["messages"], row.get("tools")], ensure_ascii=False)


def batches(items: list[Any], size: int = 512) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def test_every_row_used_under_tulu_has_the_reference_ids_and_the_defined_mask(tulu: Built) -> None:
    sequences = sequences_of(tulu.shards)
    template = (tulu.shards.tokenizer_dir / "chat_template.jinja").read_text()
    special = tulu.tokenizer.all_special_tokens
    checked = 0
    for source, file in enumerate(FILES):
        rows = list(enumerate(rows_of(file)))
        for batch in batches(
            [(number, row) for number, row in rows if (source, number) in sequences]
        ):
            texts = [
                tulu.tokenizer.apply_chat_template(
                    row["messages"], chat_template=template, tokenize=False
                )
                for _, row in batch
            ]
            encoded = tulu.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for index, (number, row) in enumerate(batch):
                known, ranges = tulu_ranges(row["messages"])
                assert texts[index] == known
                tokens, mask = sequences[source, number]
                if any(token in bodies_of(row) for token in special):
                    continue
                assert tokens.tolist() == encoded["input_ids"][index], (file.name, number)
                assert np.array_equal(
                    mask, expected_mask(encoded["offset_mapping"][index], ranges)
                ), (
                    file.name,
                    number,
                )
                checked += 1
    assert checked == len(sequences) == 25_758


def test_rows_that_tulu_cannot_render_are_left_out_and_counted_and_no_others(tulu: Built) -> None:
    for entry, file in zip(tulu.shards.manifest.sources, FILES, strict=True):
        rows = rows_of(file)
        carried = [
            all(
                m["role"] in ("system", "user", "assistant") and not m.get("tool_calls")
                for m in row["messages"]
            )
            for row in rows
        ]
        assert entry.rows_used == sum(carried)
        assert sum(entry.rows_unrendered.values()) == len(rows) - sum(carried)
        assert entry.rows_rejected == {}
    total = Counter()
    for entry in tulu.shards.manifest.sources:
        total.update(entry.rows_unrendered)
    assert total == {"assistant.tool_calls": 6_321}


def test_every_row_under_qwen3_has_the_reference_ids_and_the_defined_mask(qwen: Built) -> None:
    sequences = sequences_of(qwen.shards)
    special = qwen.tokenizer.all_special_tokens
    checked = 0
    for source, file in enumerate(FILES):
        for batch in batches(list(enumerate(rows_of(file)))):
            # keys that are null are absent, as a Parquet file of these rows has it
            known = [
                without_nulls({"messages": row["messages"], "tools": row.get("tools")})
                for _, row in batch
            ]
            texts = [
                qwen.tokenizer.apply_chat_template(
                    row["messages"], tools=row.get("tools"), tokenize=False
                )
                for row in known
            ]
            encoded = qwen.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for index, (number, row) in enumerate(batch):
                if any(token in bodies_of(row) for token in special):
                    continue
                tokens, mask = sequences[source, number]
                assert tokens.tolist() == encoded["input_ids"][index], (file.name, number)
                expected = expected_mask(
                    encoded["offset_mapping"][index], qwen_ranges(texts[index])
                )
                assert np.array_equal(mask, expected), (file.name, number)
                checked += 1
    assert checked == len(sequences) == 32_079


@pytest.mark.parametrize("max_seq_len", [2048, 4096])
def test_packs_are_dense_and_hold_each_sample_once(tulu: Built, max_seq_len: int) -> None:
    tables = {**tulu.tables, "max_seq_len": max_seq_len}
    shards = build_set(tables, tulu.root / str(max_seq_len), store=tulu.root / "samples")
    assert shards.manifest.totals.density >= 0.995
    origins = np.concatenate([np.asarray(columns["seq_origin"]) for columns in shards.shards])
    assert len(np.unique(origins, axis=0)) == len(origins) == 25_758
