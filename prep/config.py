"""The mixture file: what `sft-prep build` makes a shard set from.

Frozen dataclasses that check their own values. Paths in the file are relative to it.
"""

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from shared import config
from shared.errors import ConfigError

# of one source: each repeat is written to the shards
MAX_EPOCHS = 10_000

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion"]

# the names that `columns` can map; role, content, from and value are keys of every message
FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages", "tools", "role", "content"),
    "sharegpt": ("conversations", "system", "tools", "from", "value"),
    "alpaca": ("instruction", "input", "output", "system", "history", "tools"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    name: str
    """Hub id or directory."""
    revision: str = "main"
    """Branch, tag or commit of a hub tokenizer; resolved to a commit and recorded."""
    backend: Literal["auto", "transformers"] = "auto"
    """`auto` encodes with gigatoken where it can and checks it against the Hugging Face
    tokenizer."""
    plain_text_roles: tuple[Literal["system", "user", "assistant", "tool"], ...] = ()
    """Roles in whose text added tokens such as <think> or <tool_call> are plain text. Control
    tokens are plain text in every role."""
    add_tokens: tuple[str, ...] = ()
    """Special tokens that get ids behind the vocabulary: chat tokens for a base model."""

    def __post_init__(self) -> None:
        tokens = self.add_tokens
        if not all(token.strip() for token in tokens) or len(set(tokens)) < len(tokens):
            raise ConfigError(
                f"add_tokens = {list(tokens)}; expected tokens that differ and are not blank"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateConfig:
    name: str
    """One that ships, `tokenizer` for the tokenizer's own, or the path of a .jinja file."""
    add_bos: bool = False
    """Print the tokenizer's BOS before the template's text."""
    date: str = ""
    """YYYY-MM-DD, for templates that print today's date. Empty: the date of the set's first build,
    which the set records."""
    terminators: tuple[str, ...] = ()
    """Control tokens that end an assistant's turn although they open the next message, as GLM's
    <|user|> does."""

    def __post_init__(self) -> None:
        try:
            # ISO 8601 also allows "20240229" and weeks.
            if self.date and datetime.date.fromisoformat(self.date).isoformat() != self.date:
                raise ValueError("another form")
        except ValueError as exc:
            raise ConfigError(
                f"date = {self.date!r}; expected a day as YYYY-MM-DD ({exc})"
            ) from exc


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which messages are trained: those of assistants, the last of those, or every token."""
    boundary: Literal["overlap", "inside"] = "overlap"
    """Whether a token that straddles a trained text and its surroundings is trained (overlap) or
    not (inside)."""
    reasoning: bool = True
    """Train the reasoning of assistants: `reasoning_content`, and `<think>...</think>` in their
    content."""
    tool_calls: bool = True
    """Train the tool calls of assistants, with the template's words around them."""
    terminator: Literal["all", "last", "none"] = "all"
    """Which terminators of assistant turns are trained. Without one a model does not learn to stop:
    a template that prints none is refused unless this is "none"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthsConfig:
    over_length: Literal["truncate", "truncate_turns", "drop", "split", "error"] = "truncate"
    """What happens to a sample over max_seq_len; see prep/selection/over_length.py. No terminator
    is added at a cut."""
    min_loss_tokens: int = 1
    """Leave out sequences that carry fewer loss tokens."""

    def __post_init__(self) -> None:
        if self.min_loss_tokens < 0:
            raise ConfigError(f"min_loss_tokens = {self.min_loss_tokens}; expected 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsConfig:
    on_error: Literal["stop", "skip"] = "stop"
    """What a malformed or unverifiable row does: end the build, or be counted and listed."""
    reject_budget: float = 0.001
    """With `skip`: the largest fraction of malformed and unverifiable rows that a build
    survives."""
    RENAMED: ClassVar = {"max_uncarried": "max_unrendered"}
    unknown: Literal["leave_out", "drop_message", "error"] = "leave_out"
    """What happens to a row with a message or field that the template would drop silently."""
    max_unrendered: float = 1.0
    """The largest fraction of unrendered rows that a build accepts."""

    def __post_init__(self) -> None:
        for name, value in (
            ("reject_budget", self.reject_budget),
            ("max_unrendered", self.max_unrendered),
        ):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} = {value}; expected a fraction from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    path: str
    """Local file or glob (relative to the mixture file), or a hub data set id."""
    name: str = ""
    """Default: the file's stem, or the hub id."""
    split: str = "train"
    """Split of a hub data set, or of a directory laid out like one."""
    revision: str = "main"
    """Branch, tag or commit of a hub data set; resolved to a commit and recorded."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    """What its rows look like (prep/conversations/formats.py); `auto` looks at the keys of the
    first rows and decides for all of them."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where the source has other names than its format: {prompt = "question", completion =
    "answer"}."""
    RENAMED: ClassVar = {"part_epochs": "group_epochs"}
    split_by: str = ""
    """A column whose values name groups: each is mixed, counted and reported as a separate source
    (prep/selection/split_sources.py)."""
    group_epochs: dict[str, float] = field(default_factory=dict)
    """How often the rows of a group are used, by value: 0 leaves it out, 0.5 takes half, 2 repeats
    it."""
    min_tokens: int | None = None
    """Leave out rows of fewer tokens, counted whole, before any cut."""
    max_tokens: int | None = None
    """Leave out rows of more tokens, counted whole, before any cut."""
    min_loss_tokens: int | None = None
    """Leave out rows that carry fewer loss tokens; besides lengths.min_loss_tokens, which holds for
    all sources."""
    fraction: float | None = None
    """Keep this share of the rows, chosen by seed."""
    rows: int | None = None
    """Keep this many rows, chosen by seed."""
    epochs: float | None = None
    """Use the rows this often: the whole part repeats all of them, the rest chooses by seed."""

    def __post_init__(self) -> None:
        chosen = [key for key in ("fraction", "rows", "epochs") if getattr(self, key) is not None]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} are both set; keep one of them")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise ConfigError(
                f"fraction = {self.fraction}; expected more than 0 and at most 1 (rows = N takes N"
                " rows)"
            )
        if self.rows is not None and self.rows < 1:
            raise ConfigError(f"rows = {self.rows}; expected 1 or more")
        self._check_epochs()
        if self.split_by and self.rows is not None:
            raise ConfigError(
                f"rows = {self.rows} and split_by = {self.split_by!r} are both set, which does not"
                " say how many rows of each group; set fraction or epochs, which hold for every"
                " group, or split_by = ''"
            )
        if self.group_epochs and not self.split_by:
            raise ConfigError(
                "group_epochs is set but not split_by, the column that names the groups; set both"
            )
        # With "auto" the format is not known yet: the columns must fit one of them.
        formats = FIELDS if self.format == "auto" else {self.format: FIELDS[self.format]}
        if not any(set(self.columns) <= set(fields) for fields in formats.values()):
            known = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in formats.items())
            raise ConfigError(
                f"columns maps {', '.join(self.columns)}; expected fields of one format, of {known}"
            )
        if not all(self.columns.values()) or len(set(self.columns.values())) < len(self.columns):
            raise ConfigError(
                f"columns = {self.columns}; expected a different column for each field"
            )
        for key in ("min_tokens", "max_tokens", "min_loss_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key} = {value}; expected 1 or more")
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise ConfigError(
                f"min_tokens = {self.min_tokens} is over max_tokens = {self.max_tokens}"
            )

    def _check_epochs(self) -> None:
        if self.epochs is not None and self.epochs < 0.0:
            raise ConfigError(f"epochs = {self.epochs}; expected 0 (leave the rows out) or more")
        for group, epochs in self.group_epochs.items():
            if epochs < 0.0:
                raise ConfigError(
                    f"group_epochs: {group!r} = {epochs}; expected 0 (leave it out) or more"
                )
        most = max([self.epochs or 0.0, *self.group_epochs.values()])
        if most > MAX_EPOCHS:
            raise ConfigError(
                f"epochs = {most}; expected at most {MAX_EPOCHS:,}: each repeat is written out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    fraction: float = 0.0
    """Hold out this share of the prompts, chosen by seed, with all their rows: the set OUT/eval."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction < 1.0:
            raise ConfigError(
                f"fraction = {self.fraction}; expected 0 (hold nothing out) or more, and less"
                " than 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupConfig:
    exact: bool = False
    """Keep only the first of rows with equal messages, tools and train flags, in the order of the
    sources."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminateConfig:
    files: tuple[str, ...] = ()
    """Files, globs or hub data sets with questions that must not be trained on; relative to the
    mixture file."""
    split: str = "test"
    """Of hub data sets and directories laid out like one."""
    fields: tuple[str, ...] = ()
    """The columns that hold the questions; default: what users say in the conversations there."""
    ngram: int = 13
    """A row is left out if it shares so many consecutive words with a question;
    prep/selection/decontamination/ngrams.py says what a word is."""

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ConfigError(f"ngram = {self.ngram}; expected 1 or more words")
        if self.fields and not self.files:
            raise ConfigError("fields are given but no files; add files, or remove fields")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingConfig:
    temperature: float | None = None
    """Make each source's share proportional to its tokens to the power of 1/temperature, the total
    unchanged."""
    max_epochs: float | None = None
    """Use no source more often than this, even if the total becomes less."""

    def __post_init__(self) -> None:
        if self.max_epochs is not None and self.max_epochs < 1:
            raise ConfigError(f"max_epochs = {self.max_epochs}; expected 1 or more")
        if self.max_epochs is not None and self.temperature is None:
            raise ConfigError(
                "max_epochs is set but no temperature; set both, or epochs of the sources"
            )
        if self.temperature is not None and self.temperature <= 0:
            raise ConfigError(
                f"temperature = {self.temperature}; expected more than 0 (1 changes nothing)"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    name: str
    """The set's name, a plain file name: it goes to data_cache/NAME."""
    max_seq_len: int
    """Tokens that fit in one pack; no sequence is longer."""
    tokenizer: TokenizerConfig
    template: TemplateConfig
    sources: tuple[SourceConfig, ...]
    recipe: str = ""
    """The recipe that sft-train uses by default."""
    seed: int = 0
    """Of every random choice: rows that are kept or held out, order within equal lengths."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    lengths: LengthsConfig = field(default_factory=LengthsConfig)
    rows: RowsConfig = field(default_factory=RowsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)

    def __post_init__(self) -> None:
        if self.max_seq_len < 2:
            raise ConfigError(f"max_seq_len = {self.max_seq_len}; expected 2 or more")
        if self.max_seq_len >= 1 << 31:
            raise ConfigError(f"max_seq_len = {self.max_seq_len}; expected less than 2**31")
        if not self.sources:
            raise ConfigError("no sources; add a [[sources]] table with a path")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(
                f"name = {self.name!r}; expected a plain file name, it becomes data_cache/NAME"
            )
        # A temperature computes the epochs, so no source may set how often it is used.
        for index, source in enumerate(self.sources if self.mixing.temperature is not None else ()):
            for key in ("fraction", "rows", "epochs", "group_epochs"):
                if getattr(source, key) not in (None, {}):
                    raise ConfigError(
                        f"sources.{index}.{key} is set, and so is mixing.temperature, which decides"
                        " how often each source is used; keep one of them"
                    )


def shipped_mixtures() -> dict[str, Path]:
    """Return the mixtures that ship with the package: name -> file."""
    return config.shipped_files("prep", "mixtures", ".toml")


def load_mixture(mixture: str, settings: tuple[str, ...] = ()) -> tuple[MixtureConfig, Path]:
    """Return the mixture named `mixture`, and the directory that its paths are relative to.

    `mixture` is one that ships, or a .toml file. Raises ConfigError for an unknown name, key or
    value.
    """
    path = config.shipped_or_file(mixture, shipped_mixtures(), "mixture")
    tables: dict[str, Any] = config.apply_settings(config.load_toml(path), settings)
    return config.build(MixtureConfig, tables, str(path)), path.resolve().parent
