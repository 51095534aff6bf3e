"""Every command of the README and of docs/ is run as it stands there, or checked where it needs a
hub, a cluster, a GPU or a network.

The pages are run one after the other in a directory that looks like a clone. What stands behind
```sh says what a block needs: nothing (it is run), `hub`, `cluster`, `gpu` (its commands are parsed
with the options of the programs), `network` (its targets, extras and files exist), `elsewhere`
(other people's programs). The hub of the README's example is on the loopback device.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from docs_pages import GUIDES, README, Block, blocks_of, name_of
from loopback_hub import client_environment, serve_repositories
from repository import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from warm_commands import WarmCommands, on_path

from prep.cli.main import cli as prep_cli
from prep.config import MixtureConfig
from shared import config
from train.cli.main import cli as train_cli
from train.config import TrainConfig

PROGRAMS = {"sft-prep": prep_cli, "sft-train": train_cli}
NEEDS = ("", "hub", "cluster", "gpu", "network", "elsewhere")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Clone:
    """A directory with what a clone has, and the environment of its commands."""

    path: Path
    environment: dict[str, str]

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.path,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    folder = tmp_path_factory.mktemp("docs")
    write_model(folder / "model")
    path = folder / "clone"
    path.mkdir()
    for name in ("prep", "train", "docs"):
        (path / name).symlink_to(ROOT / name)
    with serve_repositories({f"models/{MODEL}": folder / "model"}) as endpoint:
        environment = {**os.environ, **client_environment(folder / "cache", endpoint)}
        environment["OMP_NUM_THREADS"] = "1"
        commands = WarmCommands(folder / "bin", environment)
        environment["PATH"] = on_path(commands.folder)
        yield Clone(path, environment)
        commands.close()


def write_model(root: Path) -> None:
    """A small model of SmolLM2's architecture with its control tokens and chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(["the chain and the tyre of the bike"], trainer)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    root.mkdir()
    tokenizer.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",'
        ' "eos_token": "<|im_end|>"}'
    )
    (root / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    shape = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=tokenizer.get_vocab_size(),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(root)


@pytest.fixture(scope="module")
def begun(clone: Clone) -> Clone:
    """The clone once the README's commands have run, and `make demo` in a few steps: the pages go
    on from there."""
    scripts = [block.text for block in blocks_of(README, "sh") if not block.note]
    assert scripts
    for script in [*scripts, *demo_commands()]:
        done = clone.run(script)
        assert done.returncode == 0, f"{script}\n{done.stderr[-3000:]}"
    return clone


def demo_commands() -> list[str]:
    """Return what `make demo` runs up to the trained model, which gets four steps here."""
    (recipe,) = re.findall(r"^demo: env\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    build, train = (line.replace("$(BIN)/", "").strip() for line in recipe.splitlines()[:2])
    return [build, f"{train} --max-steps 4"]


@pytest.mark.slow
def test_the_example_of_the_readme_gives_a_page_and_a_model(begun: Clone) -> None:
    assert "bike-shop" in (begun.path / "pack.html").read_text(encoding="utf-8")
    assert (begun.path / "runs/bike-shop/model/model.safetensors").is_file()
    assert (begun.path / "runs/bike-shop/loss.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in GUIDES if page != README and blocks_of(page, "sh")], ids=name_of
)
def test_the_commands_of_a_page_run_as_written(begun: Clone, page: Path) -> None:
    for block in blocks_of(page, "sh"):
        if not block.note:
            done = begun.run(block.text)
            assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr[-3000:]}"
    for block in blocks_of(page, "python"):
        done = begun.run(f"{shlex.quote(sys.executable)} -c {shlex.quote(block.text)}")
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_page_begins_with_a_command_or_what_it_is_for(page: Path) -> None:
    assert [block.note for block in blocks_of(page, "sh") if block.note not in NEEDS] == []
    if page != README:
        start = page.read_text(encoding="utf-8").partition("```")[0]
        assert re.search(r"After\s+reading\s+this\s+page", start), "say what the reader can do"
        assert blocks_of(page, "sh"), "show a command near the top"


def checked_blocks(*needs: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{name_of(page)}-{number}")
        for page in GUIDES
        for number, block in enumerate(blocks_of(page, "sh"))
        if block.note in needs
    ]


@pytest.mark.parametrize("block", checked_blocks("hub", "cluster", "gpu"))
def test_a_command_that_is_not_run_has_options_that_exist(block: Block) -> None:
    for line in lines_of(block):
        parse(line)


@pytest.mark.parametrize("block", checked_blocks("network"))
def test_what_an_installation_names_exists(block: Block) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = set(extras["optional-dependencies"])
    for line in lines_of(block):
        for part in re.split(r" && ", line):
            words = shlex.split(part, comments=True)
            if words[0] in PROGRAMS:
                parse(part)
            targets = words[1:] if words[0] == "make" else []
            for word in targets:
                if "=" not in word:
                    assert re.search(rf"^{word}:", MAKEFILE, re.MULTILINE), word
            for found in re.findall(r"(?:EXTRAS=|\.\[)([\w,]+)", part):
                assert set(found.split(",")) <= known, part
            for file in re.findall(r"-c (\S+)", part):
                assert (ROOT / file).is_file(), file
            if words[0] == "docker":
                assert (ROOT / "Dockerfile").is_file()


def lines_of(block: Block) -> list[str]:
    """Return the commands of a block, continued lines put together."""
    joined = block.text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def parse(line: str) -> None:
    """Let click read a command as the program would, without running it."""
    words = shlex.split(line, comments=True)
    command: click.Command = PROGRAMS[words[0]]
    context = command.make_context(words[0], list(words[1:]))
    if isinstance(command, click.Group) and (rest := [*context._protected_args, *context.args]):
        name, inner, others = command.resolve_command(context, rest)
        assert inner is not None
        with context:
            below = inner.make_context(name, list(others), parent=context)
        if name == "launch":
            train_cli.make_context("sft-train", list(below.params["arguments"]))


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{name_of(page)}-{number}")
        for page in GUIDES
        for number, block in enumerate(blocks_of(page, "toml"))
    ],
)
def test_a_file_that_is_shown_can_be_read(block: Block) -> None:
    tables = tomllib.loads(block.text)
    if block.note == "recipe":
        assert config.build(TrainConfig, tables, "page").model.name
        return
    rest: dict[str, Any] = {
        "name": "x",
        "max_seq_len": 64,
        "tokenizer": {"name": "x"},
        "template": {"name": "tulu"},
        "sources": [{"path": "x.jsonl"}],
    }
    assert block.note in ("mixture", "part of a mixture")
    complete = tables if block.note == "mixture" else {**rest, **tables}
    assert config.build(MixtureConfig, complete, "page").sources


def test_the_mixture_of_the_readme_is_the_file_it_names() -> None:
    (shown,) = blocks_of(README, "toml")
    path = ROOT / "docs/examples/bike-shop/mixture.toml"
    assert path.read_text(encoding="utf-8") == shown.text


def test_every_make_target_that_a_page_names_exists() -> None:
    for page in (*GUIDES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), (name_of(page), target)
