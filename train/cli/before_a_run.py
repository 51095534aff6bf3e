"""The commands of `sft-train` for before a run: selftest, plan, launch, recipes."""

from typing import Any

import click

from train.cli.common_options import (
    PATH,
    fields_from,
    recipe_options,
    reporting,
    train_request,
    verbosity_of,
)


@click.command(epilog="Example: sft-train selftest --shards data_cache/demo")
@click.option("--shards", type=PATH, required=True, help="Directory of a shard set.")
@recipe_options
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="Number of layers, with random weights; default: all, if they fit.",
)
@click.option(
    "--tokens", type=click.IntRange(min=16), default=768, show_default=True, help="At most as many."
)
def selftest(layers: int | None, tokens: int, **options: Any) -> None:
    """Test on this machine that packed sequences train as they do alone; exit code 6 if they do
    not."""
    with reporting():
        from train.run.prepare import TrainRequest
        from train.selftest.selftest import selftest as run_selftest

        report = run_selftest(TrainRequest(**options), layers=layers, tokens=tokens)
        click.echo("\n".join(report.lines()))
        report.check()


@click.command(epilog="Example: sft-train plan --shards data_cache/demo --gpus 1")
@click.option("--shards", type=PATH, help="Directory of a shard set; or give its sizes instead:")
@click.option(
    "--rows", type=click.IntRange(min=1), help="Conversations of a set that does not exist yet."
)
@click.option("--tokens", type=click.IntRange(min=1), help="Its tokens.")
@click.option("--loss-tokens", type=click.IntRange(min=1), help="Its loss tokens.")
@click.option(
    "--max-seq-len", type=click.IntRange(min=2), default=4096, show_default=True, help="Its packs."
)
@recipe_options
@click.option("--max-steps", type=click.IntRange(min=1), help="Total number of steps.")
@click.option("--gpus", "num_gpus", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--gpu",
    default="H100",
    show_default=True,
    help="A100, 'A100 40GB', B200, H100, H200, L40S, ...",
)
@click.option(
    "--mfu",
    type=float,
    default=0.35,
    show_default=True,
    help="Fraction of its peak that a GPU reaches.",
)
@click.option("--price", type=click.FloatRange(min=0), help="Of one GPU for one hour.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def plan(as_json: bool, **options: Any) -> None:
    """Estimate a run before it starts: steps, memory per GPU, time, cost. Needs no GPU and loads no
    weights."""
    has_size = [options[name] is not None for name in ("rows", "tokens", "loss_tokens")]
    if not all(has_size) if options["shards"] is None else any(has_size):
        raise click.UsageError("Give --shards, or all of --rows, --tokens and --loss-tokens.")
    with reporting():
        from train.estimate import data_size, plan, report
        from train.run.prepare import TrainRequest

        sizes = None
        if options["shards"] is None:
            sizes = data_size.StatedSizes(**fields_from(data_size.StatedSizes, options))
            options["shards"] = data_size.STATED
        train = TrainRequest(**fields_from(TrainRequest, options))
        machine = fields_from(plan.EstimateRequest, options)
        estimate = plan.make_plan(plan.EstimateRequest(train=train, sizes=sizes, **machine))
        click.echo(report.as_json(estimate) if as_json else report.as_text(estimate))


@click.command(
    epilog=(
        "Example: sft-train launch --nodes 8 --gpus-per-node 8 --slurm -- --shards data_cache/tulu3"
    )
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- OPTIONS OF sft-train")
@click.option("--slurm", "way", flag_value="slurm", help="By a batch script for SLURM.")
@click.option("--torchrun", "way", flag_value="torchrun", help="By hand: a line for each node.")
@click.option(
    "--deepspeed-hostfile", "hostfile", type=PATH, help="By ssh to the hosts of this file."
)
@click.option("--nodes", "num_nodes", type=click.IntRange(min=1))
@click.option(
    "--gpus-per-node",
    type=click.IntRange(min=1),
    help="Also the ranks of a node, one for each GPU.",
)
@click.option("--submit", is_flag=True, help="Start it; otherwise what would start it is printed.")
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="After failed ranks.",
)
@click.option(
    "--seconds-to-save",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    help="Before a kill.",
)
@click.option(
    "--rdzv-port",
    "port",
    type=click.IntRange(1, 65535),
    help="On the head; default: 29500, or by the job.",
)
@click.option(
    "--env",
    "environment",
    metavar="NAME=VALUE",
    multiple=True,
    help="Set for the ranks of every node.",
)
@click.option(
    "--head", metavar="HOST", help="With --torchrun: the first node; default: this machine."
)
@click.option("--job-name", help="With --slurm; default: the name of the run directory.")
@click.option("--partition", help="With --slurm.")
@click.option("--account", help="With --slurm.")
@click.option("--time", help="With --slurm: the limit of the job.")
@click.option(
    "--cpus-per-node", type=click.IntRange(min=1), help="With --slurm; default: whole nodes."
)
@click.option(
    "--sbatch", "others", metavar="NAME[=VALUE]", multiple=True, help="Any other option of sbatch."
)
@click.pass_context
def launch(context: click.Context, /, arguments: tuple[str, ...], **options: Any) -> None:
    """Check a run and print, or with --submit start, what trains it on many nodes; all see the same
    directories."""
    way, hostfile = options["way"], options["hostfile"]
    if (way is None) == (hostfile is None):
        raise click.UsageError("Give one of --slurm, --torchrun and --deepspeed-hostfile.")
    # a command with the options of sft-train itself, without its subcommands
    sft_train = click.Command("sft-train", params=context.find_root().command.params)
    train_options = sft_train.make_context("sft-train", list(arguments)).params
    if train_options["shards"] is None:
        raise click.UsageError("Missing option '--shards' among those of sft-train, after --.")
    if train_options["nproc_per_node"] is not None:
        raise click.UsageError("Give --gpus-per-node instead of --nproc-per-node.")
    with reporting(verbosity_of(train_options)):
        from train.launch import multi_node, slurm

        request = multi_node.LaunchRequest(
            train=train_request(train_options), **fields_from(multi_node.LaunchRequest, options)
        )
        if hostfile is not None:
            click.echo(multi_node.launch_by_ssh(request, hostfile))
        elif way == "torchrun":
            click.echo(multi_node.launch_by_hand(request, options["head"]))
        else:
            slurm_options = slurm.SlurmOptions(**fields_from(slurm.SlurmOptions, options))
            click.echo(multi_node.launch_by_slurm(request, slurm_options))


@click.command(epilog="Example: sft-train recipes")
def recipes() -> None:
    """List the recipes that ship."""
    with reporting():
        from shared.config import first_comment
        from train.recipe_file import shipped_recipes

        for name, path in shipped_recipes().items():
            click.echo(f"{name:<20} {first_comment(path)}")
