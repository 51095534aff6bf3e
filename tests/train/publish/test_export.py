"""The export: transformers loads it, it computes what was trained, and its tokenizer gives the
trained ids."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows
from train_runs import train_apart, train_here, weights, write_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, Qwen3Config

from prep.demo import generate
from shared import config
from shared.errors import ArtifactError, ChecksumError, FingerprintMismatchError
from shared.shard_reader import ShardSet
from train.publish.export import export_checkpoint, export_model
from train.publish.model_card import CardFacts, card_facts, render_card
from train.recipe_file import load_recipe

ROWS = [
    chat(
        "Hi",
        "Hello there!",
        "2 + 2?",
        "The answer is 4.",
        system="Be kind. <|im_end|> is only text.",
    ),
    chat("  spaces \n\n and lines ", "Caf\u00e9 \u6771\u4eac <think>\nhm\n</think>\n\nyes"),
]
DEMO_TOKENIZER = Path(generate.__file__).parent / "tokenizer"


def _shards(folder: Path, *, tokenizer: Path, **tables: Any) -> ShardSet:
    rows = write_rows(folder / "rows.jsonl", ROWS)
    return build_set(mixture_of([rows], tokenizer, **tables), folder / "set")


def _config(shard_set: ShardSet, *, tied: bool) -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=shard_set.manifest.tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )


def _card(shard_set: ShardSet) -> CardFacts:
    recipe = config.to_plain(load_recipe("tiny"))
    return card_facts(
        {"recipe": recipe, "versions": {"torch": "0", "gone": None}}, shard_set.manifest, []
    )


def _export(
    out: Path,
    shard_set: ShardSet,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
) -> Any:
    """Export a random model; return it."""
    torch.manual_seed(0)
    model_config = _config(shard_set, tied=tied)
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype).eval()
    # as a gathered state dict has it: a tied head is a second tensor, not the same one
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    export_model(
        state_dict=state,
        model_config=model_config,
        shard_set=shard_set,
        card=_card(shard_set),
        out_dir=out,
        replace=replace,
    )
    return model


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("export")
    return _shards(folder, tokenizer=small_tokenizer(folder / "tokenizer"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_loads_whole_and_computes_the_same(
    tmp_path: Path, shards: ShardSet, tied: bool, dtype: torch.dtype
) -> None:
    model = _export(tmp_path / "model", shards, tied=tied, dtype=dtype)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.from_numpy(shards.pack(0).tokens.astype("int64"))[None]
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("add_bos", [True, False])
def test_rendering_a_conversation_with_the_export_gives_the_trained_ids(
    tmp_path: Path, add_bos: bool
) -> None:
    template = {"name": "chatml", "add_bos": add_bos}
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[1:])
    tables = mixture_of([rows], small_tokenizer(tmp_path / "tokenizer")) | {"template": template}
    shard_set = build_set(tables, tmp_path / "set")
    _export(tmp_path / "model", shard_set)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    trained = shard_set.pack(0).tokens.tolist()
    messages = ROWS[1]["messages"]
    assert tokenizer.apply_chat_template(messages, return_dict=False) == trained
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.encode(text, add_special_tokens=False) == trained
    assert tokenizer.encode(text) == trained, "the tokenizer adds a token of its own"
    assert (trained[0] == tokenizer.bos_token_id) == add_bos


def test_generation_stops_at_terminators_and_eos(tmp_path: Path, shards: ShardSet) -> None:
    _export(tmp_path / "model", shards)
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert settings["eos_token_id"] == [end_of_turn, end_of_text]
    assert settings["pad_token_id"] == end_of_text
    assert settings["bos_token_id"] == shards.manifest.tokenizer.bos_token_id


def test_a_tokenizer_without_pad_gets_one_in_its_config_only(
    tmp_path: Path, shards: ShardSet
) -> None:
    _export(tmp_path / "model", shards)
    assert shards.manifest.tokenizer.pad_token_id is None
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token == "<|endoftext|>"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_bytes() == (
            shards.tokenizer_dir / name
        ).read_bytes()


def test_a_tokenizer_with_pad_is_copied_as_it_is(tmp_path: Path) -> None:
    shard_set = _shards(tmp_path, tokenizer=DEMO_TOKENIZER)
    _export(tmp_path / "model", shard_set)
    for name in shard_set.manifest.tokenizer.files:
        assert (tmp_path / "model" / name).read_bytes() == (
            shard_set.tokenizer_dir / name
        ).read_bytes()
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert settings["pad_token_id"] == shard_set.manifest.tokenizer.pad_token_id


def test_every_file_of_the_export_has_the_mode_of_a_plain_file(
    tmp_path: Path, shards: ShardSet
) -> None:
    _export(tmp_path / "model", shards)
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in (tmp_path / "model").iterdir()} == {
        (tmp_path / "plain").stat().st_mode
    }


def test_weights_that_do_not_fill_the_model_leave_nothing_behind(
    tmp_path: Path, shards: ShardSet
) -> None:
    model_config = _config(shards, tied=True)
    state = dict(AutoModelForCausalLM.from_config(model_config).state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(
        ArtifactError,
        match=r"lack 1 parameters of the model, e\.g\. model\.layers\.1\.mlp\.up_proj",
    ):
        export_model(
            state_dict=state,
            model_config=model_config,
            shard_set=shards,
            card=_card(shards),
            out_dir=tmp_path / "m",
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_of_other_shapes_leave_the_older_export_alone(
    tmp_path: Path, shards: ShardSet
) -> None:
    _export(tmp_path / "model", shards)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    model_config = _config(shards, tied=True)
    state = dict(AutoModelForCausalLM.from_config(model_config).state_dict())
    state["model.norm.weight"] = torch.ones(17)
    with pytest.raises((ArtifactError, RuntimeError)):
        export_model(
            state_dict=state,
            model_config=model_config,
            shard_set=shards,
            card=_card(shards),
            out_dir=tmp_path / "model",
            replace=True,
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_export_leaves_no_model(
    tmp_path: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: CardFacts, **_options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.publish.export.render_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _export(tmp_path / "model", shards)
    assert list(tmp_path.iterdir()) == []


def _tree(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def test_the_same_export_again_leaves_nothing_of_the_first(
    tmp_path: Path, shards: ShardSet
) -> None:
    _export(tmp_path / "model", shards)
    before = _tree(tmp_path)
    _export(tmp_path / "model", shards, replace=True)
    assert _tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_replaces_another_but_keeps_every_file_that_it_does_not_hold_again(
    tmp_path: Path, shards: ShardSet
) -> None:
    out = tmp_path / "model"
    for number in (1, 2):
        _export(out, shards, replace=True)
        (out / "notes" / "empty").mkdir(parents=True)
        (out / "notes" / "a.txt").write_text(f"mine {number}")
        (out / "README.md").write_text(f"my card {number}")
        (out / "linked.json").symlink_to("config.json")
    _export(out, shards, replace=True)
    kept = {"README.md", "linked.json", "notes", "notes/a.txt", "notes/empty"}
    for number in (1, 2):
        old = tmp_path / f"model-old-{number}"
        assert {str(path.relative_to(old)) for path in old.rglob("*")} == kept
        assert (old / "notes" / "a.txt").read_text() == f"mine {number}"
        assert (old / "README.md").read_text() == f"my card {number}"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model-old-1", "model-old-2"}
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("is_link", [True, False])
def test_a_link_or_a_file_at_the_path_of_an_export_is_kept(
    is_link: bool, tmp_path: Path, shards: ShardSet
) -> None:
    mine, out = tmp_path / "mine", tmp_path / "model"
    if is_link:
        mine.mkdir()
        (mine / "config.json").write_text("mine")
        out.symlink_to(mine)
    else:
        out.write_text("mine")
    _export(out, shards, replace=True)
    assert (tmp_path / "model-old-1").is_symlink() == is_link
    assert (mine / "config.json" if is_link else tmp_path / "model-old-1").read_text() == "mine"
    assert out.is_dir() and not out.is_symlink()  # noqa: PT018


def test_a_file_that_appears_while_an_export_is_written_stays(
    tmp_path: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(facts: CardFacts, **options: Any) -> str:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "notes").write_text("mine")
        return render_card(facts, **options)

    monkeypatch.setattr("train.publish.export.render_card", late)
    with pytest.raises(ArtifactError, match="appeared while it was being built"):
        _export(tmp_path / "model", shards)
    assert _tree(tmp_path) == {"model/notes": b"mine"}


# ---- export of a checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    shard_set, recipe = write_inputs(folder)
    result = train_here(
        "--shards", shard_set, "--recipe", recipe, "--output", folder / "run", "--max-steps", 2
    )
    assert result.exit_code == 0, result.output
    return folder / "run"


def _checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def test_the_export_of_the_last_checkpoint_is_the_trained_model(run: Path, tmp_path: Path) -> None:
    result = train_apart("export", _checkpoint(run), tmp_path / "model")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "model"), "DeepSpeed's prints are not results"
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        path.name
        for path in (run / "model").iterdir()
        if path.name != "loss.png"  # of the whole run
    }
    trained, exported = weights(run), weights(tmp_path)
    assert trained.keys() == exported.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=0, msg=name)


def test_a_run_that_exports_again_keeps_what_a_user_put_into_its_model(tmp_path: Path) -> None:
    shard_set, recipe = write_inputs(tmp_path)
    arguments = (
        "--shards",
        shard_set,
        "--recipe",
        recipe,
        "--output",
        tmp_path / "run",
        "--max-steps",
        2,
    )
    assert train_here(*arguments).exit_code == 0
    (tmp_path / "run" / "model" / "eval.txt").write_text("mine")
    (tmp_path / "run" / "status.json").unlink()  # as if it had been killed before its last word
    result = train_here(*arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "model-old-1" / "eval.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "model" / "eval.txt").exists()


def test_an_existing_directory_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="exists; give a path that does not"):
        export_checkpoint(_checkpoint(run), tmp_path)


def test_a_link_to_nothing_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("gone")
    with pytest.raises(ArtifactError, match="exists; give a path that does not"):
        export_checkpoint(_checkpoint(run), tmp_path / "model")


def test_a_changed_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "checkpoints" / "step-00000002"
    shutil.copytree(_checkpoint(run), copy)
    part = next(path for path in (copy / "engine").rglob("*.pt"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(ChecksumError, match="its bytes have changed"):
        export_checkpoint(copy, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_shard_set_in_the_old_place_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "checkpoints" / "step-00000002"
    shutil.copytree(_checkpoint(run), copy)
    description = json.loads((copy / "run.json").read_text())
    description["shards"]["fingerprint"] = "0" * 64
    state = json.loads((copy / "state.json").read_text())
    del state["files"]["run.json"]
    (copy / "run.json").write_text(json.dumps(description))
    (copy / "state.json").write_text(json.dumps(state))
    with pytest.raises(FingerprintMismatchError, match="0000000000000000"):
        export_checkpoint(copy, tmp_path / "model")


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_an_export_in_several_files_of_a_chosen_dtype_is_the_same_model(
    dtype: str, expected: torch.dtype, run: Path, tmp_path: Path
) -> None:
    done = train_here(
        "export", _checkpoint(run), tmp_path / "m", "--dtype", dtype, "--max-file-size", "20KB"
    )
    assert done.exit_code == 0, done.output
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    ids = torch.arange(12)[None]
    tolerance = 0.0 if dtype == "fp32" else 0.05
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits.float(), trained(ids).logits, rtol=tolerance, atol=tolerance
        )


def test_a_size_that_is_none_leaves_nothing(run: Path, tmp_path: Path) -> None:
    done = train_here("export", _checkpoint(run), tmp_path / "m", "--max-file-size", "big")
    assert done.exit_code == 3
    assert "max-file-size" in done.stderr
    assert not (tmp_path / "m").exists()
