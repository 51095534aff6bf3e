"""Find a tokenizer, identify it, load it, and write the copy that travels with the shards.

tokenizer.json alone decides which ids a text has. transformers may decide otherwise: a class named
in tokenizer_config.json may replace the pre-tokenizer. Names of special tokens come from the files
beside it. The identity is the hash of tokenizer.json and these names, which needs no import: a
build that is up to date must end at once.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.config import TokenizerConfig
from prep.rendering.template import TemplateText
from prep.tokenization.convert_vocabulary import converted_json, converted_sha256
from prep.tokenization.special_names import TokenizerNames, read_json, read_names
from shared.errors import ConfigError, DataError
from shared.hashing import canonical_json, sha256_file
from shared.shard_format import FileEntry

FILE_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    # decides nothing here, but transformers reads it: see at_inference.py
    "config.json",
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
_MAX_SHOWN_TOKENS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    # hub id, or the name of the directory
    name: str
    # resolved commit of a hub tokenizer
    revision: str | None
    directory: Path
    # of tokenizer.json, or of the conversion of the other files
    json_sha256: str
    names: TokenizerNames
    # what the conversion depends on, "" if there is a tokenizer.json
    converted_key: str = ""

    def identity(self) -> dict[str, Any]:
        """Return all that decides ids and special tokens, for the inputs of a build."""
        return {"revision": self.revision, "json": self.json_sha256, **self.names.plain()}

    def chat_template(self) -> str | None:
        """Return the tokenizer's chat template, None if it has none. Raises DataError for
        unreadable JSON."""
        separate = self.directory / "chat_template.jinja"
        if separate.is_file():
            return separate.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = read_json(self.directory / name).get("chat_template")
            if isinstance(template, list):
                # several named templates
                entries = (entry for entry in template if isinstance(entry, dict))
                defaults = (e.get("template") for e in entries if e.get("name") == "default")
                template = next(defaults, None)
            if template and isinstance(template, str):
                return template
        return None


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    # of the package `tokenizers`, without truncation and padding
    tokenizer: Any
    tokenizer_json: str
    # bos_token, eos_token, ... as in chat templates
    special_tokens: dict[str, str]
    special_ids: dict[str, int]
    # contents of the added tokens with `special: true`, and of those with a name
    control_tokens: tuple[str, ...]
    # content of every added token -> its `special`, in order of content
    added_tokens: dict[str, bool]
    # of the tokens that tokenizer.add_tokens put behind the vocabulary
    new_ids: tuple[int, ...]
    model_max_length: int


def resolve_tokenizer(
    config: TokenizerConfig, base: Path, known: Mapping[str, Any]
) -> TokenizerFiles:
    """Return the files of a tokenizer directory, relative to `base`, or of a hub id.

    `known` is what `remember_tokenizer` returned for an earlier build. Raises ConfigError,
    DataError.
    """
    local = (base / Path(config.name).expanduser()).resolve()
    if local.is_dir():
        return _files(local.name, None, local, known)
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ConfigError(f"tokenizer.name = {config.name!r}: no such directory below {base}")
    remembered = known.get(_key(config))
    if isinstance(remembered, list) and Path(remembered[1]).is_dir():
        return _files(config.name, remembered[0], Path(remembered[1]), known)
    from huggingface_hub import snapshot_download

    commit = resolve_tokenizer_commit(config.name, config.revision)
    with _hub_errors(config.name, config.revision):
        directory = Path(
            snapshot_download(config.name, revision=commit, allow_patterns=list(FILE_NAMES))
        )
    return _files(config.name, commit, directory, known)


def remember_tokenizer(config: TokenizerConfig, files: TokenizerFiles) -> dict[str, Any]:
    """Return the `known` of the next build: the commit of a hub revision, the hash of a conversion.

    It may contain paths: never hash it.
    """
    converted = {files.converted_key: files.json_sha256} if files.converted_key else {}
    moving = (
        {} if files.revision is None else {_key(config): [files.revision, str(files.directory)]}
    )
    return {**converted, **moving}


def load_tokenizer(files: TokenizerFiles, add_tokens: Sequence[str] = ()) -> LoadedTokenizer:
    """Load tokenizer.json and put `add_tokens` behind it. Raises DataError, ConfigError."""
    import tokenizers

    file = files.directory / "tokenizer.json"
    try:
        text = (
            converted_json(files.directory)
            if files.converted_key
            else file.read_text(encoding="utf-8")
        )
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{file} cannot be read: {exc}") from exc
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as exc:
        # tokenizers raises plain Exception
        raise DataError(f"{file} is not a tokenizer: {exc}") from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _warn_of_tokens_left_out(tokenizer, files, add_tokens)
    new_ids = _add_new(tokenizer, files.name, add_tokens)
    special, special_ids = {}, {}
    for name, content in files.names.special.items():
        index = tokenizer.token_to_id(content)
        if index is not None:
            special[name], special_ids[name] = content, index
            continue
        what = f"{files.name} names {content!r} as its {name}, but tokenizer.json has no such token"
        if name in ("bos_token", "eos_token"):
            raise DataError(f"{what}; correct the files, or name it in tokenizer.add_tokens")
        logger.warning("%s: left out", what)
    # A token with a name is matched whole, as in transformers, even if the file has it in its
    # vocabulary only.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = dict.fromkeys([*special.values(), *files.names.further])
    _add_special(
        tokenizer,
        [c for c in named if c not in added and tokenizer.token_to_id(c) is not None],
    )
    tokens = tokenizer.get_added_tokens_decoder().values()
    control = {token.content for token in tokens if token.special} | set(special.values())
    return LoadedTokenizer(
        tokenizer=tokenizer,
        tokenizer_json=tokenizer.to_str(),
        special_tokens=special,
        special_ids=special_ids,
        control_tokens=tuple(sorted(control)),
        added_tokens=dict(sorted((token.content, bool(token.special)) for token in tokens)),
        new_ids=new_ids,
        model_max_length=files.names.model_max_length,
    )


def write_tokenizer(
    out: Path, loaded: LoadedTokenizer, encoder_json: str, template: TemplateText
) -> dict[str, FileEntry]:
    """Write the tokenizer and the template that were used, as files that transformers loads.

    The copy adds nothing: BOS is in the ids only if the template printed it, so there is no
    post-processor. Its class uses tokenizer.json unchanged, also beside the config.json of a model;
    only for a few model types (qwen2, qwen3_5) does transformers replace the pre-tokenizer whatever
    the class.
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
    return {
        path.name: FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(out.iterdir())
    }


def _files(
    name: str, revision: str | None, directory: Path, known: Mapping[str, Any]
) -> TokenizerFiles:
    names = read_names(directory)
    file = directory / "tokenizer.json"
    if file.is_file():
        return TokenizerFiles(name, revision, directory, sha256_file(file), names)
    hashes = {
        name: sha256_file(directory / name) for name in FILE_NAMES if (directory / name).is_file()
    }
    if not hashes.keys() & {"tokenizer.model", "vocab.json"}:
        raise ConfigError(
            f"tokenizer.name: {directory} has no tokenizer.json, tokenizer.model or vocab.json"
        )
    key, sha256 = converted_sha256(directory, hashes, known)
    return TokenizerFiles(name, revision, directory, sha256, names, key)


def _add_new(tokenizer: Any, name: str, wanted: Sequence[str]) -> tuple[int, ...]:
    """Put tokens behind the vocabulary and return their ids. Raises ConfigError for an ordinary
    entry."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for content in wanted:
        if content not in added and tokenizer.token_to_id(content) is not None:
            raise ConfigError(
                f"tokenizer.add_tokens: {content!r} is an ordinary entry of the vocabulary of"
                f" {name} (id {tokenizer.token_to_id(content)}): every text with it would get other"
                " ids; add another token"
            )
    if present := [content for content in wanted if content in added]:
        logger.info("tokenizer.add_tokens: %s has %s already", name, _listed(present))
    new = [content for content in wanted if content not in added]
    first = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    _add_special(tokenizer, new)
    ids = tuple(map(tokenizer.token_to_id, new))
    if ids != tuple(range(first, first + len(new))):
        raise ConfigError(
            f"tokenizer.add_tokens: the vocabulary of {name} has gaps, so that new tokens get the"
            f" ids {list(ids)} instead of {first} and up; add them to its tokenizer.json by hand"
        )
    return ids


def _add_special(tokenizer: Any, contents: Sequence[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(content, normalized=False) for content in contents])


def _warn_of_tokens_left_out(
    tokenizer: Any, files: TokenizerFiles, add_tokens: Sequence[str]
) -> None:
    handled = {*add_tokens, *files.names.special.values()}
    absent = [
        content
        for content in dict.fromkeys([*files.names.declared, *files.names.further])
        if content not in handled and tokenizer.token_to_id(content) is None
    ]
    if absent:
        logger.warning(
            "the files beside tokenizer.json of %s list %d tokens that it does not have (%s):"
            " transformers would add them when it loads the tokenizer, a build does not; list those"
            " that you need in tokenizer.add_tokens",
            files.name,
            len(absent),
            _listed(absent),
        )


def _listed(contents: Sequence[str]) -> str:
    more = len(contents) - _MAX_SHOWN_TOKENS
    return ", ".join(contents[:_MAX_SHOWN_TOKENS]) + (f" and {more} more" if more > 0 else "")


def resolve_tokenizer_commit(name: str, revision: str) -> str:
    """Return the commit that `revision` of a hub model names now. Raises DataError if the hub does
    not answer."""
    from huggingface_hub import HfApi

    with _hub_errors(name, revision):
        return str(HfApi().model_info(name, revision=revision).sha)


@contextlib.contextmanager
def _hub_errors(name: str, revision: str) -> Iterator[None]:
    from shared.hub import NO_ANSWER

    try:
        yield
    except NO_ANSWER as exc:
        raise DataError(
            f"tokenizer.name = {name!r}: no such directory, and the hub does not give revision"
            f" {revision!r}: {exc}"
        ) from exc


def _key(config: TokenizerConfig) -> str:
    return f"tokenizer:{config.name}@{config.revision}"
