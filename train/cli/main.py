"""The command `sft-train`: options and one call; its other commands are in before_a_run.py and
after_a_run.py."""

import sys
from pathlib import Path

import click

from train.cli import after_a_run, before_a_run
from train.cli.after_a_run import push_all
from train.cli.common_options import PATH, reporting, train_request, verbosity_of


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: sft-train --shards data_cache/demo --output runs/demo",
)
@click.version_option(package_name="sft-shards")
@click.option("--shards", type=PATH, help="Directory of a shard set, made by sft-prep build.")
@click.option(
    "--recipe", metavar="NAME|FILE", help="How to train; default: what the shard set names."
)
@click.option("--model", metavar="NAME|DIR", help="Hugging Face causal LM; default: the recipe's.")
@click.option("--output", type=PATH, help="Run directory; default: runs/RECIPE-SHARDS.")
@click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key of the recipe."
)
@click.option(
    "--max-steps",
    type=click.IntRange(min=1),
    help="Total number of steps; the schedule ends there.",
)
@click.option(
    "--stop-after",
    type=click.IntRange(min=1),
    help="Save and stop after so many steps of this call.",
)
@click.option(
    "--nproc-per-node", type=click.IntRange(min=1), help="Ranks to start here; default: GPUs, or 1."
)
@click.option(
    "--resume",
    metavar="auto|never|DIR",
    default="auto",
    show_default=True,
    help="Where to go on from.",
)
@click.option(
    "--push-to-hub", metavar="USER/NAME", help="Push the model to the hub when it is trained."
)
@click.option(
    "--push-checkpoints",
    metavar="USER/NAME",
    help="Push checkpoints to the hub as training goes on.",
)
@click.option(
    "--trust-checkpoint",
    is_flag=True,
    help="Let --resume DIR read what another run wrote: it can run code.",
)
@click.option(
    "--eval-shards", type=PATH, help="Evaluation set; default: what was held out of the shard set."
)
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
    push_to_hub: str | None,
    push_checkpoints: str | None,
    trust_checkpoint: bool,
    eval_shards: Path | None,
    under_launcher: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Train a Hugging Face causal LM on a shard set; run the same command again to go on after any
    stop."""
    if context.invoked_subcommand is not None:
        return
    if shards is None:
        raise click.UsageError("Missing option '--shards'.", context)
    with reporting(verbosity_of(context.params), quiet_stop=under_launcher):
        from train.data.tokenizer_match import check_tokenizer
        from train.engine.launcher_env import die_with_parent, read_launcher_env
        from train.launch.local import run_or_launch
        from train.run.prepare import prepare

        if under_launcher:
            die_with_parent()
        prepared = prepare(train_request(context.params))
        if not prepared.is_complete and not under_launcher:  # whoever launched has compared
            check_tokenizer(prepared.shard_set, prepared.recipe.model)
        done = "before" if prepared.is_complete else run_or_launch(prepared, nproc_per_node)
        if done == "before" and read_launcher_env().rank == 0:
            click.echo(f"{prepared.run.path} is complete: the model is in {prepared.run.model}")
            push_all(prepared.run.path, checkpoints=push_checkpoints, model=push_to_hub)
        elif done == "here" and read_launcher_env().rank == 0:
            click.echo(prepared.run.model)


for _command in (
    before_a_run.selftest,
    before_a_run.plan,
    before_a_run.launch,
    before_a_run.recipes,
    after_a_run.which,
    after_a_run.status,
    after_a_run.plot,
    after_a_run.ask,
    after_a_run.export,
    after_a_run.push,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point of the console script."""
    _check_shared()
    cli(prog_name="sft-train")


def _check_shared() -> None:
    """`shared` is a common name: stop if another package of that name was found first."""
    import shared

    here, found = (
        Path(__file__).resolve().parents[2],
        [Path(place).resolve().parent for place in shared.__path__],
    )
    if found != [here]:
        sys.stderr.write(
            f"error: the package `shared` was imported from {found[0] if found else 'nowhere'},"
            f" expected {here}; run the console script sft-train, without PYTHONPATH\n"
        )
        raise SystemExit(6)
