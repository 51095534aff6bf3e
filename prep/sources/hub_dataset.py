"""Read data sets of the hub, and directories laid out like one, through `datasets`.

A hub data set is identified by its commit. A directory has none: the caller hashes the files that
are named here, and rows are streamed from these files, never from a cache of an earlier state.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import DataError, one_line

_COMMIT_DIGITS = 40


def resolve_commit(hub_id: str, revision: str) -> str:
    """Return the commit that a branch, tag or commit names now; a full commit needs no network."""
    if len(revision) == _COMMIT_DIGITS and set(revision) <= set("0123456789abcdef"):
        return revision
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(hub_id, revision=revision).sha
    except Exception as exc:
        # the client's errors have no common base: connection, HTTP, validation
        raise DataError(
            f"hub data set {hub_id!r} at revision {revision!r} cannot be resolved:"
            f" {one_line(exc)}; check its id, your network and your token, or give the path of"
            " local files"
        ) from exc
    return str(commit)


def files_of_directory(directory: Path, split: str) -> list[Path]:
    """Return what the rows of `split` depend on: the data files, and the README, which may name
    them."""
    import datasets

    try:
        splits = datasets.load_dataset_builder(str(directory)).config.data_files or {}
    except Exception as exc:
        # no common base again: no data files, a broken README, unknown formats
        raise DataError(
            f"{directory} cannot be read as a data set: {one_line(exc)}; "
            "expected a README.md and data files as in a hub repository, or give a glob of files"
        ) from exc
    if split not in splits:
        raise DataError(
            f"{directory} has no split {split!r}; it has {', '.join(map(str, splits)) or 'none'}"
        )
    paths = [Path(file) for file in splits[split]]
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{directory}: its README names {path}, which is not a local file; download it"
                " first"
            )
    readme = directory / "README.md"
    return [readme, *paths] if readme.is_file() else paths


def iter_tables(
    location: str, *, split: str, revision: str | None, batch_rows: int
) -> Iterator[Any]:
    """Yield the rows of a split as Arrow tables of at most `batch_rows` rows.

    With a `revision`, `location` is a hub id, whose files are downloaded once into the Hugging Face
    cache; without one it is a directory.
    """
    import datasets

    try:
        if revision is None:
            rows = datasets.load_dataset(location, split=split, streaming=True)
        else:
            rows = datasets.load_dataset(location, split=split, revision=revision)
        yield from rows.with_format("arrow").iter(batch_size=batch_rows)
    except Exception as exc:
        # as above, and pyarrow's errors for a damaged file
        raise DataError(f"{location}, split {split!r}, cannot be read: {one_line(exc)}") from exc
