"""Token ids -> HTML that shows every byte and can do nothing: text escaped, whitespace and control
characters visible.

    <span class="user" title="id 9906, bytes 48 69">Hi</span>   a token and its text
    <i> </i>  <i class="n"></i>\\n  <i class="t">\\t</i>       white space, styled
    <u>\\x1b</u>                                                a character without a shape
    <u class="part">e4 bd</u>                                  bytes of a character in pieces

A character that several tokens share stands in the one that completes it, behind that token's own
bytes.
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
_INVISIBLE = frozenset(
    [
        *"\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0",
        *map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10))),
    ]
    + [chr(code) for code in range(0xE0100, 0xE01F0)]
)
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
            whole = self._whole_token(tokens[index])
            if whole is not None:
                yield f'<span class="{classes[index]}" {whole}</span>'
                index += 1
                continue
            group = self._shared_characters(tokens, index)
            for token, data, (parts_of, body) in zip(
                tokens[index:], group, _cut(group), strict=False
            ):
                yield f'<span class="{classes[index]}" {_title(token, data, parts_of)}{body}</span>'
                index += 1

    def _whole_token(self, token: int) -> str | None:
        """Return the title and text of a token that ends on character bounds, None for others."""
        if token not in self._whole:
            data = self._text.bytes_of(token)
            try:
                self._whole[token] = _title(token, data) + _text(data.decode("utf-8"))
            except UnicodeDecodeError:
                self._whole[token] = None
        return self._whole[token]

    def _shared_characters(self, tokens: Sequence[int], start: int) -> list[bytes]:
        """Return the bytes of the tokens from `start` on, up to the first that ends on a character
        bound."""
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        group = []
        for token in tokens[start:]:
            group.append(self._text.bytes_of(token))
            decoder.decode(group[-1])
            if not decoder.getstate()[0]:  # no byte waits for another
                break
        return group


def _title(token: int, data: bytes, parts_of: Sequence[str] = ()) -> str:
    """Return the title of a token and the end of its tag."""
    shared = "".join(f", part of U+{ord(character):04X}" for character in parts_of)
    return f'title="id {token}, bytes {data.hex(" ")}{shared}">'


def _text(text: str) -> str:
    mark = (
        '<i class="m"></i>' if text and unicodedata.category(text[0]).startswith("M") else ""
    )  # else on its neighbour
    return mark + "".join(map(_character, text))


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
            if at < start or to > end:
                shared.append(character)
                body += f'<u class="part">{data[max(at, start) : min(to, end)].hex(" ")}</u>'
            if to <= end:
                body += _character(character)
        yield shared, body
