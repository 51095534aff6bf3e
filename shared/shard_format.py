"""The shard set on disk, version 1: column names, dtypes, kinds, the manifest and its fingerprint.

The bytes are specified in FORMAT.md; a change of bytes bumps FORMAT_VERSION.

    sequence    0        1    2          3
    tokens    [ a a a a | b b | c c c c c | d d d ]      one flat array per shard
    seq_offsets 0         4     6           11    14     in tokens
    pack_offsets 0              2                 4      in sequences: pack 0 = a b, pack 1 = c d
"""

from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import PurePosixPath
from typing import Any, ClassVar

from shared import config
from shared.errors import ArtifactError, ChecksumError, ConfigError, FormatVersionError
from shared.hashing import digest

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
BUILD_INFO_NAME = "build_info.json"
REJECTS_NAME = "rejects.jsonl.zst"
TOKENIZER_DIR = "tokenizer"
SHARDS_DIR = "shards"
EVAL_DIR = "eval"
# key in rows_dropped of a group of a split source: the rows of its other groups
OTHER_GROUPS = "other_groups"

# name -> (dtype string, trailing shape); the first dimension is T, S+1, P+1, P or S
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "tokens": ("<i4", ()),  # [T]
    "loss_mask": ("|u1", ()),  # [T]
    "kind": ("|u1", ()),  # [T]
    "seq_offsets": ("<i8", ()),  # [S+1]
    "pack_offsets": ("<i8", ()),  # [P+1]
    "pack_loss_tokens": ("<i4", ()),  # [P]
    "seq_origin": ("<i8", (3,)),  # [S, 3] source index, row number, first token within the sample
}


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the 128 bytes before the data of a column: .npy version 1.0, C order, padded with
    spaces.

    Written out here because the bytes are hashed: no release of numpy may pad them differently.
    """
    # a tuple as Python prints it: (13,) but (3, 3)
    sizes = "(" + ", ".join(map(str, shape)) + (",)" if len(shape) == 1 else ")")
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {sizes}, }}"
    return (
        b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode("ascii") + b"\n"
    )


class Kind(IntEnum):
    """Who wrote a token. The low seven bits of the kind column. A manifest lists the names in lower
    case."""

    TEMPLATE = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TERMINATOR = 4
    TOOL_CALL = 5
    TOOL = 6
    REASONING = 7


# set on a token that also covers bytes outside the message text that its kind names
STRADDLES = 0x80
KIND_MASK = 0x7F

# an assistant turn consists of these: the kinds that `train_on = "assistant"` can train
ASSISTANT_KINDS = (Kind.ASSISTANT, Kind.TERMINATOR, Kind.TOOL_CALL, Kind.REASONING)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerEntry:
    name: str
    revision: str | None
    """The resolved commit of a hub tokenizer; None for a directory, which its files' hashes
    identify."""
    files: dict[str, FileEntry]
    vocab_size: int
    """One more than the largest token id that the tokenizer knows, added tokens included."""
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    terminator_ids: tuple[int, ...]
    """Ids that end an assistant turn in this set, most frequent first: the export's generation
    config lists them."""
    canary_ids: tuple[int, ...]
    """Ids of a fixed text: a tokenizer that gives others is not this one, whatever its files
    are."""
    new_ids: tuple[int, ...]
    """Consecutive ids behind the base model's vocabulary, of tokens that the mixture added: the
    model has learned nothing for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateEntry:
    name: str
    sha256: str
    split_markers: dict[str, int]
    """Text that looks like a marker of the template but takes several tokens -> how many, 0 where
    the tokenizer cannot encode it. Empty for a shipped template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceEntry:
    name: str
    hub_id: str | None
    revision: str | None
    content_sha256: str | None
    rows_read: int
    rows_used: int
    rows_rejected: dict[str, int]
    """Malformed and unverifiable rows, by reason: what the reject budget counts."""
    RENAMED: ClassVar = {"rows_uncarried": "rows_unrendered"}
    rows_unrendered: dict[str, int]
    """Rows with a message or field that the template would drop, by reason."""
    rows_dropped: dict[str, int]
    """Good rows that a policy of the mixture left out (over-length, no loss tokens, sampling), by
    reason."""
    rows_truncated: int
    rows_without_terminator: int
    """Rows used whose last trained turn does not end in a terminator, whatever the cause."""
    tokens: int
    loss_tokens: int
    details: dict[str, Any] = field(default_factory=dict)
    """Further counts and settings, e.g. fraction, epochs, rows that were cross-checked, rows on the
    slow path."""

    @property
    def own_rows(self) -> int:
        """How many of the rows read belong to it: all, unless it is a group of a split source."""
        return self.rows_read - self.rows_dropped.get(OTHER_GROUPS, 0)

    @property
    def origin(self) -> str:
        """Where its rows come from, for people: the hub data set if it is one, and which group of
        it."""
        whole = self.hub_id or str(self.details.get("group_of", self.name))
        return f"{self.name} of {whole}" if "group_of" in self.details else whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    packs: int
    sequences: int
    tokens: int
    loss_tokens: int
    density: float
    """tokens / (packs x max_seq_len)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    path: str
    packs: int
    sequences: int
    tokens: int
    loss_tokens: int
    files: dict[str, FileEntry]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The description of a shard set; no time, host, absolute path or worker count is in it."""

    format_version: int
    name: str
    fingerprint: str
    inputs_digest: str
    inputs: dict[str, Any]
    """Everything that determines the content, known before the build; its digest is
    `inputs_digest`."""
    config: dict[str, Any]
    recipe: str
    tokenizer: TokenizerEntry
    chat_template: TemplateEntry
    kinds: dict[str, int]
    max_seq_len: int
    max_token_id: int
    sources: tuple[SourceEntry, ...]
    totals: Totals
    shards: tuple[ShardEntry, ...]


def sealed(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as it is written: plain, with `seal`, the digest of all other keys.

    The fingerprint covers what training sees; the seal covers every other word of the manifest too.
    """
    plain: dict[str, Any] = config.to_plain(manifest)
    return {**plain, "seal": digest(plain)}


def fingerprint_of(
    *,
    max_seq_len: int,
    tokenizer_files: dict[str, FileEntry],
    template_sha256: str,
    source_names: list[str],
    shards: list[ShardEntry],
) -> str:
    """Return the identity of the content: a recipe, a name, or another library that gives the same
    bytes does not change it."""
    return digest(
        {
            "format_version": FORMAT_VERSION,
            "max_seq_len": max_seq_len,
            "tokenizer": {name: entry.sha256 for name, entry in tokenizer_files.items()},
            "template": template_sha256,
            "sources": source_names,
            "shards": [
                {name: entry.sha256 for name, entry in shard.files.items()} for shard in shards
            ],
        }
    )


def fingerprint_of_manifest(manifest: Manifest) -> str:
    """Return the fingerprint of the hashes that `manifest` lists."""
    return fingerprint_of(
        max_seq_len=manifest.max_seq_len,
        tokenizer_files=manifest.tokenizer.files,
        template_sha256=manifest.chat_template.sha256,
        source_names=[source.name for source in manifest.sources],
        shards=list(manifest.shards),
    )


def manifest_from_json(data: Any, where: str) -> Manifest:
    """Return the manifest in `data`, checked to agree with itself.

    Raises FormatVersionError before it looks at any other key, ArtifactError or ChecksumError
    after.
    """
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{where}: format_version is {version!r}; this program reads {FORMAT_VERSION}. Make the"
            " set again: sft-prep build --mixture NAME|FILE.toml --out DIRECTORY --rebuild (stored"
            " samples that are the same are used again), or use the version that wrote it"
        )
    unsealed = {key: value for key, value in data.items() if key != "seal"}
    try:
        _check_digest("seal", data.get("seal"), digest(unsealed), where)
        manifest = config.build(Manifest, unsealed, where)
    except ConfigError as exc:
        raise ArtifactError(f"{exc}; the manifest is damaged, build the set again") from exc
    # digest() refuses NaN, a lone surrogate and bottomless nesting
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"{where} is no manifest ({exc}); build or pull the set again") from exc
    _check_names(manifest, where)
    for count in ("packs", "sequences", "tokens", "loss_tokens"):
        total = getattr(manifest.totals, count)
        in_shards = sum(getattr(shard, count) for shard in manifest.shards)
        if total != in_shards:
            raise ArtifactError(
                f"{where}: totals.{count} is {total}, the shards hold {in_shards}; build the set"
                " again"
            )
    _check_digest("fingerprint", manifest.fingerprint, fingerprint_of_manifest(manifest), where)
    _check_digest("inputs_digest", manifest.inputs_digest, digest(manifest.inputs), where)
    return manifest


def _check_digest(key: str, value: object, expected: str, where: str) -> None:
    if value != expected:
        raise ChecksumError(
            f"{where}: {key} is {str(value)[:16]}..., its contents give {expected[:16]}...; the"
            " manifest was changed by hand or damaged, build or pull the set again"
        )


def _check_names(manifest: Manifest, where: str) -> None:
    """Raise ArtifactError for a name that leaves the shard set: a manifest may come from a
    stranger."""
    columns = {f"{name}.npy" for name in COLUMNS}
    for index, shard in enumerate(manifest.shards):
        if shard.path != f"{SHARDS_DIR}/{index:05d}":
            raise ArtifactError(
                f"{where}: shards.{index}.path is {shard.path!r}; expected"
                f" '{SHARDS_DIR}/{index:05d}'"
            )
        if set(shard.files) != columns:
            raise ArtifactError(
                f"{where}: shard {index} lists {sorted(shard.files)}; expected {sorted(columns)}"
            )
    new_ids, vocab_size = manifest.tokenizer.new_ids, manifest.tokenizer.vocab_size
    if new_ids != tuple(range(vocab_size - len(new_ids), vocab_size)):
        raise ArtifactError(
            f"{where}: tokenizer.new_ids are {list(new_ids)}; expected the last ids below"
            f" vocab_size = {vocab_size}"
        )
    # an export copies these files by their names: none may lead out of its directory
    for name in manifest.tokenizer.files:
        path = PurePosixPath(name)
        if (
            path.is_absolute()
            or ".." in path.parts
            or str(path) != name
            or "\\" in name
            or name == "."
        ):
            raise ArtifactError(f"{where}: tokenizer file {name!r} is not a plain relative path")
