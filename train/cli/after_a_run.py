"""The commands of `sft-train` that work on the files of a run: export, push, plot, ask, which,
status."""

import sys
from pathlib import Path
from typing import Literal

import click

from train.cli.common_options import PATH, reporting


@click.command(
    epilog="Example: sft-train export runs/demo/checkpoints/step-00002746 model-bf16 --dtype bf16"
)
@click.argument("checkpoint", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--dtype", type=click.Choice(["trained", "bf16", "fp32"]), default="trained", show_default=True
)
@click.option(
    "--max-file-size", default="5GB", show_default=True, help="More weights go into several files."
)
def export(
    checkpoint: Path, out: Path, dtype: Literal["trained", "bf16", "fp32"], max_file_size: str
) -> None:
    """Write the model of CHECKPOINT to OUT in Hugging Face format."""
    with reporting():
        from train.publish.export import WeightFiles, export_checkpoint

        export_checkpoint(checkpoint, out, WeightFiles(dtype=dtype, max_file_size=max_file_size))
        click.echo(out)


@click.command(epilog="Example: sft-train push runs/demo user/demo-model")
@click.argument("what", type=PATH)
@click.argument("repo", metavar="USER/NAME")
@click.option("--checkpoints", is_flag=True, help="Of a run: not its model but its checkpoints.")
@click.option("-q", "--quiet", is_flag=True, help="Warnings and errors only.")
@click.option("--die-with-parent", is_flag=True, hidden=True)
def push(what: Path, repo: str, checkpoints: bool, quiet: bool, die_with_parent: bool) -> None:
    """Push WHAT to a repository of the hub, private if the push creates it: the model of a complete
    run, an exported model, or a checkpoint, which goes to a branch RUN-step-N."""
    with reporting(-1 if quiet else 0):
        from train.engine import launcher_env
        from train.publish.checkpoints import push_checkpoint
        from train.run.checkpoint_layout import STATE_NAME

        if die_with_parent:
            launcher_env.die_with_parent()
        if (what / STATE_NAME).exists():
            click.echo(push_checkpoint(what, repo))
        elif checkpoints:
            push_all(what, checkpoints=repo, model=None)
        else:
            push_all(what, checkpoints=None, model=repo)


def push_all(path: Path, *, checkpoints: str | None, model: str | None) -> None:
    """Push the checkpoints of a run, and a model, to these repositories, if any; print their
    addresses."""
    if checkpoints is not None:
        from train.publish.checkpoints import push_checkpoints
        from train.run.directory import RunDir

        for address in push_checkpoints(RunDir(path), checkpoints):
            click.echo(address)
    if model is not None:
        from train.publish.hub import push_model

        click.echo(push_model(path, model))


@click.command(epilog="Example: sft-train plot runs/a runs/b --out both.png")
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, help="Image file; default: loss.png in the first run.")
def plot(runs: tuple[Path, ...], out: Path | None) -> None:
    """Draw the loss of one or more RUNS."""
    with reporting():
        from train.results.plot import plot_runs

        image = out or runs[0] / "loss.png"
        plot_runs(list(runs), image)
        click.echo(image)


@click.command(epilog="Example: sft-train ask runs/demo/model --prompt 'What is 3 + 4?'")
@click.argument("model", type=PATH)
@click.option("--prompt", "prompts", multiple=True, help="A question; repeat for more.")
@click.option(
    "--questions", type=PATH, help="JSON lines with conversations whose answers are known."
)
@click.option(
    "--show", type=click.IntRange(min=0), default=3, show_default=True, help="Answers to print."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
def ask(
    model: Path, prompts: tuple[str, ...], questions: Path | None, show: int, max_new_tokens: int
) -> None:
    """Let an exported MODEL answer, and count the right answers where they are known."""
    with reporting():
        from train.results.ask import ask as ask_model

        for line in ask_model(
            model, prompts=prompts, questions=questions, show=show, max_new_tokens=max_new_tokens
        ):
            click.echo(line)


@click.command(epilog="Example: sft-train which runs/demo --step 3")
@click.argument("run", type=PATH)
@click.option("--step", type=int, required=True, help="As in metrics.jsonl, counted from 1.")
@click.option("--rank", type=int, help="Of the last call that trained; default: all ranks.")
@click.option("--shards", type=PATH, help="Where the shard set lies now; default: where it was.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object per sequence, with all of its text."
)
@click.option("--full", is_flag=True, help="All of the text, not its beginning.")
def which(
    run: Path, step: int, rank: int | None, shards: Path | None, as_json: bool, full: bool
) -> None:
    """Show the source rows that a step of RUN trains on; trained text is [[marked]], or green on a
    terminal."""
    with reporting():
        from train.results.which import which as rows_of_step

        colour = sys.stdout.isatty()
        for line in rows_of_step(
            run, step=step, rank=rank, shards=shards, as_json=as_json, full=full, colour=colour
        ):
            click.echo(line)


@click.command(epilog="Example: sft-train status runs/demo")
@click.argument("run", type=PATH)
@click.option("--changed-after", type=PATH, help="Ignore a status that is older than this file.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0,
    help="Seconds to wait until the ranks have written their last status.",
)
def status(run: Path, changed_after: Path | None, wait: float) -> None:
    """Report the state of RUN, and exit with its exit code: torchrun gives 1 for everything."""
    with reporting():
        from train.run.directory import RunDir
        from train.run.read_status import read_outcome

        code, line = read_outcome(RunDir(run), changed_after=changed_after, wait_seconds=wait)
    click.echo(line)
    sys.exit(code)
