"""Everything that determines the content of a shard set, known before the build and cheap to know;
its digest.

`explain` compares two of these trees field by field: that is why a cached set does or does not
match.
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

SPAN_CODE_VERSION = 6  # bump when the same rows would give other tokens, kinds or messages
STORE_VERSION = 2  # bump when columns or counts of a stored chunk get other names
KNOWN_DATE = "template date"  # key of the day that a set recorded, in what is known of it
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
    """What must not be trained on."""
    tree: dict[str, Any]

    @property
    def digest(self) -> str:
        return digest(self.tree)

    def differences(self, old: dict[str, Any]) -> list[str]:
        """Return, line by line, what differs from the inputs that another set was made from."""
        return difference_lines(old, self.tree)

    def of_eval_set(self) -> "Inputs":
        """Return the inputs of the set that is held out: every row of its prompts, once, whatever
        the mix."""
        entries = (
            replace(entry, fraction=None, rows=None, epochs=None) for entry in self.mixture.sources
        )
        mixture = replace(self.mixture, name=f"{self.mixture.name}-eval", sources=tuple(entries))
        return replace(self, mixture=mixture, tree={**self.tree, "part": EVAL_DIR})

    def memory(self) -> dict[str, Any]:
        """Return what the next build may trust instead of hashing again; holds paths, goes to
        build_info.json."""
        return {
            **remember((*self.sources, *self.questions)),
            **remember_tokenizer(self.mixture.tokenizer, self.tokenizer),
        }

    def store_inputs(
        self, source: ResolvedSource, conversion: Conversion, backend: str
    ) -> dict[str, Any]:
        """Return all that decides the samples of one source; a hash of it is the name of their
        store."""
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
    more = len(changed) - len(lines)
    return [*lines, f"and {more} more"] if more else lines


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
    asked = mixture.decontaminate
    questions = tuple(
        resolve_source(SourceConfig(path=path, split=asked.split), base, known)
        for path in asked.files
    )
    plain = config.to_plain(mixture)
    plain["tokenizer"]["name"] = tokenizer.name
    plain["template"]["name"] = template.name
    for entry, source in zip(plain["sources"], sources, strict=True):
        entry["path"] = source.hub_id or source.name
        entry["name"] = source.name
        for key in ("split_by", "group_epochs"):
            if not entry[key]:
                del entry[
                    key
                ]  # as for `eval`: a mixture that does without it has the digest that it had
    if not mixture.eval.fraction:
        del plain["eval"]  # nothing is held out: the digest is that of a mixture without the table
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
    """Settle the day that a template prints: what the mixture says, else what the set recorded,
    else today."""
    if mixture.template.date or not template.asks_for_date:
        return mixture
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
