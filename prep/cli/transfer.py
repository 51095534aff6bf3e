"""The commands of `sft-prep` that copy a set to and from a hub data set or a directory: push and
pull."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from prep.cli.common_options import logging_options


def _transfer_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--workers", type=click.IntRange(min=1), default=4, help="Files at the same time. [4]"
        ),
        click.option("--replace", is_flag=True, help="Put the set in the place of another one."),
        click.option(
            "--revision",
            metavar="NAME",
            help="Of a hub data set: branch (pull: tag or commit too). [main]",
        ),
    ):
        command = option(command)
    return command


@click.command(epilog="Example: sft-prep push data_cache/demo user/demo-shards")
@click.argument("shards", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option(
    "--private/--public", default=True, help="Who may see a data set that is made. [--private]"
)
@_transfer_options
@logging_options
def push(*, shards: Path, repo: str, private: bool, **options: Any) -> None:
    """Verify a set, compress it, and send it to a hub data set or a directory.

    REPO is user/name or hf://user/name, or a directory: ./NAME, an absolute path, or any that
    exists. What is there already is not sent again; a push that was stopped resumes.
    """
    from prep.sharing.push import PushOptions
    from prep.sharing.push import push as send

    click.echo("\n".join(send(shards, repo, PushOptions(public=not private, **options))))


@click.command(epilog="Example: sft-prep pull user/demo-shards data_cache/demo")
@click.argument("repo")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@_transfer_options
@logging_options
def pull(*, repo: str, out: Path | None, **options: Any) -> None:
    """Fetch a pushed set to OUT, check every digest, verify it. [data_cache/NAME]

    A pull that was stopped resumes; a set that is there is checked, and only what is damaged is
    fetched again.
    """
    from prep.sharing.pull import PullOptions
    from prep.sharing.pull import pull as fetch

    click.echo("\n".join(fetch(repo, out, PullOptions(**options))))
