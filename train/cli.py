"""The command `sft-train`: options, one call, and the only place where errors become exit codes."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from train.prepare import TrainRequest

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
@click.option("--push-to-hub", metavar="USER/NAME", help="Push the model to the hub when it is trained.")
@click.option("--trust-checkpoint", is_flag=True, help="Let --resume DIR read what another run wrote: it can run code.")
@click.option("--eval-shards", type=_PATH, help="Evaluation set; default: what was held out of the shard set.")
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
    trust_checkpoint: bool,
    eval_shards: Path | None,
    under_launcher: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Train a Hugging Face causal LM on a shard set; run the same command again to go on after any stop."""
    if context.invoked_subcommand is not None:
        return
    if shards is None:
        raise click.UsageError("Missing option '--shards'.", context)
    with _reporting(_verbosity(context.params), quiet_stop=under_launcher):
        from train.launch import run_or_launch
        from train.prepare import prepare
        from train.ranks import die_with_parent, read_place

        if under_launcher:
            die_with_parent()
        prepared = prepare(_train_request(context.params))
        if prepared.is_complete:
            click.echo(f"{prepared.run.path} is complete: the model is in {prepared.run.model}")
        elif run_or_launch(prepared, nproc_per_node) and read_place().rank == 0:
            click.echo(prepared.run.model)
        if push_to_hub is not None and read_place().rank == 0:
            from train.push import push_model

            click.echo(push_model(prepared.run.path, push_to_hub))


@cli.command(epilog="Example: sft-train export runs/demo/checkpoints/step-00000100 model-100")
@click.argument("checkpoint", type=_PATH)
@click.argument("out", type=_PATH)
def export(checkpoint: Path, out: Path) -> None:
    """Write the model of CHECKPOINT to OUT in Hugging Face format."""
    with _reporting():
        from train.export import export_checkpoint

        export_checkpoint(checkpoint, out)
        click.echo(out)


@cli.command(epilog="Example: sft-train push runs/demo user/demo-model")
@click.argument("run", type=_PATH)
@click.argument("repo", metavar="USER/NAME")
def push(run: Path, repo: str) -> None:
    """Push the model of a complete RUN, or an exported model, to a repository of the hub, private if it is made."""
    with _reporting():
        from train.push import push_model

        click.echo(push_model(run, repo))


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


@cli.command(epilog="Example: sft-train plan --shards data_cache/demo --gpus 1")
@click.option("--shards", type=_PATH, help="Directory of a shard set; or state sizes instead:")
@click.option("--rows", type=click.IntRange(min=1), help="Conversations of a set that is yet to be built.")
@click.option("--tokens", type=click.IntRange(min=1), help="Its tokens.")
@click.option("--loss-tokens", type=click.IntRange(min=1), help="Its loss tokens.")
@click.option("--max-seq-len", type=click.IntRange(min=2), default=4096, show_default=True, help="Its packs.")
@click.option("--recipe", metavar="NAME|FILE", help="Default: what the shard set names.")
@click.option("--model", metavar="NAME|DIR", help="Default: the recipe's. A directory needs config.json only.")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key of the recipe.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Total number of steps.")
@click.option("--gpus", "num_gpus", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--gpu", default="H100", show_default=True, help="A100, 'A100 40GB', B200, H100, H200, L40S, ...")
@click.option("--mfu", type=float, default=0.35, show_default=True, help="Share of its peak that a GPU reaches.")
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
    """Say before a run what it takes: steps, memory per GPU, time, cost. Needs no GPU and loads no weights."""
    stated = (rows, tokens, loss_tokens)
    if (shards is None) == (stated == (None, None, None)) or (shards is None and None in stated):
        raise click.UsageError("Give --shards, or all of --rows, --tokens and --loss-tokens.")
    with _reporting():
        from train import data_size, plan_report, preflight
        from train.prepare import TrainRequest

        sizes = data_size.sizes_stated(rows, tokens, loss_tokens, max_seq_len)
        train = TrainRequest(
            shards=shards or data_size.STATED, recipe=recipe, model=model, settings=settings, max_steps=max_steps
        )
        made = preflight.make_plan(
            preflight.PlanRequest(
                train=train,
                sizes=sizes,
                num_gpus=num_gpus,
                gpus_per_node=gpus_per_node,
                gpu=gpu,
                mfu=mfu,
                price=price,
            )
        )
        click.echo(plan_report.as_json(made) if as_json else plan_report.as_text(made))


@cli.command(epilog="Example: sft-train launch --nodes 8 --gpus-per-node 8 --slurm -- --shards data_cache/tulu3")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- OPTIONS OF sft-train")
@click.option("--slurm", "way", flag_value="slurm", help="By a batch script for SLURM.")
@click.option("--torchrun", "way", flag_value="torchrun", help="By hand: a line for each node.")
@click.option("--deepspeed-hostfile", "hostfile", type=_PATH, help="By ssh to the hosts of this file.")
@click.option("--nodes", "num_nodes", type=click.IntRange(min=1))
@click.option("--gpus-per-node", type=click.IntRange(min=1), help="Also the ranks of a node, one for each GPU.")
@click.option("--submit", is_flag=True, help="Start it; otherwise what would start it is printed.")
@click.option("--max-restarts", type=click.IntRange(min=0), default=3, show_default=True, help="After failed ranks.")
@click.option("--seconds-to-save", type=click.IntRange(min=1), default=600, show_default=True, help="Before a kill.")
@click.option("--rdzv-port", "port", type=click.IntRange(1, 65535), help="On the head; default: 29500, or by the job.")
@click.option("--env", "environment", metavar="NAME=VALUE", multiple=True, help="Set for the ranks of every node.")
@click.option("--head", metavar="HOST", help="With --torchrun: the first node; default: this machine.")
@click.option("--job-name", help="With --slurm; default: the name of the run directory.")
@click.option("--partition", help="With --slurm.")
@click.option("--account", help="With --slurm.")
@click.option("--time", help="With --slurm: the limit of the job.")
@click.option("--cpus-per-node", type=click.IntRange(min=1), help="With --slurm; default: whole nodes.")
@click.option("--sbatch", "others", metavar="NAME[=VALUE]", multiple=True, help="Any other option of sbatch.")
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
    """Check a run and print, or with --submit start, what trains it on many nodes; all see the same directories."""
    if (way is None) == (hostfile is None):
        raise click.UsageError("Give one of --slurm, --torchrun and --deepspeed-hostfile.")
    asked = click.Command("sft-train", params=cli.params).make_context("sft-train", list(arguments)).params
    if asked["shards"] is None:
        raise click.UsageError("Missing option '--shards' among those of sft-train, after --.")
    if asked["nproc_per_node"] is not None:
        raise click.UsageError("Give --gpus-per-node instead of --nproc-per-node.")
    with _reporting(_verbosity(asked)):
        from train import cluster, slurm

        request = cluster.LaunchRequest(
            train=_train_request(asked),
            num_nodes=num_nodes,
            gpus_per_node=gpus_per_node,
            max_restarts=max_restarts,
            seconds_to_save=seconds_to_save,
            port=port,
            environment=environment,
            submit=submit,
        )
        if hostfile is not None:
            click.echo(cluster.launch_by_ssh(request, hostfile))
        elif way == "torchrun":
            click.echo(cluster.launch_by_hand(request, head))
        else:
            options = slurm.SlurmOptions(
                job_name=job_name,
                partition=partition,
                account=account,
                time=time,
                cpus_per_node=cpus_per_node,
                others=others,
            )
            click.echo(cluster.launch_by_slurm(request, options))


@cli.command(epilog="Example: sft-train status runs/demo")
@click.argument("run", type=_PATH)
@click.option("--changed-after", type=_PATH, help="Believe only a status written after this file.")
@click.option("--wait", type=click.FloatRange(min=0), default=0, help="Seconds to wait for the last word of a rank.")
def status(run: Path, changed_after: Path | None, wait: float) -> None:
    """Say how RUN stands, and exit with its exit code: torchrun would say 1 for everything."""
    with _reporting():
        from train.outcome import read_outcome
        from train.run_dir import RunDir

        code, line = read_outcome(RunDir(run), changed_after=changed_after, wait_seconds=wait)
    click.echo(line)
    sys.exit(code)


@cli.command(epilog="Example: sft-train recipes")
def recipes() -> None:
    """List the recipes that ship."""
    with _reporting():
        from shared.config import first_comment
        from train.config import shipped_recipes

        for name, path in shipped_recipes().items():
            click.echo(f"{name:<20} {first_comment(path)}")


def main() -> None:
    """Entry point of the console script."""
    _check_shared()
    cli(prog_name="sft-train")


def _verbosity(given: Mapping[str, Any]) -> int:
    return -1 if given["quiet"] else int(given["verbose"])


def _train_request(given: Mapping[str, Any]) -> "TrainRequest":
    """Return the request that the options of `sft-train` itself make."""
    from train.prepare import TrainRequest

    return TrainRequest(
        shards=given["shards"],
        recipe=given["recipe"],
        model=given["model"],
        output=given["output"],
        settings=given["settings"],
        max_steps=given["max_steps"],
        stop_after=given["stop_after"],
        resume=given["resume"],
        eval_shards=given["eval_shards"],
        trust_checkpoint=given["trust_checkpoint"],
        verbosity=_verbosity(given),
    )


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
