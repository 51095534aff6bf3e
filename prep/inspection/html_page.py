"""Packs as one HTML page: every token's text, its author, whether it is trained, its row.

    header    set, fingerprint, density          legend   kinds with counts, the filter
    pack 3    a map of the pack, to scale        cards    its sequences: row, lengths, notes, tokens

The page needs no network and may hold anyone's text: all of it is escaped, and its own style and
script are the only ones that its content security policy lets run.
"""

import base64
import hashlib
import html
from collections.abc import Iterator
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np

from prep.inspection.locate import (
    ShownSequence,
    describe_truncation,
    locate_sequences,
    sequences_of,
)
from prep.inspection.token_html import TokenHtml
from prep.inspection.token_text import TokenText, printable
from shared import atomic
from shared.errors import ArtifactError
from shared.shard_format import KIND_MASK, STRADDLES, Kind
from shared.shard_reader import ShardSet

_COLORED = frozenset(kind.name.lower() for kind in Kind)  # page.css has a colour for each of them


def write_page(
    shard_set: ShardSet,
    out: Path,
    *,
    pack: int | None = None,
    row: str | None = None,
    sample: int | None = None,
) -> str:
    """Write the page that `page_of` returns to `out`, in one piece; return a line to print.

    Raises what `page_of` raises, and ArtifactError where `out` cannot be written.
    """
    page = page_of(shard_set, pack=pack, row=row, sample=sample).encode("utf-8")
    try:
        atomic.write_bytes(out, page)
    except OSError as exc:
        raise ArtifactError(
            f"cannot write {out}: {exc.strerror}; give --html another file"
        ) from exc
    return f"{out}: {len(page):,} bytes, open it in a browser"


def page_of(
    shard_set: ShardSet,
    *,
    pack: int | None = None,
    row: str | None = None,
    sample: int | None = None,
) -> str:
    """Return the HTML that shows one pack, the sequences of a row (`SOURCE:ROW`), or `sample` packs
    over the set.

    Raises ConfigError for a pack or row that the set does not have, ArtifactError for an unreadable
    tokenizer.
    """
    shown: dict[int, set[int | None]] = {}
    for pack_id, sequence in locate_sequences(shard_set, pack=pack, row=row, sample=sample):
        shown.setdefault(pack_id, set()).add(sequence)
    return "".join(_Page(shard_set, shown).sections())


class _Page:
    """Turns packs into HTML; holds what all of its sections need."""

    def __init__(self, shard_set: ShardSet, shown: dict[int, set[int | None]]) -> None:
        self._set = shard_set
        self._html = TokenHtml(TokenText(shard_set.tokenizer_dir / "tokenizer.json"))
        names = {
            number: printable(name.encode()) for name, number in shard_set.manifest.kinds.items()
        }
        self._names = [names.get(kind, f"kind {kind}") for kind in range(256)]
        self._packs = {pack_id: list(sequences_of(shard_set, pack_id)) for pack_id in shown}
        # The map shows a whole pack; of a row, only its sequences have a card below.
        self._cards = {
            pack_id: [
                sequence for sequence in self._packs[pack_id] if only & {None, sequence.index}
            ]
            for pack_id, only in shown.items()
        }
        all_cards = [sequence for cards in self._cards.values() for sequence in cards]
        self._notes = describe_truncation(shard_set, all_cards)
        kinds = [self._names[byte & KIND_MASK] for byte in range(256)]
        self._classes = [
            (kind if kind in _COLORED else "other") + (" astride" if byte & STRADDLES else "")
            for byte, kind in enumerate(kinds)
        ]

    def sections(self) -> Iterator[str]:
        manifest, totals = self._set.manifest, self._set.manifest.totals
        name = _escape(manifest.name)
        word = "pack" if len(self._packs) == 1 else "packs"
        shown = _escape(f"{word} {', '.join(map(str, self._packs))}")
        style, script = _asset("page.css"), _asset("page.js")
        policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
        yield (
            '<!doctype html>\n<html lang="en" dir="ltr">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}; base-uri \'none\';'
            " form-action 'none'\">\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="referrer" content="no-referrer">\n'
            f"<title>{name}: {shown}</title>\n<style>{style}</style>\n</head>\n<body>\n"
            f'<header>\n<h1><bdi>{name}</bdi></h1>\n<dl class="facts">'
        )
        # Everything from a manifest is escaped: a set may come from anyone.
        facts = {
            "fingerprint": f"<code>{_escape(manifest.fingerprint)}</code>",
            "shown": f"{shown} of {totals.packs:,}",
            "density": f"{totals.density:.2%} of {manifest.max_seq_len:,} tokens a pack",
            "whole set": (
                f"{totals.sequences:,} sequences, {totals.tokens:,} tokens, {totals.loss_tokens:,}"
                " trained"
            ),
            "tokenizer": _escape(manifest.tokenizer.name),
            "template": _escape(manifest.chat_template.name),
        }
        yield from (f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
        yield "</dl>\n</header>\n"
        yield from self._legend()
        yield "<main>\n"
        for pack_id in self._packs:
            yield from self._pack(pack_id)
        yield (
            '</main>\n<div id="tip" role="status" hidden></div>\n'
            f"<script>{script}</script>\n</body>\n</html>\n"
        )

    def _legend(self) -> Iterator[str]:
        """Yield the kinds with their counts over all that is shown, the marks, and the filter."""
        cards = [sequence for cards in self._cards.values() for sequence in cards]
        kinds = np.concatenate([np.zeros(0, np.uint8), *(sequence.kinds for sequence in cards)])
        masks = [sequence.loss_mask for sequence in cards]
        mask = np.concatenate([np.zeros(0, np.uint8), *masks]) == 1
        tokens = np.bincount(kinds & KIND_MASK, minlength=256)
        trained = np.bincount(kinds[mask] & KIND_MASK, minlength=256)
        yield '<div class="bar"><div>\n<ul>\n'
        for kind in np.flatnonzero(tokens).tolist():
            share = {0: "none", tokens[kind]: "all"}.get(trained[kind], f"{trained[kind]:,}")
            classes = self._classes[kind] + (" on" if trained[kind] else "")
            name = _escape(self._names[kind].replace("_", " "))
            yield _legend_entry(classes, name, f"{tokens[kind]:,}, {share} trained")
        yield "<li><hr></li>\n"
        yield _legend_entry("other on", "trained", f"{int(mask.sum()):,}")
        yield _legend_entry("other", "not trained", f"{int((~mask).sum()):,}")
        if astride := int(((kinds & STRADDLES) != 0).sum()):
            yield _legend_entry(
                "other astride", "straddles", f"{astride:,}, also cover bytes outside their text"
            )
        yield (
            '</ul>\n<label><input type="checkbox" id="only"> only trained <kbd>t</kbd></label>\n'
            "<small><kbd>Tab</kbd> to a sequence, <kbd>\u2190</kbd> <kbd>\u2192</kbd> through its"
            " tokens</small>\n</div></div>\n"
        )

    def _pack(self, pack_id: int) -> Iterator[str]:
        """Yield the map of a pack, then a card for each of its sequences that is shown."""
        sequences, cards = self._packs[pack_id], self._cards[pack_id]
        tokens = sum(len(sequence.tokens) for sequence in sequences)
        size = self._set.manifest.max_seq_len
        trained = sum(sequence.num_loss_tokens for sequence in sequences)
        some = "" if len(cards) == len(sequences) else f" ({len(cards)} shown)"
        yield (
            f"<section>\n<h2>Pack {pack_id:,}</h2>\n<p"
            f' class="meta">{_count(len(sequences), "sequence")}{some}, {tokens:,} of {size:,}'
            f" tokens ({tokens / size:.1%} full), {trained:,} trained"
            f" ({trained / tokens:.1%})</p>\n"
        )
        yield from self._map(pack_id)
        yield '<div class="cards">\n'
        for sequence in cards:
            trained = sequence.num_loss_tokens
            yield (
                f'<article class="seq{"" if trained else " untrained"}"'
                f' id="{_anchor(pack_id, sequence)}">\n<header><h3>{sequence.index}:'
                f" <bdi>{html.escape(sequence.source)}</bdi> row {sequence.row}</h3><p"
                f' class="meta">{_counts(sequence)} ({trained / len(sequence.tokens):.1%})</p>'
            )
            note = self._notes.get((sequence.source_index, sequence.row, sequence.start))
            if note:
                yield f'<p class="note">{html.escape(note)}</p>'
            yield (
                '</header>\n<div class="text" tabindex="0" role="group" aria-label="tokens of'
                f' {_describe(sequence)}">'
            )
            codes = zip(sequence.kinds.tolist(), sequence.loss_mask.tolist(), strict=True)
            classes = [self._classes[kind] + (" on" if target else "") for kind, target in codes]
            yield from self._html.spans(sequence.tokens.tolist(), classes)
            yield "</div>\n</article>\n"
        yield "</div>\n</section>\n"

    def _map(self, pack_id: int) -> Iterator[str]:
        """Yield the pack to scale: a bar for each run of tokens of one kind and mask, and a line
        where a sequence begins."""
        # One unit of the drawing is one token, so that space left at the end shows as such.
        size, position = self._set.manifest.max_seq_len, 0
        shown = {sequence.index for sequence in self._cards[pack_id]}
        yield (
            f'<svg class="map" viewBox="0 0 {size} 10" preserveAspectRatio="none" role="group"'
            f' aria-label="map of pack {pack_id}, to scale">\n'
        )
        for sequence in self._packs[pack_id]:
            link = f' href="#{_anchor(pack_id, sequence)}"' if sequence.index in shown else ""
            yield f"<a{link}><title>{_describe(sequence)}, {_counts(sequence)}</title>"
            kinds, mask = sequence.kinds & KIND_MASK, sequence.loss_mask
            changes = (np.diff(kinds) != 0) | (np.diff(mask) != 0)
            bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(kinds)]
            for start, stop in pairwise(bounds):
                classes = self._classes[kinds[start]] + (" on" if mask[start] else "")
                yield (
                    f'<rect class="{classes}" x="{position + start}" y="0"'
                    f' width="{stop - start}" height="10"/>'
                )
            position += len(kinds)
            yield f'<path d="M{position} 0V10"/></a>\n'
        yield "</svg>\n"


def _escape(text: str) -> str:
    """Return text from a manifest as HTML: nothing invisible, nothing that is markup."""
    return html.escape(printable(text.encode("utf-8", "surrogatepass")))


def _legend_entry(classes: str, name: str, counts: str) -> str:
    return f'<li><span class="{classes} sample">{name}</span> <small>{counts}</small></li>\n'


def _anchor(pack_id: int, sequence: ShownSequence) -> str:
    return f"p{pack_id}s{sequence.index}"


def _describe(sequence: ShownSequence) -> str:
    return f"sequence {sequence.index}, {html.escape(sequence.source)} row {sequence.row}"


def _counts(sequence: ShownSequence) -> str:
    return f"{_count(len(sequence.tokens), 'token')}, {sequence.num_loss_tokens:,} trained"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _asset(name: str) -> str:
    return resources.files("prep.inspection").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return what a content security policy calls an inline style or script."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")
