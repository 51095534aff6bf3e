"""Everything that determines the content of a shard set, and its digest.

All of it is known before the build, and cheap to know. `explain` compares two of these trees field
by field to say why an existing set does or does not match.
"""

import json
import logging
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from prep.config import MixtureConfig, SourceConfig
from prep.conversations.formats import Conversion
from prep.rendering.template import TemplateText, load_template, today
from prep.sources.resolve import ResolvedSource, remember, resolve_source
from prep.tokenization.tokenizer import TokenizerFiles, remember_tokenizer, resolve_tokenizer
from shared import config
from shared.errors import ConfigError, shorten
from shared.hashing import digest
from shared.shard_format import EVAL_DIR, FORMAT_VERSION

SPAN_CODE_VERSION = 7  # bump when the same rows would give other tokens, kinds or messages
STORE_VERSION = 2  # bump when columns or counts of a stored chunk get other names
KNOWN_DATE = "template date"  # key of the date that a set recorded, among the known facts
_SHOWN_DIFFERENCES = 20
_LIBRARIES = ("gigatoken", "jinja2", "orjson", "tokenizers", "transformers")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    mixture: MixtureConfig
    tokenizer: TokenizerFiles
    template: TemplateText
    sources: tuple[ResolvedSource, ...]
    questions: tuple[ResolvedSource, ...]
    """Sources of questions that must not be trained on."""
    tree: dict[str, Any]

    @property
    def digest(self) -> str:
        return digest(self.tree)

    def differences(self, old: dict[str, Any]) -> list[str]:
        """Return, line by line, what differs from the inputs of another set."""
        return difference_lines(old, self.tree)

    def of_eval_set(self) -> "Inputs":
        """Return the inputs of the eval set: every row of its prompts, once, whatever the mix."""
        sources = tuple(
            replace(source, fraction=None, rows=None, epochs=None)
            for source in self.mixture.sources
        )
        mixture = replace(self.mixture, name=f"{self.mixture.name}-eval", sources=sources)
        return replace(self, mixture=mixture, tree={**self.tree, "part": EVAL_DIR})

    def known_hashes(self) -> dict[str, Any]:
        """Return what the next build may trust instead of hashing files again.

        Holds paths: it goes to build_info.json and is never hashed.
        """
        return {
            **remember((*self.sources, *self.questions)),
            **remember_tokenizer(self.mixture.tokenizer, self.tokenizer),
        }

    def store_inputs(
        self, source: ResolvedSource, conversion: Conversion, backend: str
    ) -> dict[str, Any]:
        """Return everything that decides the samples of a source; its hash names their store."""
        # Only where it is set: the stores of other sources keep their names.
        split_by = [["split_by", conversion.split_by]] if conversion.split_by else []
        return {
            "source": source.identity(),
            "rows": [conversion.format, *map(list, conversion.columns), *split_by],
            "tokenizer": self.tree["tokenizer"],
            "template": self.tree["template"],
            "date": self.mixture.template.date,
            "terminators": list(self.mixture.template.terminators),
            "plain_text_roles": sorted(self.mixture.tokenizer.plain_text_roles),
            "drop_messages": self.mixture.rows.unknown == "drop_message",
            "backend": backend,
            "code": self.tree["code"],
            "versions": self.tree["versions"],
            "columns": STORE_VERSION,
        }


def difference_lines(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for every field in which two trees of inputs differ."""
    changed = config.differences(old, new)
    lines = [
        f"{key}: {_show(before)} -> {_show(after)}"
        for key, before, after in changed[:_SHOWN_DIFFERENCES]
    ]
    if len(changed) > len(lines):
        lines.append(f"and {len(changed) - len(lines)} more")
    return lines


def resolve_inputs(mixture: MixtureConfig, base: Path, known: dict[str, Any]) -> Inputs:
    """Find and hash all inputs. Raises ConfigError, DataError."""
    tokenizer = resolve_tokenizer(mixture.tokenizer, base, known)
    template = load_template(mixture.template, base, tokenizer.chat_template())
    mixture = _with_date(mixture, template, known)
    sources = tuple(resolve_source(source, base, known) for source in mixture.sources)
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two sources are named {name!r}; give one of them another `name`")
    decontaminate = mixture.decontaminate
    questions = tuple(
        resolve_source(SourceConfig(path=path, split=decontaminate.split), base, known)
        for path in decontaminate.files
    )
    # Names instead of paths: the same bytes elsewhere give the same digest.
    plain = config.to_plain(mixture)
    plain["tokenizer"]["name"] = tokenizer.name
    plain["template"]["name"] = template.name
    # Keys that came later are left out while unused: a mixture without them keeps its digest.
    for entry, source in zip(plain["sources"], sources, strict=True):
        entry["path"] = source.hub_id or source.name
        entry["name"] = source.name
        for key in ("split_by", "group_epochs"):
            if not entry[key]:
                del entry[key]
    if not mixture.eval.fraction:
        del plain["eval"]
    added = plain["tokenizer"].pop("add_tokens")
    plain["decontaminate"]["files"] = [source.hub_id or source.name for source in questions]
    tree = {
        "format_version": FORMAT_VERSION,
        "code": SPAN_CODE_VERSION,
        "config": plain,
        "tokenizer": {**tokenizer.identity(), **({"add_tokens": added} if added else {})},
        "template": template.sha256,
        "sources": {source.name: source.identity() for source in sources},
        "questions": [source.identity() for source in questions],
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
    }
    return Inputs(mixture, tokenizer, template, sources, questions, tree)


def _with_date(
    mixture: MixtureConfig, template: TemplateText, known: dict[str, Any]
) -> MixtureConfig:
    """Settle the date that a template prints.

    It is that of the mixture, else the one that an existing set recorded, else today.
    """
    if mixture.template.date or not template.asks_for_date:
        return mixture
    # A set that is built again tomorrow has the same tokens: its first date stays.
    date = known.get(KNOWN_DATE)
    if not date:
        date = today()
        logger.info(
            "the template %r prints the date: %s is used and recorded in the set, whose later"
            ' builds keep it; for the same day in other sets, set template.date = "%s"',
            template.name,
            date,
            date,
        )
    return replace(mixture, template=replace(mixture.template, date=date))


def _show(value: Any) -> str:
    return shorten("absent" if value is None else json.dumps(value, ensure_ascii=False), 80)
