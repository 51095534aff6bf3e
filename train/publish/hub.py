"""A trained model as a model repository of the hub: one commit, verified by digest, private if the
push creates it.

Nothing is pushed unless asked. What the hub has is not sent again, so a push that was stopped
resumes when it is repeated; no local file is ever changed.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from shared.errors import ChecksumError, IncompleteArtifactError
from shared.hub import is_on_hub, retrying, translate_hub_errors
from train.run.directory import RunDir

logger = logging.getLogger(__name__)

NO_DIGESTS: Mapping[str, str] = MappingProxyType({})
_WEIGHTS = {"model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"}

Content = Path | bytes


def check_access(repo: str) -> None:
    """Create the hub repository `repo`, private, unless it exists. Raises ConfigError or
    PrerequisiteError."""
    api = HfApi(library_name="sft-train")
    with translate_hub_errors(f"push to {repo}"):
        retrying(lambda: api.create_repo(repo, private=True, exist_ok=True))


def push_model(path: Path, repo: str) -> str:
    """Push the model of the run, or the exported model, at `path` to the hub repository `repo`;
    return its address.

    Raises IncompleteArtifactError without a model, and what `sync` raises.
    """
    model = RunDir(path).model
    folder = model if (path / "config.json").exists() and model.is_dir() else path
    files: dict[str, Content] = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    if not _WEIGHTS & files.keys():
        what = "holds no exported model" if path.exists() else "does not exist"
        raise IncompleteArtifactError(
            f"{path} {what}; give the directory of a run that is complete, or a checkpoint"
        )
    return sync(
        repo,
        files,
        source=folder,
        message=f"Trained by sft-train: {folder.parent.name}",
        # an older push may have had more files of weights: with them the repository would be two
        # models
        is_ours=lambda name: name.endswith((".safetensors", ".safetensors.index.json")),
    )


def sync(
    repo: str,
    files: Mapping[str, Content],
    *,
    source: Path,
    message: str,
    is_ours: Callable[[str], bool],
    branch: str | None = None,
    digests: Mapping[str, str] = NO_DIGESTS,
) -> str:
    """Make a branch (default: main) of the hub repository `repo` hold `files`, in one commit;
    return its address.

    What it has already is not sent, and what `is_ours` and not among `files` is removed there. A
    repository that is created is private. `digests`: the sha256 that files must have. `source` is
    for messages. Raises ConfigError for a bad name, PrerequisiteError or ArtifactError for what the
    hub or the network does not let through, and ChecksumError if a local file, or the hub
    afterwards, holds other bytes.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()  # the client draws them into files too
    check_access(repo)
    api = HfApi(library_name="sft-train")
    with translate_hub_errors(f"push to {repo}", hint=f"; all is safe in {source}"):
        if branch is not None:
            retrying(lambda: api.create_branch(repo, branch=branch, exist_ok=True))
        head, listed = _list_files(api, repo, branch)
        known = dict(digests)
        additions = []
        for name in _differing(files, listed, known):
            addition = CommitOperationAdd(name, files[name])
            known[name] = addition.upload_info.sha256.hex()  # large files are not read again
            if known[name] != digests.get(name, known[name]):
                raise ChecksumError(
                    f"{source / name}: its bytes have changed since it was written; it was not"
                    " pushed"
                )
            additions.append(addition)
        stale = [name for name in listed if is_ours(name) and name not in files]
        if additions or stale:
            logger.info(
                "pushing %d of %d files of %s to %s", len(additions), len(files), source, repo
            )
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *additions,
                *(CommitOperationDelete(name) for name in stale),
            ]
            retrying(
                lambda: api.create_commit(
                    repo,
                    operations,
                    commit_message=message,
                    revision=branch,
                    parent_commit=head,
                )
            )
            _, listed = _list_files(api, repo, branch)
    if differing := _differing(files, listed, known):
        raise ChecksumError(
            f"{repo} does not hold {', '.join(differing)} as {source} does; push it again"
        )
    return f"{api.endpoint}/{repo}" if branch is None else f"{api.endpoint}/{repo}/tree/{branch}"


def _list_files(
    api: HfApi, repo: str, branch: str | None
) -> tuple[str | None, dict[str, RepoFile]]:
    """Return the newest commit of the branch and its files."""
    head = retrying(lambda: api.model_info(repo, revision=branch)).sha
    listed = api.list_repo_tree(repo, recursive=True, revision=head)
    return head, {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}


def _differing(
    files: Mapping[str, Content], listed: Mapping[str, RepoFile], digests: Mapping[str, str]
) -> list[str]:
    """Return the names of the files that the hub does not have as they are here."""
    return [
        name
        for name, content in files.items()
        if not is_on_hub(
            listed.get(name),
            num_bytes=content.stat().st_size if isinstance(content, Path) else len(content),
            sha256=digests.get(name),
            content=content,
        )
    ]
