"""sft-prep against what its users have today, on the same rows and machine, in one run: tokens per
second and ratios.

    R1    a rendering of the prefix for each turn, the Hugging Face tokenizer with offsets,
          `datasets.map`, 2 processes
    R2    the preparation of TRL: SFTTrainer with assistant_only_loss and packing, 2 processes
          (needs `pip install trl`)
    ours  `sft-prep build` with 2 workers, all of it: read, render, tokenise, mask, verify, pack,
          hash, write

Rows are those of the given files that the template renders, so that all three see the same text.
Ours is measured on `--repeat` copies of them (as separate sources), because one copy would be done
before the processes have started; the references are measured on one copy, without their start-up.

    python tests/bench/bench_prep.py [--conversations GLOB] [--tokenizer DIR] [--repeat 40]
                                     [--skip-trl]
"""

import argparse
import gzip
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prep.build.build import build
from prep.build.request import BuildRequest
from prep.config import MixtureConfig
from prep.inputs import resolve_inputs
from prep.rendering.template import shipped_templates
from prep.sources.reader import iter_chunks
from prep.store.chunk_builder import ChunkBuilder, ChunkSpec
from prep.tokenization.encoder import encoder_spec
from prep.tokenization.tokenizer import load_tokenizer
from shared import config

HERE = Path(__file__).resolve()
DATA = HERE.parents[3] / "shared" / "data"
Row = dict[str, Any]


def renderable(rows: list[Row]) -> list[Row]:
    """Return the rows that the tulu template renders in full, with role and content only."""
    plain = ("system", "user", "assistant")
    return [
        {"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}
        for row in rows
        if all(m["role"] in plain and not m.get("tool_calls") for m in row["messages"])
    ]


def reference_rows(tokenizer_dir: str, template: str, rows: list[Row]) -> tuple[int, float]:
    """R1: return tokens made and seconds taken."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = template

    def encode(row: Row) -> Row:
        messages = row["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tokenizer.apply_chat_template(
                    messages[:index], tokenize=False, add_generation_prompt=True
                )
                through = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
                spans.append((len(before), len(through)))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [
            int(any(a < end and b > start for start, end in spans))
            for a, b in encoded["offset_mapping"]
        ]
        return {"input_ids": encoded["input_ids"], "loss_mask": mask}

    dataset = Dataset.from_list(rows)
    # A first map starts processes and imports, which are not to be measured.
    dataset.select(range(4)).map(encode, num_proc=2)
    began = time.perf_counter()
    encoded = dataset.map(encode, num_proc=2, remove_columns=dataset.column_names)
    seconds = time.perf_counter() - began
    return sum(map(len, encoded["input_ids"])), seconds


def trl_rows(tokenizer_dir: str, template: str, rows: list[Row], folder: Path) -> tuple[int, float]:
    """R2: return tokens made and seconds taken by SFTTrainer's constructor, less those for a few
    rows."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = template
    model_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(model_config)

    def prepare(part: list[Row]) -> tuple[Any, float]:
        arguments = SFTConfig(
            output_dir=str(folder),
            max_length=2048,
            packing=True,
            assistant_only_loss=True,
            dataset_num_proc=2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
        )
        dataset = Dataset.from_list(part)
        began = time.perf_counter()
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer
        )
        return trainer.train_dataset, time.perf_counter() - began

    _, overhead = prepare(rows[:8])
    made, seconds = prepare(rows)
    return sum(map(len, made["input_ids"])), seconds - overhead


def mixture(name: str, tokenizer: str, sources: list[Path]) -> MixtureConfig:
    return config.build(
        MixtureConfig,
        {
            "name": name,
            "max_seq_len": 2048,
            "tokenizer": {"name": tokenizer},
            "template": {"name": "tulu", "add_bos": True},
            "sources": [{"path": str(path)} for path in sources],
        },
        name,
    )


def our_build(
    name: str, tokenizer: str, rows: list[Row], repeat: int, folder: Path
) -> tuple[int, float, int]:
    """Return tokens, seconds and source bytes of a whole build with two workers."""
    folder = folder / name
    folder.mkdir()
    source = folder / "rows.jsonl"
    source.write_bytes(
        b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    )
    copies = [
        Path(shutil.copy(source, folder / f"copy-{number:03d}.jsonl")) for number in range(repeat)
    ]
    # Each copy has other bytes, and so another sample store.
    for number, copy in enumerate(copies):
        with copy.open("ab") as file:
            file.write(b"\n" * number)
    began = time.perf_counter()
    request = BuildRequest(
        mixture(name, tokenizer, copies), folder, folder / "set", folder / "store", 2, False
    )
    made = build(request, rebuild=False)
    seconds = time.perf_counter() - began
    return made.totals.tokens, seconds, sum(copy.stat().st_size for copy in copies)


def our_stages(tokenizer: str, rows: list[Row], folder: Path) -> list[tuple[str, int, float, int]]:
    """Return (stage, tokens, seconds, bytes) in one process, without its start."""
    source = folder / "stages.jsonl"
    source.write_bytes(
        b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    )
    inputs = resolve_inputs(mixture("stages", tokenizer, [source]), folder, {})
    loaded = load_tokenizer(inputs.tokenizer)
    spec = encoder_spec(loaded.tokenizer_json, loaded.control_tokens, "gigatoken")
    builder = ChunkBuilder(ChunkSpec(inputs.template, loaded.special_tokens, "", spec, (), False))
    began = time.perf_counter()
    chunks = list(iter_chunks(inputs.sources[0], source_index=0))
    cut = time.perf_counter()
    # Fills the tokenizer's word cache and compiles the template, as early in a long build.
    builder.build(chunks[0])
    warm = time.perf_counter()
    tokens = sum(builder.build(chunk).facts["tokens"] for chunk in chunks)
    done = time.perf_counter()
    size = source.stat().st_size
    return [
        ("read and cut (1 core)", tokens, cut - began, size),
        ("render, tokenise, mask (1 core)", tokens, done - warm, size),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", default=str(DATA / "conversations" / "*.jsonl.gz"))
    parser.add_argument("--tokenizer", default=str(DATA / "tokenizers" / "olmo2-dolma2"))
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--skip-trl", action="store_true")
    options = parser.parse_args()
    pattern = Path(options.conversations)
    files = sorted(pattern.parent.glob(pattern.name))
    if not files:
        sys.exit(
            f"no conversations at {options.conversations}: give --conversations and --tokenizer"
        )
    template = "{{ bos_token }}" + shipped_templates()["tulu"].read_text().removesuffix("\n")
    every: list[Row] = []
    multi: list[Row] = []
    for file in files:
        with gzip.open(file, "rb") as stream:
            lines = [line for line in stream.read().split(b"\n") if line.strip()]
            rows = renderable([json.loads(line) for line in lines])
        every += rows
        if rows and sum(len(row["messages"]) > 2 for row in rows) > len(rows) / 4:
            multi += rows
    results: list[tuple[str, int, float, int, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens, seconds = reference_rows(options.tokenizer, template, multi)
        r1 = tokens / seconds
        results.append((f"R1, multi-turn ({len(multi):,} rows)", tokens, seconds, 0, "1.0x R1"))
        r2 = 0.0
        if not options.skip_trl:
            tokens, seconds = trl_rows(options.tokenizer, template, every, folder / "trl")
            r2 = tokens / seconds
            results.append((f"R2, all ({len(every):,} rows)", tokens, seconds, 0, "1.0x R2"))
        for stage, tokens, seconds, size in our_stages(options.tokenizer, multi * 4, folder):
            results.append((stage, tokens, seconds, size, f"{tokens / seconds / r1:,.0f}x R1"))
        tokens, seconds, size = our_build(
            "multi", options.tokenizer, multi, 4 * options.repeat, folder
        )
        ratio = f"{tokens / seconds / r1:,.0f}x R1"
        results.append(("sft-prep build, multi-turn", tokens, seconds, size, ratio))
        tokens, seconds, size = our_build("all", options.tokenizer, every, options.repeat, folder)
        ratio = f"{tokens / seconds / r2:,.1f}x R2" if r2 else "-"
        results.append(("sft-prep build, all", tokens, seconds, size, ratio))
    print(f"{'stage':<36} {'tokens':>12} {'seconds':>9} {'tokens/s':>12} {'MB/s':>7}  ratio")
    for stage, tokens, seconds, size, ratio in results:
        speed = f"{size / seconds / 1e6:7.1f}" if size else f"{'-':>7}"
        print(
            f"{stage:<36} {tokens:>12,} {seconds:>9.2f} {tokens / seconds:>12,.0f} {speed}  {ratio}"
        )


if __name__ == "__main__":
    main()
