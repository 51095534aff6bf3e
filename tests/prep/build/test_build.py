"""A build: the same bytes whatever the workers, the interruptions and the place; never an old set
for new inputs."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from prep_builds import (
    build_set,
    chat,
    mixture_of,
    plan_of,
    small_tokenizer,
    write_rows,
    write_toml,
)

from prep.build.build import build
from prep.build.explain import explain
from shared.errors import ArtifactError, ConfigError, PrerequisiteError
from shared.shard_reader import check_hashes, open_shard_set


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def many_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    words = [
        "fish",
        "thanks",
        "What is",
        "The answer",
        "caf\u00e9",
        "144",
        "\n\n",
        "bye",
        "<think>",
        "Hello there!",
    ]
    return [
        chat(
            *(
                " ".join(draw.choices(words, k=draw.randint(1, 12)))
                for _ in range(2 * draw.randint(1, 3))
            )
        )
        for _ in range(number)
    ]


@pytest.fixture
def tables(tokenizer: Path, tmp_path: Path) -> dict[str, Any]:
    first = write_rows(tmp_path / "first.jsonl", many_rows(300, 1))
    second = write_rows(tmp_path / "second.jsonl", many_rows(200, 2))
    return mixture_of([first, second], tokenizer)


def test_workers_do_not_change_the_fingerprint(tables: dict[str, Any], tmp_path: Path) -> None:
    one = build_set(tables, tmp_path / "one", store=tmp_path / "s1", workers=1)
    two = build_set(tables, tmp_path / "two", store=tmp_path / "s2", workers=2)
    assert one.manifest.fingerprint == two.manifest.fingerprint
    assert (tmp_path / "one/manifest.json").read_bytes() == (
        tmp_path / "two/manifest.json"
    ).read_bytes()


def test_the_same_bytes_elsewhere_give_the_same_manifest(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    build_set(tables, tmp_path / "here")
    moved = tmp_path / "moved"
    moved.mkdir()
    for source in tables["sources"]:
        source["path"] = str(shutil.copy(source["path"], moved))
    tables["tokenizer"]["name"] = str(shutil.copytree(tables["tokenizer"]["name"], moved / "small"))
    build_set(tables, tmp_path / "there", store=moved / "samples")
    assert (tmp_path / "here/manifest.json").read_bytes() == (
        tmp_path / "there/manifest.json"
    ).read_bytes()


def test_a_second_build_writes_nothing_and_reads_no_tokenizer(
    tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build_set(tables, out)
    before = {
        path: path.stat().st_mtime_ns
        for path in [*out.rglob("*"), *(tmp_path / "samples").rglob("*")]
    }
    monkeypatch.setattr(
        "prep.build.build.load_tokenizer", lambda *_: pytest.fail("a tokenizer was loaded")
    )
    monkeypatch.setattr(
        "prep.sources.resolve.sha256_file", lambda path: pytest.fail("a source was hashed again")
    )
    build(plan_of(tables, out), rebuild=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_second_build_imports_nothing_heavy(tables: dict[str, Any], tmp_path: Path) -> None:
    build_set(tables, tmp_path / "out", store=tmp_path / "samples")
    file = write_toml(tmp_path / "test.toml", tables)
    script = (
        "import sys\nfrom prep.cli.main import main\nsys.argv = ['sft-prep', 'build', '--mixture',"
        f" {str(file)!r}, '--out', {str(tmp_path / 'out')!r}]\ntry:\n    main()\nexcept SystemExit"
        " as stop:\n    assert not stop.code, stop.code\nheavy = {'transformers', 'datasets',"
        " 'gigatoken', 'tokenizers', 'torch', 'pyarrow'}\nprint(sorted(sys.modules.keys() &"
        " heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def change_source(tables: dict[str, Any]) -> str:
    path = Path(tables["sources"][0]["path"])
    path.write_bytes(path.read_bytes().replace(b"fish", b"fist", 1))
    return "sources.first.content_sha256"


def change_tokenizer(tables: dict[str, Any]) -> str:
    copy = Path(tables["sources"][0]["path"]).parent / "small"
    shutil.copytree(tables["tokenizer"]["name"], copy)
    data = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(data) + " ")
    tables["tokenizer"]["name"] = str(copy)
    return "tokenizer.json: "


def change_template(tables: dict[str, Any]) -> str:
    template = Path(tables["sources"][0]["path"]).parent / "chatml.jinja"
    from prep.rendering.template import shipped_templates

    template.write_text(
        shipped_templates()["chatml"]
        .read_text()
        .replace("if add_generation_prompt", "if  add_generation_prompt")
    )
    tables["template"]["name"] = str(template)
    return "template"


@pytest.mark.parametrize("change", [change_source, change_tokenizer, change_template])
def test_a_changed_input_is_refused_and_named(
    change: Any, tables: dict[str, Any], tmp_path: Path
) -> None:
    first = build_set(tables, tmp_path / "out").manifest
    key = change(tables)
    with pytest.raises(ArtifactError, match=key):
        build(plan_of(tables, tmp_path / "out"), rebuild=False)
    assert any(key in line for line in explain(plan_of(tables, tmp_path / "out")))
    assert open_shard_set(tmp_path / "out").manifest == first
    second = build_set(tables, tmp_path / "out", rebuild=True).manifest
    assert second.inputs_digest != first.inputs_digest
    check_hashes(tmp_path / "out")


def test_another_length_mask_or_mixture_needs_no_tokenizer(
    tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_set(tables, tmp_path / "first")
    monkeypatch.setattr(
        "prep.store.executors.ChunkBuilder", lambda spec: pytest.fail("rows were tokenised again")
    )
    changed = {
        **tables,
        "max_seq_len": 64,
        "mask": {"train_on": "last_assistant"},
        "lengths": {"over_length": "drop"},
    }
    changed["sources"] = [
        {**tables["sources"][0], "fraction": 0.5},
        {**tables["sources"][1], "epochs": 1.5},
    ]
    shards = build_set(changed, tmp_path / "second")
    assert shards.manifest.max_seq_len == 64


def test_every_sample_appears_exactly_once_and_tokens_are_conserved(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    shards = build_set({**tables, "max_seq_len": 4096}, tmp_path / "out")
    origins = np.concatenate([np.asarray(columns["seq_origin"]) for columns in shards.shards])
    assert sorted(map(tuple, origins.tolist())) == [(0, row, 0) for row in range(300)] + [
        (1, row, 0) for row in range(200)
    ]
    stored = sum(np.load(path).size for path in (tmp_path / "samples").glob("*/chunk-*/tokens.npy"))
    assert shards.manifest.totals.tokens == stored


def test_over_length_rows_are_cut_or_dropped_counted_and_listed(
    tokenizer: Path, tmp_path: Path
) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [chat("Hi", "short"), chat("Hi", "long " * 200), chat("Hi " * 200, "unseen")],
    )
    tables = mixture_of([rows], tokenizer)
    cut = build_set(tables, tmp_path / "cut")
    assert cut.manifest.sources[0].rows_truncated == 1
    assert cut.manifest.sources[0].rows_without_terminator == 1
    assert cut.manifest.sources[0].rows_dropped == {"few_loss_tokens": 1}
    assert [(event["row"], event["reason"]) for event in listed(tmp_path / "cut")] == [
        (1, "truncated"), (2, "few_loss_tokens")
    ]  # fmt: skip
    dropped = build_set({**tables, "lengths": {"over_length": "drop"}}, tmp_path / "dropped")
    assert dropped.manifest.sources[0].rows_dropped == {"over_length": 2}
    assert [(event["row"], event["reason"]) for event in listed(tmp_path / "dropped")] == [
        (1, "over_length"), (2, "over_length")
    ]  # fmt: skip


def test_two_builders_of_one_set_do_not_meet(tables: dict[str, Any], tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom shared.atomic import exclusive_lock\nwith"
        " exclusive_lock(Path(sys.argv[1]), 'building'):\n    print('held', flush=True)\n   "
        " sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / ".out.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(ArtifactError, match="another process is building"):
        build(plan_of(tables, tmp_path / "out"), rebuild=False)
    holder.communicate(b"")
    build(plan_of(tables, tmp_path / "out"), rebuild=False)


def test_a_failing_build_leaves_the_old_set_as_it_was(
    tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_set(tables, tmp_path / "out").manifest
    change_source(tables)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prep.writing.columns.write_shard", fail)
    with pytest.raises(PrerequisiteError, match="No space left"):
        build(plan_of(tables, tmp_path / "out"), rebuild=True)
    assert open_shard_set(tmp_path / "out").manifest == first
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")) == []


def listed(out: Path) -> list[dict[str, Any]]:
    data = zstandard.decompress((out / "rejects.jsonl.zst").read_bytes()).decode("utf-8")
    return [json.loads(line) for line in data.splitlines()]


def test_add_bos_without_a_bos_or_with_a_second_one_is_refused(
    tokenizer: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a", "b")])
    template = tmp_path / "own.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    )
    tables = {**mixture_of([rows], tokenizer), "template": {"name": str(template), "add_bos": True}}
    with pytest.raises(ConfigError, match="prints '<|endoftext|>' itself".replace("|", r"\|")):
        build(plan_of(tables, tmp_path / "out"), rebuild=False)
    bare = shutil.copytree(tokenizer, tmp_path / "bare")
    (bare / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}'
    )
    tables = {**mixture_of([rows], bare), "template": {"name": "chatml", "add_bos": True}}
    with pytest.raises(ConfigError, match="has no BOS token"):
        build(plan_of(tables, tmp_path / "out"), rebuild=False)
