"""Token ids -> HTML that shows every byte and can do nothing.

Text is escaped; white space and control characters are visible.

    <span class="user" title="id 9906, bytes 48 69">Hi</span>   a token and its text
    <i> </i>  <i class="n"></i>\\n  <i class="t">\\t</i>       white space, styled
    <u>\\x1b</u>                                                a character without a shape
    <u class="part">e4 bd</u>                                  bytes of a character in pieces

A character that several tokens share stands in the one that completes it, behind the bytes of that
token.
"""

import codecs
import html
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate

from prep.inspection.token_text import TokenText, printable

# printable to Python, invisible on a screen: fillers, joiners, and the variation selectors, in
# which text can hide
_SELECTORS = (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {
    chr(code) for code in _SELECTORS
}
_SPACES = {
    " ": "<i> </i>",
    "\u3000": "<i>\u3000</i>",
    "\n": '<i class="n"></i>\n',
    "\t": '<i class="t">\t</i>',
}


class TokenHtml:
    """Writes tokens as spans; remembers each id that is whole by itself."""

    def __init__(self, text: TokenText) -> None:
        self._text = text
        self._whole: dict[int, str | None] = {}

    def spans(self, tokens: Sequence[int], classes: Sequence[str]) -> Iterator[str]:
        """Yield one span for each token of a sequence. `classes` are trusted, tokens are not."""
        index = 0
        while index < len(tokens):
            token = tokens[index]
            if token not in self._whole:
                data = self._text.bytes_of(token)
                try:
                    self._whole[token] = _title(token, data) + _text(data.decode("utf-8"))
                except UnicodeDecodeError:
                    self._whole[token] = None  # it begins or ends inside of a character
            whole = self._whole[token]
            if whole is not None:
                yield f'<span class="{classes[index]}" {whole}</span>'
                index += 1
                continue
            # A group of tokens that share characters: up to the first that leaves no byte waiting.
            decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
            group: list[bytes] = []
            while index + len(group) < len(tokens) and (not group or decoder.getstate()[0]):
                group.append(self._text.bytes_of(tokens[index + len(group)]))
                decoder.decode(group[-1])
            for data, (shared, body) in zip(group, _cut(group), strict=True):
                title = _title(tokens[index], data, shared)
                yield f'<span class="{classes[index]}" {title}{body}</span>'
                index += 1


def _title(token: int, data: bytes, shared: Sequence[str] = ()) -> str:
    """Return the title of a token and the end of its tag."""
    parts = "".join(f", part of U+{ord(character):04X}" for character in shared)
    return f'title="id {token}, bytes {data.hex(" ")}{parts}">'


def _text(text: str) -> str:
    # A combining mark gets a place to sit on, or it would sit on the token before.
    is_mark = text and unicodedata.category(text[0]).startswith("M")
    return '<i class="m"></i>' * bool(is_mark) + "".join(map(_character, text))


@cache
def _character(character: str) -> str:
    """Return the HTML of one character, or of a byte that belongs to none (as surrogateescape has
    it)."""
    if character in _SPACES:
        return _SPACES[character]
    if "\udc80" <= character <= "\udcff":
        return f"<u>\\x{ord(character) - 0xDC00:02x}</u>"
    if character in _INVISIBLE:
        return f"<u>{character.encode('unicode_escape').decode('ascii')}</u>"
    shown = printable(character.encode("utf-8"))
    return html.escape(shown) if shown == character else f"<u>{shown}</u>"


def _cut(group: list[bytes]) -> Iterator[tuple[list[str], str]]:
    """Yield for each token the characters that it shares with others, and its HTML."""
    # Bytes that are no UTF-8 decode to one surrogate each, so every byte belongs to a character.
    data = b"".join(group)
    characters = data.decode("utf-8", "surrogateescape")
    starts = [
        0,
        *accumulate(len(character.encode("utf-8", "surrogateescape")) for character in characters),
    ]
    end = 0
    for part in group:
        start, end = end, end + len(part)
        shared, body = [], ""
        first = bisect_right(starts, start) - 1
        for character, at, to in zip(
            characters[first:], starts[first:], starts[first + 1 :], strict=False
        ):
            if at >= end:
                break
            # Bytes of a shared character stand in each of its tokens, itself only in the last.
            if at < start or to > end:
                shared.append(character)
                body += f'<u class="part">{data[max(at, start) : min(to, end)].hex(" ")}</u>'
            if to <= end:
                body += _character(character)
        yield shared, body
