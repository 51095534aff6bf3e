"""What a push may replace in a directory: what an earlier push put there. Nothing else is ever
deleted."""

import re
from collections.abc import Callable
from pathlib import Path

from prep.sharing.dataset_card import CARD_NAME, render_set_card
from prep.sharing.wire_format import EVAL_MANIFEST, SUFFIX, TRANSFER_NAME, contents_of
from prep.tokenization.tokenizer import FILE_NAMES
from prep.writing.owned_files import remove_own, shown, sort_out
from shared.errors import ArtifactError
from shared.shard_format import COLUMNS, EVAL_DIR, MANIFEST_NAME, SHARDS_DIR, TOKENIZER_DIR

_COLUMN = rf"{SHARDS_DIR}/\d{{5,}}/(?:{'|'.join(COLUMNS)})\.npy"
_TOKENIZER = rf"{TOKENIZER_DIR}/(?:{'|'.join(map(re.escape, FILE_NAMES))})"
_OF_THE_SET = re.compile(
    rf"(?:{EVAL_DIR}/)?(?:{_COLUMN}{re.escape(SUFFIX)}|{_TOKENIZER}|{re.escape(MANIFEST_NAME)})"
)
_BESIDE = {TRANSFER_NAME, CARD_NAME}
_UNFINISHED = re.compile(
    rf"\.scratch/(?:{EVAL_DIR}/)?(?:{_COLUMN}|(?:{SHARDS_DIR}/(?:\d{{5,}}/)?)?)"
    rf"|(?:\.tmp-)?(?:{'|'.join(map(re.escape, sorted(_BESIDE)))})(?:-\d+)?"
)


def is_of_the_set(name: str) -> bool:
    """Return whether `name` is the path of a file of the set itself: neither transfer.json nor the
    card."""
    return _OF_THE_SET.fullmatch(name) is not None


def check_replaceable(path: Path) -> None:
    """Raise ArtifactError if the directory at `path` holds anything but what a push put there."""
    if foreign := sort_out(path, _own_names(path))[1]:
        edited = f" ({CARD_NAME} is not what push wrote)" if CARD_NAME in foreign else ""
        raise ArtifactError(
            f"{path} holds files that no push put there: {shown(foreign)}{edited}; "
            "move them away, or give another place"
        )


def check_staging(path: Path) -> None:
    """Raise ArtifactError if `path` exists and is not the unfinished directory of a stopped
    push."""

    def is_ours(name: str) -> bool:
        return is_of_the_set(name) or _UNFINISHED.fullmatch(name) is not None

    is_no_directory = path.is_symlink() or (path.exists() and not path.is_dir())
    if is_no_directory or sort_out(path, is_ours)[1]:
        raise ArtifactError(f"{path} is in the way and was made by no push; move it away")


def remove(path: Path) -> bool:
    """Remove what a push put at `path`, unless it holds files of others; return whether all is
    gone."""
    return remove_own(path, _own_names(path), last={TRANSFER_NAME})


def _own_names(path: Path) -> Callable[[str], bool]:
    try:
        manifests = {
            name: (path / name).read_bytes()
            for name in (MANIFEST_NAME, EVAL_MANIFEST)
            if (path / name).exists()
        }
        is_own_card = (path / CARD_NAME).read_bytes() == render_set_card(
            contents_of(manifests, str(path))
        )
    except (OSError, ArtifactError, KeyError):
        is_own_card = False  # there is nothing to compare it with
    beside = _BESIDE if is_own_card else {TRANSFER_NAME}
    return lambda name: is_of_the_set(name) or name in beside
