"""The command `sft-train`: options, one call, and the only place where errors become exit codes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: sft-train --shards data_cache/demo --output runs/demo",
)
@click.option("--shards", type=_PATH, help="Directory of a shard set, made by sft-prep build.")
@click.option("--recipe", metavar="NAME|FILE", help="How to train; default: what the shard set names.")
@click.option("--model", metavar="NAME|DIR", help="Hugging Face causal LM; default: the recipe's.")
@click.option("--output", type=_PATH, help="Run directory; default: runs/RECIPE-SHARDS.")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key of the recipe.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Total number of steps; the schedule ends there.")
@click.option("--stop-after", type=click.IntRange(min=1), help="Save and stop after so many steps of this call.")
@click.option("--nproc-per-node", type=click.IntRange(min=1), help="Ranks to start here; default: GPUs, or 1.")
@click.option("--resume", metavar="auto|never|DIR", default="auto", show_default=True, help="Where to go on from.")
@click.option("--under-launcher", is_flag=True, hidden=True)
@click.option("-v", "--verbose", count=True, help="More on stderr, and tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Warnings and errors only.")
@click.pass_context
def cli(
    context: click.Context,
    shards: Path | None,
    recipe: str | None,
    model: str | None,
    output: Path | None,
    settings: tuple[str, ...],
    max_steps: int | None,
    stop_after: int | None,
    nproc_per_node: int | None,
    resume: str,
    under_launcher: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Train a Hugging Face causal LM on a shard set; run the same command again to go on after any stop."""
    if context.invoked_subcommand is not None:
        return
    if shards is None:
        raise click.UsageError("Missing option '--shards'.", context)
    verbosity = -1 if quiet else verbose
    with _reporting(verbosity, quiet_stop=under_launcher):
        from train.launch import run_or_launch
        from train.prepare import TrainRequest, prepare
        from train.ranks import die_with_parent, read_place

        if under_launcher:
            die_with_parent()
        request = TrainRequest(
            shards=shards,
            recipe=recipe,
            model=model,
            output=output,
            settings=settings,
            max_steps=max_steps,
            stop_after=stop_after,
            resume=resume,
            verbosity=verbosity,
        )
        prepared = prepare(request)
        if prepared.is_complete:
            click.echo(f"{prepared.run.path} is complete: the model is in {prepared.run.model}")
            return
        if run_or_launch(prepared, nproc_per_node) and read_place().rank == 0:
            click.echo(prepared.run.model)


@cli.command(epilog="Example: sft-train export runs/demo/checkpoints/step-00000100 model-100")
@click.argument("checkpoint", type=_PATH)
@click.argument("out", type=_PATH)
def export(checkpoint: Path, out: Path) -> None:
    """Write the model of CHECKPOINT to OUT in Hugging Face format."""
    with _reporting():
        from train.export import export_checkpoint

        export_checkpoint(checkpoint, out)
        click.echo(out)


@cli.command(epilog="Example: sft-train plot runs/a runs/b --out both.png")
@click.argument("runs", type=_PATH, nargs=-1, required=True)
@click.option("--out", type=_PATH, help="Image file; default: loss.png in the first run.")
def plot(runs: tuple[Path, ...], out: Path | None) -> None:
    """Draw the loss of one or more RUNS."""
    with _reporting():
        from train.plot import plot_runs

        image = out or runs[0] / "loss.png"
        plot_runs(list(runs), image)
        click.echo(image)


@cli.command(epilog="Example: sft-train ask runs/demo/model --prompt 'What is 3 + 4?'")
@click.argument("model", type=_PATH)
@click.option("--prompt", "prompts", multiple=True, help="A question; repeat for more.")
@click.option("--questions", type=_PATH, help="JSON lines with conversations whose answers are known.")
@click.option("--show", type=click.IntRange(min=0), default=3, show_default=True, help="Answers to print.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
def ask(model: Path, prompts: tuple[str, ...], questions: Path | None, show: int, max_new_tokens: int) -> None:
    """Let an exported MODEL answer, and count the right answers where they are known."""
    with _reporting():
        from train.ask import ask as ask_model

        for line in ask_model(model, prompts=prompts, questions=questions, show=show, max_new_tokens=max_new_tokens):
            click.echo(line)


@cli.command(epilog="Example: sft-train which runs/demo --step 3")
@click.argument("run", type=_PATH)
@click.option("--step", type=int, required=True, help="As in metrics.jsonl, counted from 1.")
@click.option("--rank", type=int, help="Of the last call that trained; default: all ranks.")
@click.option("--shards", type=_PATH, help="Where the shard set lies now; default: where it was.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per sequence, with all of its text.")
@click.option("--full", is_flag=True, help="All of the text, not its beginning.")
def which(run: Path, step: int, rank: int | None, shards: Path | None, as_json: bool, full: bool) -> None:
    """Show the source rows that a step of RUN trains on; trained text is [[marked]], or green on a terminal."""
    with _reporting():
        from train.which import which as rows_of_step

        colour = sys.stdout.isatty()
        for line in rows_of_step(run, step=step, rank=rank, shards=shards, as_json=as_json, full=full, colour=colour):
            click.echo(line)


@cli.command(epilog="Example: sft-train selftest --shards data_cache/demo")
@click.option("--shards", type=_PATH, required=True, help="Directory of a shard set.")
@click.option("--recipe", metavar="NAME|FILE", help="Default: what the shard set names.")
@click.option("--model", metavar="NAME|DIR", help="Default: the recipe's.")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key of the recipe.")
@click.option("--layers", type=click.IntRange(min=1), help="So many, random weights; default: all, if they fit.")
@click.option("--tokens", type=click.IntRange(min=16), default=768, show_default=True, help="At most so many.")
def selftest(
    shards: Path, recipe: str | None, model: str | None, settings: tuple[str, ...], layers: int | None, tokens: int
) -> None:
    """Test on this machine that packs train as their sequences do alone; exit code 6 if they do not."""
    with _reporting():
        from train.prepare import TrainRequest
        from train.selftest import selftest as run_selftest

        request = TrainRequest(shards=shards, recipe=recipe, model=model, settings=settings)
        report = run_selftest(request, layers=layers, tokens=tokens)
        click.echo("\n".join(report.lines()))
        report.check()


@cli.command(epilog="Example: sft-train recipes")
def recipes() -> None:
    """List the recipes that ship."""
    with _reporting():
        from train.config import shipped_recipes

        for name, path in shipped_recipes().items():
            click.echo(f"{name:16} {path}")


def main() -> None:
    """Entry point of the console script."""
    _check_shared()
    cli(prog_name="sft-train")


@contextmanager
def _reporting(verbosity: int = 0, *, quiet_stop: bool = False) -> Iterator[None]:
    """`quiet_stop`: a stop on request is left to status.json and our launcher; torchrun would report a failure."""
    from shared import log
    from shared.command import reporting_errors
    from shared.errors import StoppedOnRequest
    from train.ranks import launched, read_place

    rank = read_place().rank
    log.configure(verbosity, rank=rank if launched() else None)
    with reporting_errors(verbosity, rank=rank):
        try:
            yield
        except StoppedOnRequest:
            if not quiet_stop:
                raise
        except KeyboardInterrupt:
            sys.stderr.write("stopped by Ctrl-C\n")
            raise SystemExit(130) from None


def _check_shared() -> None:
    """`shared` is a common name: stop if another package of that name was found first."""
    import shared

    here, found = Path(__file__).resolve().parent.parent, [Path(place).resolve().parent for place in shared.__path__]
    if found != [here]:
        sys.stderr.write(
            f"error: the package `shared` was imported from {found[0] if found else 'nowhere'}, expected {here}; "
            "run the console script sft-train, without PYTHONPATH\n"
        )
        raise SystemExit(6)
