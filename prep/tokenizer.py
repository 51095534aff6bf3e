"""Find a tokenizer, say what identifies it, load it through transformers, and write the copy that travels with shards.

Identity is the hashes of its files, known without importing transformers: an up-to-date build must say so at once.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.config import TokenizerConfig
from prep.template import TemplateText
from shared.errors import ConfigError, DataError, PrerequisiteError
from shared.hashing import canonical_json, sha256_file
from shared.shard_format import FileEntry

FILE_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
CANARY_TEXT = (
    "Don't panic: 3.14159 x 10^8 m/s,\n\n\t\tna\u00efve caf\u00e9  \u6771\u4eac \U0001f642 "
    "<think>def f(x):\n    return 12345</think>\r\n"
)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    name: str  # hub id, or the name of the directory
    revision: str | None  # resolved commit of a hub tokenizer
    directory: Path
    sha256: dict[str, str]  # file name -> hash

    def chat_template(self) -> str | None:
        """Return the tokenizer's own chat template, None where it has none. Raises DataError for unreadable JSON."""
        separate = self.directory / "chat_template.jinja"
        if separate.is_file():
            return separate.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            if name in self.sha256:
                found = _default_template(_read_json(self.directory / name).get("chat_template"))
                if found:
                    return found
        return None


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    tokenizer_json: str
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as chat templates see them
    special_ids: dict[str, int]
    added_tokens: dict[str, bool]  # content -> special
    control_tokens: tuple[str, ...]  # contents of the added tokens with `special: true`, and the EOS
    model_max_length: int


def resolve_tokenizer(config: TokenizerConfig, base: Path, known: Mapping[str, Any]) -> TokenizerFiles:
    """Return the files of a tokenizer directory (relative to `base`) or hub id; `known` as in `resolve_source`."""
    local = (base / Path(config.name).expanduser()).resolve()
    if local.is_dir():
        return TokenizerFiles(local.name, None, local, _hash_files(local))
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ConfigError(f"tokenizer.name = {config.name!r}: no such directory below {base}")
    commit, directory = _download(config, known)
    return TokenizerFiles(config.name, commit, directory, _hash_files(directory))


def remember_tokenizer(config: TokenizerConfig, files: TokenizerFiles) -> dict[str, Any]:
    """Return the memory that keeps a moving hub revision where it was. It may hold paths: never hash it."""
    return {} if files.revision is None else {_key(config): [files.revision, str(files.directory)]}


def load_tokenizer(files: TokenizerFiles) -> LoadedTokenizer:
    """Load through transformers: its ids are those of inference. Raises PrerequisiteError, DataError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(files.directory), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as exc:
        raise DataError(f"{files.directory}: transformers cannot load this tokenizer: {exc}") from exc
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PrerequisiteError(
            f"{files.name}: not a fast tokenizer; save it with transformers as tokenizer.json first"
        )
    named = {name: getattr(tokenizer, name) for name in _NAMED_TOKENS if getattr(tokenizer, name, None)}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = dict.fromkeys([*added, *([named["eos_token"]] if "eos_token" in named else [])])
    return LoadedTokenizer(
        tokenizer_json=backend.to_str(),
        special_tokens={name: str(token) for name, token in named.items()},
        special_ids={name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in named.items()},
        added_tokens={token.content: bool(token.special) for token in tokenizer.added_tokens_decoder.values()},
        control_tokens=tuple(sorted(control)),
        model_max_length=min(int(tokenizer.model_max_length), 1 << 62),
    )


def write_tokenizer(
    out: Path, loaded: LoadedTokenizer, encoder_json: str, template: TemplateText
) -> dict[str, FileEntry]:
    """Write the tokenizer that was used, with the template that was used, as transformers loads them.

    It adds nothing of its own: BOS is in the ids only where the template printed it, so no post-processor is kept.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": loaded.model_max_length,
        **loaded.special_tokens,
    }
    out.mkdir()
    (out / "tokenizer.json").write_bytes(encoder_json.encode("utf-8"))
    (out / "tokenizer_config.json").write_bytes(canonical_json(config))
    (out / "chat_template.jinja").write_bytes(template.text.encode("utf-8"))
    return {path.name: FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path)) for path in sorted(out.iterdir())}


def _hash_files(directory: Path) -> dict[str, str]:
    found = {name: sha256_file(directory / name) for name in FILE_NAMES if (directory / name).is_file()}
    if not found.keys() & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise ConfigError(f"tokenizer.name: {directory} holds no tokenizer.json, tokenizer.model or vocab.json")
    return found


def _download(config: TokenizerConfig, known: Mapping[str, Any]) -> tuple[str, Path]:
    remembered = known.get(_key(config))
    if isinstance(remembered, list) and Path(remembered[1]).is_dir():
        return remembered[0], Path(remembered[1])
    from huggingface_hub import snapshot_download

    commit = resolve_tokenizer_commit(config.name, config.revision)
    with _hub_errors(config.name, config.revision):
        return commit, Path(snapshot_download(config.name, revision=commit, allow_patterns=list(FILE_NAMES)))


def resolve_tokenizer_commit(name: str, revision: str) -> str:
    """Return the commit that `revision` of a hub model names now. Raises DataError if the hub does not say."""
    from huggingface_hub import HfApi

    with _hub_errors(name, revision):
        return str(HfApi().model_info(name, revision=revision).sha)


@contextlib.contextmanager
def _hub_errors(name: str, revision: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    no_answer: type[Exception] = HfHubHTTPError.__bases__[
        0
    ]  # of the client: httpx's or httpx2's, depending on its release
    try:
        yield
    except (no_answer, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as exc:
        raise DataError(
            f"tokenizer.name = {name!r}: no such directory, and the hub does not give revision {revision!r}: {exc}"
        ) from exc


def _key(config: TokenizerConfig) -> str:
    return f"tokenizer:{config.name}@{config.revision}"


def _default_template(value: Any) -> str | None:
    if isinstance(value, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in value}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as exc:
        raise DataError(f"{path} is not valid JSON: {exc}") from exc
    return data if isinstance(data, dict) else {}
