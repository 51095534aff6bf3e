"""Ids come from tokenizer.json alone, whatever class or model the files beside it name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from loopback_hub import client_environment, serve_repositories
from prep_builds import REAL_DATA, build_set, chat, mixture_of, plan_of, write_rows
from repository import HELPERS
from tokenizer_dirs import ids, loaded_from, write_tokenizer_dir
from trained_tokenizers import CONTROL, digit_groups
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from prep.inputs import resolve_inputs
from prep.rendering.template import TemplateText
from prep.tokenization.at_inference import TEXTS
from prep.tokenization.encoder import encoder_spec
from prep.tokenization.tokenizer import (
    load_tokenizer,
    write_tokenizer,
)
from shared.errors import ConfigError, DataError

CLASSES = [
    *sorted({name for name in TOKENIZER_MAPPING_NAMES.values() if name}),
    "PreTrainedTokenizerFast",
    "Nobodys",
]
BUILT = (
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "GPTNeoXTokenizerFast",
    "CohereTokenizerFast",
    "LlamaTokenizer",
)
OLMO2 = REAL_DATA / "tokenizers" / "olmo2-dolma2"
FROM_HUB = """
import sys
from pathlib import Path
builders, doubles, rows, out, *names = sys.argv[1:]
sys.path[:0] = [builders, doubles]
from prep_builds import build_set, mixture_of
for name in names:
    tables = mixture_of([Path(rows)], Path()) | {"tokenizer": {"name": name}}
    print(build_set(tables, Path(out) / name / "out").manifest.fingerprint)
"""
CHAT = [chat("In 2023?", "It's 1999, not 123456."), chat("Hi", "Yo")]


def test_no_class_and_no_model_beside_it_changes_what_a_tokenizer_json_gives(
    tmp_path: Path,
) -> None:
    text = digit_groups()
    rows = write_rows(tmp_path / "a.jsonl", CHAT)
    model_types = {cls: name for name, cls in TOKENIZER_MAPPING_NAMES.items()}
    digests, contents = set(), set()
    for cls in CLASSES:
        for model_type in ("", model_types.get(cls, "llama")):
            folder = tmp_path / cls / (model_type or "alone") / "tok"
            write_tokenizer_dir(folder, text, cls=cls, model_type=model_type)
            inputs = resolve_inputs(
                plan_of(mixture_of([rows], folder), tmp_path / "out").mixture, tmp_path, {}
            )
            digests.add(inputs.digest)
            contents.add(load_tokenizer(inputs.tokenizer).tokenizer_json)
    assert len(CLASSES) > 50
    assert len(digests) == 1
    (content,) = contents
    theirs, ours = tokenizers.Tokenizer.from_str(text), tokenizers.Tokenizer.from_str(content)
    for sample in (*TEXTS, *(f"a{token}b {token} 2023" for token in CONTROL)):
        assert ours.encode(sample).ids == theirs.encode(sample).ids


def test_a_set_is_the_same_whatever_files_are_beside_tokenizer_json_here_or_on_the_hub(
    tmp_path: Path,
) -> None:
    text, rows = digit_groups(), write_rows(tmp_path / "a.jsonl", CHAT)
    fingerprints, digests, served = set(), set(), {}
    for number, cls in enumerate(BUILT):
        for model_type in ("", ("gpt2", "qwen2", "gpt_neox", "cohere", "llama")[number]):
            folder = write_tokenizer_dir(
                tmp_path / cls / (model_type or "alone") / "tok",
                text,
                cls=cls,
                model_type=model_type,
            )
            served[f"models/org/{cls}-{model_type or 'alone'}"] = folder
            manifest = build_set(mixture_of([rows], folder), folder.parent / "out").manifest
            fingerprints.add(manifest.fingerprint)
            digests.add(manifest.inputs_digest)
    assert len(digests) == 1
    with serve_repositories(served) as endpoint:
        names = [name.removeprefix("models/") for name in served]
        environment = {**os.environ, **client_environment(tmp_path / "home", endpoint)}
        call = [
            sys.executable,
            "-c",
            FROM_HUB,
            str(HELPERS[0]),
            str(HELPERS[1]),
            str(rows),
            str(tmp_path / "hub"),
            *names,
        ]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fingerprints |= set(done.stdout.split())
    assert len(fingerprints) == 1


@pytest.mark.skipif(not OLMO2.is_dir(), reason="no OLMo-2 tokenizer beside the repository")
@pytest.mark.parametrize("model_type", ["", "gpt2", "olmo2"])
def test_olmo_2_takes_three_digits_at_a_time_whatever_class_its_files_name(
    model_type: str, tmp_path: Path
) -> None:
    text = (OLMO2 / "tokenizer.json").read_text(encoding="utf-8")
    folder = write_tokenizer_dir(tmp_path / "tok", text, cls="GPT2Tokenizer", model_type=model_type)
    assert ids("2023", loaded_from(folder)) == [2366, 18]


def test_the_copy_in_a_shard_set_gives_our_ids_beside_the_config_of_any_model(
    tmp_path: Path,
) -> None:
    loaded = loaded_from(write_tokenizer_dir(tmp_path / "tok", digit_groups(), cls="GPT2Tokenizer"))
    spec = encoder_spec(loaded.tokenizer_json, loaded.control_tokens, "transformers")
    write_tokenizer(tmp_path / "out", loaded, spec.tokenizer_json, TemplateText("none", ""))
    # for these transformers uses the model's class, whatever tokenizer_config.json names
    forced = {
        name
        for name, cls in TOKENIZER_MAPPING_NAMES.items()
        if name in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS and cls != "TokenizersBackend"
    }
    assert not forced & {"llama", "olmo2", "olmo3", "qwen3", "mistral", "gemma3"}
    for model_type in ["", *sorted(set(TOKENIZER_MAPPING_NAMES) - forced)]:
        if model_type:
            (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
        for text in (*TEXTS[:4], "<|im_start|>2023<|im_end|>"):
            assert theirs.encode(text, add_special_tokens=False) == ids(text, loaded), model_type


def test_a_named_token_of_the_vocabulary_alone_is_matched_whole_and_is_a_control_token(
    tmp_path: Path,
) -> None:
    text = digit_groups(special=CONTROL[1:], tokens=("</s>", "<unk>"))
    folder = write_tokenizer_dir(
        tmp_path / "tok",
        text,
        eos_token={"__type": "AddedToken", "content": "</s>"},
        bos_token=None,
    )
    loaded = loaded_from(folder)
    assert loaded.special_tokens == {"eos_token": "</s>"}
    assert "</s>" in loaded.control_tokens
    assert loaded.added_tokens["</s>"] is True
    assert "<unk>" not in loaded.added_tokens
    assert ids("a</s>b", loaded)[1] == loaded.special_ids["eos_token"]
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs.encode("a</s>b", add_special_tokens=False) == ids("a</s>b", loaded)


def test_added_tokens_are_listed_with_their_flag(tmp_path: Path) -> None:
    data = json.loads(digit_groups())
    data["added_tokens"][1]["special"] = False
    loaded = loaded_from(
        write_tokenizer_dir(tmp_path / "tok", json.dumps(data), eos_token="<|im_start|>")
    )
    assert loaded.added_tokens == {token: token != CONTROL[1] for token in sorted(CONTROL)}
    assert CONTROL[1] in loaded.control_tokens  # it has a name


def test_a_name_that_decides_the_ids_is_an_input(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", CHAT)
    trees = []
    for eos in ("<|endoftext|>", "<|im_end|>"):
        folder = write_tokenizer_dir(tmp_path / "tok", digit_groups(), eos_token=eos)
        plan = plan_of(mixture_of([rows], folder), tmp_path / "out")
        trees.append(resolve_inputs(plan.mixture, tmp_path, {}))
    assert trees[1].differences(trees[0].tree) == [
        'tokenizer.special_tokens.eos_token: "<|endoftext|>" -> "<|im_end|>"'
    ]


@pytest.mark.parametrize("name", ["eos_token", "bos_token"])
def test_an_eos_or_bos_without_an_id_is_refused(name: str, tmp_path: Path) -> None:
    folder = write_tokenizer_dir(tmp_path / "tok", digit_groups(), **{name: "</s>"})
    with pytest.raises(DataError, match=rf"names '</s>' as its {name}.*tokenizer.add_tokens"):
        loaded_from(folder)
    assert loaded_from(folder, add_tokens=["</s>"]).special_tokens[name] == "</s>"


def test_tokens_that_only_transformers_would_add_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    declared = {"999": {"content": "<|extra|>", "special": True}}
    folder = write_tokenizer_dir(
        tmp_path / "tok", digit_groups(), pad_token="[PAD]", added_tokens_decoder=declared
    )
    loaded = loaded_from(folder)
    assert "list 1 tokens that it does not have (<|extra|>)" in caplog.text
    assert "names '[PAD]' as its pad_token" in caplog.text
    assert loaded.special_tokens.keys() == {"eos_token", "bos_token"}


def test_a_directory_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json, tokenizer\.model or vocab\.json"):
        loaded_from(tmp_path / "tok")


def test_a_tokenizer_json_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    for text in ("{}", "[", '{"model": 3}', "[" * 100_000):
        with pytest.raises(DataError, match="is not a tokenizer"):
            loaded_from(write_tokenizer_dir(tmp_path / "tok", text))
