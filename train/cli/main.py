"""The command `sft-train`: options and one call; its other commands are in before_a_run.py and
after_a_run.py."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from train.cli import after_a_run, before_a_run
from train.cli.after_a_run import push_all
from train.cli.common_options import PATH, recipe_options, reporting, train_request, verbosity_of


# the names of these options are those of the fields of TrainRequest
@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: sft-train --shards data_cache/demo --output runs/demo",
)
@click.version_option(package_name="sft-shards")
@click.option("--shards", type=PATH, help="Directory of a shard set, made by sft-prep build.")
@recipe_options
@click.option("--output", type=PATH, help="Run directory; default: runs/RECIPE-SHARDS.")
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
    help="Checkpoint to resume from.",
)
@click.option(
    "--push-to-hub", metavar="USER/NAME", help="Push the model to the hub when it is trained."
)
@click.option(
    "--push-checkpoints",
    metavar="USER/NAME",
    help="Push checkpoints to the hub while training goes on.",
)
@click.option(
    "--trust-checkpoint",
    is_flag=True,
    help="Let --resume DIR read what another run wrote: it can run code.",
)
@click.option(
    "--eval-shards",
    type=PATH,
    help="Evaluation set; default: the one held out of the shard set, if any.",
)
@click.option("--under-launcher", is_flag=True, hidden=True)
@click.option("-v", "--verbose", count=True, help="More on stderr, and tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Warnings and errors only.")
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> None:
    """Train a Hugging Face causal LM on a shard set; run the same command again to resume after
    any stop."""
    if context.invoked_subcommand is not None:
        return
    if options["shards"] is None:
        raise click.UsageError("Missing option '--shards'.", context)
    under_launcher = options["under_launcher"]
    with reporting(verbosity_of(options), quiet_stop=under_launcher):
        from train.data.tokenizer_match import check_tokenizer
        from train.engine.launcher_env import die_with_parent, read_launcher_env
        from train.launch.local import run_or_launch
        from train.run.prepare import prepare

        if under_launcher:
            die_with_parent()
        request = train_request(options)
        prepared = prepare(request)
        # under a launcher the tokenizers have been compared, once and not on every rank
        if not prepared.is_complete and not under_launcher:
            check_tokenizer(prepared.shard_set, prepared.recipe.model)
        done = "before"
        if not prepared.is_complete:
            done = run_or_launch(prepared, options["nproc_per_node"])
        if done == "before" and read_launcher_env().rank == 0:
            click.echo(f"{prepared.run.path} is complete: the model is in {prepared.run.model}")
            push_all(
                prepared.run.path, checkpoints=request.push_checkpoints, model=request.push_to_hub
            )
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
    """Run the command line, unless a foreign package or module named `shared` hides ours."""
    # prep/cli/main.py has the same guard: `shared` cannot hold it, for it may be the foreign one
    spec, ours = find_spec("shared"), Path(__file__).resolve().parents[2] / "shared/__init__.py"
    if spec is None or Path(str(spec.origin)).resolve() != ours:
        sys.stderr.write(
            f"error: the package `shared` was found at {spec and spec.origin}, expected {ours}; run"
            " the console script sft-train, without PYTHONPATH\n"
        )
        raise SystemExit(6)
    cli(prog_name="sft-train")
