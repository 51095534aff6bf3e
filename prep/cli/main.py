"""The command line of sft-prep: options and one call each; push and pull are in transfer.py."""

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.cli import transfer
from prep.cli.common_options import logging_options, reporting

if TYPE_CHECKING:
    from prep.build.request import BuildRequest

PATH = click.Path(path_type=Path)


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
            click.option("--out", type=PATH, help="Where the set goes. [data_cache/NAME]"),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="KEY=VALUE",
                help="Override: mask.boundary=inside.",
            ),
            click.option("--store", type=PATH, help="Sample store. [.samples beside --out]"),
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


def _build_request(
    *,
    mixture: str,
    out: Path | None,
    settings: tuple[str, ...],
    store: Path | None,
    workers: int | None,
    rehash: bool,
    scheduler: str = "",
) -> "BuildRequest":
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
def build(*, rebuild: bool, dry_run: bool, **options: Any) -> None:
    """Make a shard set. Does nothing if it is there and made from the same inputs."""
    request = _build_request(**options)
    if dry_run:
        from prep.build.dry_run import dry_run as measure

        click.echo("\n".join(measure(request)))
        return
    from prep.build.build import build as make
    from prep.build.summary import summary_lines

    click.echo("\n".join(summary_lines(make(request, rebuild=rebuild), request.out)))


@cli.command(epilog="Example: sft-prep explain --mixture demo")
@_mixture_options
@logging_options
def explain(**options: Any) -> None:
    """Say what a build would do, and field by field why a set that is there does or does not
    match."""
    from prep.build.explain import explain as compare

    click.echo("\n".join(compare(_build_request(**options))))


@cli.command(epilog="Example: sft-prep inspect data_cache/demo --pack 0")
@click.argument("shards", type=PATH)
@click.option("--pack", type=click.IntRange(min=0), help="Show one pack.")
@click.option("--row", metavar="SOURCE:ROW", help="Show the sequences of one source row.")
@click.option(
    "--sample", type=click.IntRange(min=1), help="Show so many packs, spread over the set. [1]"
)
@click.option("--ids", is_flag=True, help="Print token ids too.")
@click.option("--color/--no-color", default=None, help="Colour. [on a terminal]")
@click.option("--html", type=PATH, metavar="FILE", help="Write a page for a browser instead.")
@logging_options
def inspect(
    *, shards: Path, ids: bool, color: bool | None, html: Path | None, **choice: Any
) -> None:
    """Show tokens: who wrote them, which are trained, which row they came from."""
    from prep.inspection.terminal import inspect_lines
    from shared.shard_reader import open_shard_set

    shard_set = open_shard_set(shards)
    if html is not None:
        from prep.inspection.html_page import write_page

        click.echo(write_page(shard_set, html, **choice))
        return
    use_color = sys.stdout.isatty() if color is None else color
    for line in inspect_lines(shard_set, ids=ids, color=use_color, **choice):
        click.echo(line, color=use_color)


@cli.command(epilog="Example: sft-prep stats data_cache/demo --json")
@click.argument("shards", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--plot", type=PATH, metavar="FILE.png", help="Draw lengths and sources as well.")
@logging_options
def stats(*, shards: Path, as_json: bool, plot: Path | None) -> None:
    """Count rows, tokens and loss tokens by source, lengths, density."""
    from prep.inspection.stats import stats as measure
    from prep.inspection.stats import stats_lines
    from shared.shard_reader import open_shard_set

    shard_set = open_shard_set(shards)
    if plot is not None:
        from prep.inspection.stats_plot import plot_stats

        plot_stats(shard_set, plot)
    lines = [json.dumps(measure(shard_set), indent=2)] if as_json else stats_lines(shard_set)
    click.echo("\n".join(lines))


@cli.command(epilog="Example: sft-prep verify data_cache/demo")
@click.argument("shards", type=PATH)
@logging_options
def verify(*, shards: Path) -> None:
    """Prove a set again from its shards alone: hashes, bounds, masks. The exit code says whether
    it holds."""
    from prep.inspection.verification.verify import verify as prove

    click.echo("\n".join(prove(shards)))


@cli.command(epilog="Example: sft-prep pin tulu3")
@click.argument("mixture", metavar="NAME|FILE")
@click.option("--out", type=PATH, help="File to write; default: FILE itself, or NAME.toml here.")
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
    """Run the command line, unless a foreign package or module named `shared` hides ours."""
    # train/cli/main.py has the same guard: `shared` cannot hold it, for it may be the foreign one
    spec, ours = find_spec("shared"), Path(__file__).resolve().parents[2] / "shared/__init__.py"
    if spec is None or Path(str(spec.origin)).resolve() != ours:
        sys.stderr.write(
            f"error: the package `shared` was found at {spec and spec.origin}, expected {ours}; run"
            " the console script sft-prep, without PYTHONPATH\n"
        )
        raise SystemExit(6)
    cli(prog_name="sft-prep")
