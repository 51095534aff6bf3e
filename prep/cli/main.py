"""The command line of sft-prep: options and one call each; push and pull are in transfer.py."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from prep.cli import transfer
from prep.cli.common_options import logging_options, reporting


def _check_own_shared() -> None:
    """Stop where another package named `shared` hides ours: the name is a common one."""
    import shared

    here, found = (
        Path(__file__).resolve().parents[2],
        [Path(place).resolve().parent for place in shared.__path__],
    )
    if found != [here]:
        sys.stderr.write(
            f"error: the package `shared` was imported from {found[0] if found else 'nowhere'},"
            f" expected {here}; run the console script sft-prep, without PYTHONPATH\n"
        )
        raise SystemExit(6)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sft-shards")
def cli() -> None:
    """Turn conversations into verified, packed, memory-mapped token shards.

    \b
    Example:
      sft-prep build --mixture demo
      sft-prep inspect data_cache/demo
    """


def _mixture_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option(
                "--mixture",
                required=True,
                metavar="NAME|FILE.toml",
                help="A mixture that ships, or a file.",
            ),
            click.option(
                "--out",
                type=click.Path(path_type=Path),
                help="Where the set goes. [data_cache/NAME]",
            ),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="KEY=VALUE",
                help="Override: mask.boundary=inside.",
            ),
            click.option(
                "--store",
                type=click.Path(path_type=Path),
                help="Sample store. [.samples beside --out]",
            ),
            click.option("--workers", type=click.IntRange(min=1), help="Processes. [all cores]"),
            click.option(
                "--rehash",
                is_flag=True,
                help="Hash every source file again, whatever its time stamp.",
            ),
        )
    ):
        command = option(command)
    return command


def _plan(
    mixture: str,
    out: Path | None,
    settings: tuple[str, ...],
    store: Path | None,
    workers: int | None,
    *,
    rehash: bool,
    scheduler: str = "",
) -> Any:
    from prep.build.request import BuildRequest
    from prep.config import load_mixture
    from prep.writing.replaceable_set import place_of

    loaded, base = load_mixture(mixture, settings)
    out = place_of(out or Path("data_cache") / loaded.name)
    cores = len(os.sched_getaffinity(0))
    return BuildRequest(
        loaded, base, out, store or out.parent / ".samples", workers or cores, rehash, scheduler
    )


@cli.command(epilog="Example: sft-prep build --mixture demo")
@_mixture_options
@click.option("--rebuild", is_flag=True, help="Replace a set that was made from other inputs.")
@click.option(
    "--dry-run", is_flag=True, help="Tokenise and pack, say what would be written, write no set."
)
@click.option(
    "--scheduler", default="", metavar="ADDRESS", help="Use a Dask cluster on a shared file system."
)
@logging_options
def build(
    mixture: str,
    out: Path | None,
    settings: tuple[str, ...],
    store: Path | None,
    workers: int | None,
    rehash: bool,
    rebuild: bool,
    dry_run: bool,
    scheduler: str,
    verbose: bool,
    quiet: bool,
) -> None:
    """Make a shard set. Does nothing if it is there and made from the same inputs."""
    with reporting(verbose=verbose, quiet=quiet):
        plan = _plan(mixture, out, settings, store, workers, rehash=rehash, scheduler=scheduler)
        if dry_run:
            from prep.build.dry_run import dry_run as measure

            click.echo("\n".join(measure(plan)))
            return
        from prep.build.build import build as make
        from prep.build.summary import summary_lines

        click.echo("\n".join(summary_lines(make(plan, rebuild=rebuild), plan.out)))


@cli.command(epilog="Example: sft-prep explain --mixture demo")
@_mixture_options
@logging_options
def explain(
    mixture: str,
    out: Path | None,
    settings: tuple[str, ...],
    store: Path | None,
    workers: int | None,
    rehash: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Say what a build would do, and field by field why a set that is there does or does not
    match."""
    with reporting(verbose=verbose, quiet=quiet):
        from prep.build.explain import explain as compare

        click.echo("\n".join(compare(_plan(mixture, out, settings, store, workers, rehash=rehash))))


@cli.command(epilog="Example: sft-prep inspect data_cache/demo --pack 0")
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--pack", type=click.IntRange(min=0), help="Show one pack.")
@click.option("--row", metavar="SOURCE:ROW", help="Show the sequences of one source row.")
@click.option(
    "--sample", type=click.IntRange(min=1), help="Show so many packs, spread over the set. [1]"
)
@click.option("--ids", is_flag=True, help="Print token ids too.")
@click.option("--color/--no-color", default=None, help="Colour. [on a terminal]")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a page for a browser instead.",
)
@logging_options
def inspect(
    shards: Path,
    pack: int | None,
    row: str | None,
    sample: int | None,
    ids: bool,
    color: bool | None,
    html: Path | None,
    verbose: bool,
    quiet: bool,
) -> None:
    """Show tokens: who wrote them, which are trained, which row they came from."""
    with reporting(verbose=verbose, quiet=quiet):
        from prep.inspection.terminal import inspect_lines
        from shared.shard_reader import open_shard_set

        found = open_shard_set(shards)
        if html is not None:
            from prep.inspection.html_page import write_page

            click.echo(write_page(found, html, pack=pack, row=row, sample=sample))
            return
        use_color = sys.stdout.isatty() if color is None else color
        for line in inspect_lines(
            found, pack=pack, row=row, sample=sample, ids=ids, color=use_color
        ):
            click.echo(line, color=use_color)


@cli.command(epilog="Example: sft-prep stats data_cache/demo --json")
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw lengths and sources as well.",
)
@logging_options
def stats(shards: Path, as_json: bool, plot: Path | None, verbose: bool, quiet: bool) -> None:
    """Count rows, tokens and loss tokens by source, lengths, density."""
    with reporting(verbose=verbose, quiet=quiet):
        from prep.inspection.stats import stats as measure
        from prep.inspection.stats import stats_lines
        from shared.shard_reader import open_shard_set

        found = open_shard_set(shards)
        if plot is not None:
            from prep.inspection.stats_plot import plot_stats

            plot_stats(found, plot)
        if as_json:
            click.echo(json.dumps(measure(found), indent=2))
        else:
            click.echo("\n".join(stats_lines(found)))


@cli.command(epilog="Example: sft-prep verify data_cache/demo")
@click.argument("shards", type=click.Path(path_type=Path))
@logging_options
def verify(shards: Path, verbose: bool, quiet: bool) -> None:
    """Prove a set again from its shards alone: hashes, bounds, masks. The exit code says."""
    with reporting(verbose=verbose, quiet=quiet):
        from prep.inspection.verification.verify import verify as prove

        click.echo("\n".join(prove(shards)))


@cli.command(epilog="Example: sft-prep pin tulu3")
@click.argument("mixture", metavar="NAME|FILE")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File to write; default: FILE itself, or NAME.toml here.",
)
def pin(mixture: str, out: Path | None) -> None:
    """Write the commits that the revisions of a MIXTURE name now into its file."""
    with reporting():
        from prep.build.pin import pin as pin_mixture

        click.echo("\n".join(pin_mixture(mixture, out)))


@cli.command(epilog="Example: sft-prep mixtures")
def mixtures() -> None:
    """List the mixtures that ship."""
    with reporting():
        from prep.config import shipped_mixtures
        from shared.config import first_comment

        for name, path in shipped_mixtures().items():
            click.echo(f"{name:<16} {first_comment(path)}")


cli.add_command(transfer.push)
cli.add_command(transfer.pull)


def main() -> None:
    """Run the command line."""
    _check_own_shared()
    cli(prog_name="sft-prep")
