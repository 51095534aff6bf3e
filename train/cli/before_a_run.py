"""The commands of `sft-train` for before a run: selftest, plan, launch, recipes."""

from pathlib import Path

import click

from train.cli.common_options import PATH, reporting, train_request, verbosity_of


@click.command(epilog="Example: sft-train selftest --shards data_cache/demo")
@click.option("--shards", type=PATH, required=True, help="Directory of a shard set.")
@click.option("--recipe", metavar="NAME|FILE", help="Default: what the shard set names.")
@click.option("--model", metavar="NAME|DIR", help="Default: the recipe's.")
@click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key of the recipe."
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="So many, random weights; default: all, if they fit.",
)
@click.option(
    "--tokens", type=click.IntRange(min=16), default=768, show_default=True, help="At most so many."
)
def selftest(
    shards: Path,
    recipe: str | None,
    model: str | None,
    settings: tuple[str, ...],
    layers: int | None,
    tokens: int,
) -> None:
    """Test on this machine that packs train as their sequences do alone; exit code 6 if they do
    not."""
    with reporting():
        from train.run.prepare import TrainRequest
        from train.selftest.selftest import selftest as run_selftest

        request = TrainRequest(shards=shards, recipe=recipe, model=model, settings=settings)
        report = run_selftest(request, layers=layers, tokens=tokens)
        click.echo("\n".join(report.lines()))
        report.check()


@click.command(epilog="Example: sft-train plan --shards data_cache/demo --gpus 1")
@click.option("--shards", type=PATH, help="Directory of a shard set; or state sizes instead:")
@click.option(
    "--rows", type=click.IntRange(min=1), help="Conversations of a set that is yet to be built."
)
@click.option("--tokens", type=click.IntRange(min=1), help="Its tokens.")
@click.option("--loss-tokens", type=click.IntRange(min=1), help="Its loss tokens.")
@click.option(
    "--max-seq-len", type=click.IntRange(min=2), default=4096, show_default=True, help="Its packs."
)
@click.option("--recipe", metavar="NAME|FILE", help="Default: what the shard set names.")
@click.option(
    "--model", metavar="NAME|DIR", help="Default: the recipe's. A directory needs config.json only."
)
@click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key of the recipe."
)
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
    help="Share of its peak that a GPU reaches.",
)
@click.option("--price", type=click.FloatRange(min=0), help="Of one GPU for one hour.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def plan(
    shards: Path | None,
    rows: int | None,
    tokens: int | None,
    loss_tokens: int | None,
    max_seq_len: int,
    recipe: str | None,
    model: str | None,
    settings: tuple[str, ...],
    max_steps: int | None,
    num_gpus: int,
    gpus_per_node: int,
    gpu: str,
    mfu: float,
    price: float | None,
    as_json: bool,
) -> None:
    """Say before a run what it takes: steps, memory per GPU, time, cost. Needs no GPU and loads no
    weights."""
    size_from_flags = (rows, tokens, loss_tokens)
    if (shards is None) == (size_from_flags == (None, None, None)) or (
        shards is None and None in size_from_flags
    ):
        raise click.UsageError("Give --shards, or all of --rows, --tokens and --loss-tokens.")
    with reporting():
        from train.estimate import data_size, plan, report
        from train.run.prepare import TrainRequest

        sizes = data_size.sizes_stated(rows, tokens, loss_tokens, max_seq_len)
        train = TrainRequest(
            shards=shards or data_size.STATED,
            recipe=recipe,
            model=model,
            settings=settings,
            max_steps=max_steps,
        )
        made = plan.make_plan(
            plan.EstimateRequest(
                train=train,
                sizes=sizes,
                num_gpus=num_gpus,
                gpus_per_node=gpus_per_node,
                gpu=gpu,
                mfu=mfu,
                price=price,
            )
        )
        click.echo(report.as_json(made) if as_json else report.as_text(made))


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
def launch(
    arguments: tuple[str, ...],
    way: str | None,
    hostfile: Path | None,
    num_nodes: int | None,
    gpus_per_node: int | None,
    submit: bool,
    max_restarts: int,
    seconds_to_save: int,
    port: int | None,
    environment: tuple[str, ...],
    head: str | None,
    job_name: str | None,
    partition: str | None,
    account: str | None,
    time: str | None,
    cpus_per_node: int | None,
    others: tuple[str, ...],
) -> None:
    """Check a run and print, or with --submit start, what trains it on many nodes; all see the same
    directories."""
    if (way is None) == (hostfile is None):
        raise click.UsageError("Give one of --slurm, --torchrun and --deepspeed-hostfile.")
    asked = (
        click.Command("sft-train", params=click.get_current_context().find_root().command.params)
        .make_context("sft-train", list(arguments))
        .params
    )
    if asked["shards"] is None:
        raise click.UsageError("Missing option '--shards' among those of sft-train, after --.")
    if asked["nproc_per_node"] is not None:
        raise click.UsageError("Give --gpus-per-node instead of --nproc-per-node.")
    with reporting(verbosity_of(asked)):
        from train.launch import multi_node, slurm

        request = multi_node.LaunchRequest(
            train=train_request(asked),
            num_nodes=num_nodes,
            gpus_per_node=gpus_per_node,
            max_restarts=max_restarts,
            seconds_to_save=seconds_to_save,
            port=port,
            environment=environment,
            submit=submit,
        )
        if hostfile is not None:
            click.echo(multi_node.launch_by_ssh(request, hostfile))
        elif way == "torchrun":
            click.echo(multi_node.launch_by_hand(request, head))
        else:
            options = slurm.SlurmOptions(
                job_name=job_name,
                partition=partition,
                account=account,
                time=time,
                cpus_per_node=cpus_per_node,
                others=others,
            )
            click.echo(multi_node.launch_by_slurm(request, options))


@click.command(epilog="Example: sft-train recipes")
def recipes() -> None:
    """List the recipes that ship."""
    with reporting():
        from shared.config import first_comment
        from train.recipe_file import shipped_recipes

        for name, path in shipped_recipes().items():
            click.echo(f"{name:<20} {first_comment(path)}")
