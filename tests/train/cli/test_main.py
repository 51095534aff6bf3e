"""The command line: light start, one clear line and the right exit code for what users get
wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shard_sets import random_packs, write_shard_set
from train_runs import RECIPE, VOCAB, command, train_apart, train_here, write_inputs

ALLOWED_AT_HELP = {"click", "train", "shared", "colorama", "typing_extensions"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"], ["recipes"]])
def test_help_imports_click_and_the_standard_library_only(arguments: list[str]) -> None:
    probe = (
        "import sys; before = set(sys.modules)\n"
        "from train.cli.main import main\n"
        "sys.argv = ['sft-train', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print('\\nIMPORTED', *sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *arguments], capture_output=True, text=True, check=True
    )
    imported = set(done.stdout.rpartition("IMPORTED")[2].split())
    assert imported <= ALLOWED_AT_HELP


def test_every_command_shows_a_runnable_example() -> None:
    from train.cli.main import cli

    assert "Example: sft-train --shards" in train_here("--help").output
    for name in cli.commands:
        assert f"Example: sft-train {name}" in train_here(name, "--help").output


def fails(exit_code: int, message: str, *arguments: object) -> None:
    result = train_here(*arguments)
    assert result.exit_code == exit_code, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_missing_shards(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    fails(
        5,
        "does not exist; make one with sft-prep build",
        "--shards",
        tmp_path / "none",
        "--recipe",
        inputs[1],
    )


def test_a_directory_that_is_no_shard_set(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    fails(5, "has no manifest.json", "--shards", tmp_path, "--recipe", inputs[1])


def test_a_truncated_shard(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    shards = shutil.copytree(inputs[0], tmp_path / "set")
    tokens = shards / "shards" / "00000" / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    fails(
        5, "tokens.npy has", "--shards", shards, "--recipe", inputs[1], "--output", tmp_path / "run"
    )


@pytest.mark.parametrize(
    ("column", "offset", "value", "message"),
    [
        ("tokens", 131, 0x7F, "holds token"),  # the high byte of the first token
        ("loss_mask", 128, 1, "loss tokens in loss_mask.npy"),
    ],
)
def test_a_flipped_byte_that_would_spoil_the_training(
    column: str, offset: int, value: int, message: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    shards = shutil.copytree(inputs[0], tmp_path / "set")
    file = shards / "shards" / "00000" / f"{column}.npy"
    data = bytearray(file.read_bytes())
    data[offset] = value
    file.write_bytes(data)
    result = train_here(
        "--shards", shards, "--recipe", inputs[1], "--output", tmp_path / "run", "-q"
    )
    assert result.exit_code == 5
    assert result.stderr.startswith("error: ")
    assert "pack 0 " in result.stderr
    assert message in result.stderr


def test_other_shards_on_resume(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert (
        train_here(
            "--shards", inputs[0], "--recipe", inputs[1], "--output", run, "--stop-after", 1
        ).exit_code
        == 75
    )
    packs = random_packs(num_packs=10, max_seq_len=32, vocab_size=VOCAB, seed=9)
    other = write_shard_set(tmp_path / "other", packs, max_seq_len=32, vocab_size=VOCAB)
    fails(
        5,
        "was trained on shards with fingerprint",
        "--shards",
        other,
        "--recipe",
        inputs[1],
        "--output",
        run,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--set", "optim.learning_rate=1e-4"), "optim.learning_rate = 0.003, now it is 0.0001"),
        (("--max-steps", "3"), "(1 more differ)"),
        (("--set", "loss.norm=sum"), 'loss.norm = "token", now it is "sum"'),
        (("--set", "run.seed=3"), "run.seed = 0, now it is 3"),
    ],
)
def test_another_recipe_on_resume_names_the_key(
    change: tuple[str, ...], message: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    assert train_here(*call, "--stop-after", 1).exit_code == 75
    fails(3, message, *call, *change)


def test_logging_and_checkpoint_frequency_may_change_on_resume(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    call = (
        "--shards",
        inputs[0],
        "--recipe",
        inputs[1],
        "--output",
        tmp_path / "run",
        "--max-steps",
        2,
    )
    assert train_here(*call, "--stop-after", 1).exit_code == 75
    changes = (
        "--set",
        "log.every_steps=2",
        "--set",
        "checkpoint.every_steps=7",
        "--set",
        "checkpoint.keep_last=1",
    )
    assert train_here(*call, *changes).exit_code == 0


def test_resume_never_refuses_an_existing_run(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", tmp_path / "run")
    assert train_here(*call, "--stop-after", 1).exit_code == 75
    fails(5, "holds a run already", *call, "--resume", "never")
    fails(5, "there is no such checkpoint", *call, "--resume", tmp_path / "nothing")
    fails(5, "is not a checkpoint of", *call, "--resume", inputs[0])


def test_resume_from_an_older_checkpoint_of_the_run(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    assert train_here(*call, "--stop-after", 4).exit_code == 75
    result = train_here(*call, "--stop-after", 1, "--resume", run / "checkpoints" / "step-00000002")
    assert result.exit_code == 75
    assert "resuming after step 2" in result.stderr
    assert [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2, 3]


def test_a_batch_that_does_not_divide(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", tmp_path / "run")
    expected = "4 packs per step do not divide over 3 ranks x 1 packs per micro-batch"
    fails(3, expected, *call, "--nproc-per-node", 3)
    fails(3, "use 3 or 6 packs per step, or 1, 2, 4 ranks", *call, "--nproc-per-node", 3)
    fails(3, "1 ranks x 3 packs", *call, "--set", "batch.packs_per_micro_batch=3")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_batch_that_divides_with_smaller_micro_batches_names_them(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", tmp_path / "run")
    told = "set batch.packs_per_micro_batch = 2, which changes no gradient, or use 8 packs per step"
    fails(3, told, *call, "--nproc-per-node", 2, "--set", "batch.packs_per_micro_batch=4")


def test_what_is_no_checkpoint_is_never_to_be_removed(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run, "--stop-after", 2)
    assert train_here(*call).exit_code == 75
    there = f"give a checkpoint, such as {run / 'checkpoints' / 'step-00000002'}"
    fails(5, f"{run} is a run; {there}", "export", run, out)
    fails(
        5,
        f"no checkpoint of this run was evaluated; {there}",
        "export",
        run / "checkpoints" / "best",
        out,
    )
    fails(5, f"does not exist; {there}", "export", run / "checkpoints" / "step-00000003", out)
    fails(
        5,
        "does not exist; give a checkpoint: RUN/checkpoints/step-N",
        "export",
        tmp_path / "none",
        out,
    )
    fails(
        5, "is no checkpoint; give a checkpoint: RUN/checkpoints/step-N", "export", inputs[0], out
    )
    fails(
        5,
        "does not exist; give the directory of a run",
        "push",
        run / "checkpoints" / "best",
        "user/name",
    )


def test_a_start_that_failed_claims_nothing(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """The model was mistyped; the corrected command may use the same directory."""
    recipe = tmp_path / "named.toml"
    text = inputs[1].read_text()
    recipe.write_text('name = "tiny"\n[model]\nname = "no-model"\n' + text[text.index("[optim]") :])
    (tmp_path / "no-model").mkdir()
    run = tmp_path / "run"
    failed = train_here("--shards", inputs[0], "--recipe", recipe, "--output", run)
    assert failed.exit_code == 5
    assert (run / "config.json").exists()
    assert (
        train_here(
            "--shards", inputs[0], "--recipe", inputs[1], "--output", run, "--stop-after", 1
        ).exit_code
        == 75
    )
    fails(3, "was begun with", "--shards", inputs[0], "--recipe", recipe, "--output", run)


def test_a_wandb_that_is_not_logged_in(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key\nconfigured.")

    monkeypatch.setattr(wandb, "init", refuse)
    call = (
        "--shards",
        inputs[0],
        "--recipe",
        inputs[1],
        "--output",
        tmp_path / "run",
        "--set",
        "log.wandb=online",
    )
    failed = train_here(*call)
    assert failed.exit_code == 6
    assert (
        "log.wandb = 'online': No API key configured.; log in with `wandb login`" in failed.stderr
    )


def test_a_batch_in_tokens_that_is_no_whole_number_of_packs(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "tokens.toml"
    recipe.write_text(RECIPE.replace("packs_per_step = 4", "tokens_per_step = 100"))
    fails(
        3,
        "not a multiple of the shards' max_seq_len 32; use 96 or 128",
        "--shards",
        inputs[0],
        "--recipe",
        recipe,
    )


def test_shards_without_loss_tokens(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    packs = [[([1, 2, 3], [0, 0, 0])]]
    shards = write_shard_set(tmp_path / "masked", packs, max_seq_len=8, vocab_size=VOCAB)
    fails(4, "has no loss tokens", "--shards", shards, "--recipe", inputs[1])


def test_a_model_with_too_small_a_vocabulary(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", tmp_path / "run", "-q")
    fails(3, "model.resize_vocab = true", *call, "--set", "model.config.vocab_size=10")


def test_an_unknown_key_names_the_nearest(inputs: tuple[Path, Path]) -> None:
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--set", "optim.learning_rat=1")
    fails(3, "unknown key 'optim.learning_rat'; did you mean 'learning_rate'?", *call)


def test_an_unknown_recipe_lists_what_ships(inputs: tuple[Path, Path]) -> None:
    fails(
        3,
        "no recipe named 'nonsense'; shipped: debug",
        "--shards",
        inputs[0],
        "--recipe",
        "nonsense",
    )


def test_no_recipe_and_no_model(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    fails(3, "no recipe", "--shards", inputs[0])
    recipe = tmp_path / "bare.toml"
    recipe.write_text('name = "bare"\n[optim]\nlearning_rate = 1e-3\n[batch]\npacks_per_step = 2\n')
    fails(3, "no model: give --model", "--shards", inputs[0], "--recipe", recipe)


def test_a_model_that_is_not_there(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", tmp_path / "run", "-q")
    fails(3, "there is no directory", *call, "--model", "./nowhere")
    (tmp_path / "empty").mkdir()
    fails(5, "cannot read the model", *call, "--model", tmp_path / "empty")


def test_no_shards_is_a_usage_error() -> None:
    result = train_here()
    assert result.exit_code == 2
    assert "Missing option '--shards'" in result.output


def test_the_recipe_of_the_shard_set_is_the_default(tmp_path: Path) -> None:
    packs = random_packs(num_packs=4, max_seq_len=32, vocab_size=VOCAB)
    shards = write_shard_set(
        tmp_path / "set", packs, max_seq_len=32, vocab_size=VOCAB, recipe="tiny"
    )
    result = train_here("--shards", shards, "--output", tmp_path / "run", "--max-steps", 1)
    assert result.exit_code == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["name"] == "tiny"


@pytest.mark.slow
def test_the_installed_command_runs_where_other_packages_have_our_names(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """The working directory holds a train.py and a shared package: neither is imported, by one rank
    or by two."""
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "__init__.py").write_text("raise SystemExit('the wrong shared')")
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--stop-after", 1, "--nproc-per-node", 2)
    done = subprocess.run(command(*call), capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 75, done.stderr
    assert (
        "stopped after step 1 of 8, saved in runs/tiny-tiny/checkpoints/step-00000001;"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_error_of_the_real_command_is_one_line(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    done = train_apart("--shards", tmp_path / "none", "--recipe", inputs[1])
    assert done.returncode == 5
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    verbose = train_apart("--shards", tmp_path / "none", "--recipe", inputs[1], "-v")
    assert "Traceback" in verbose.stderr
