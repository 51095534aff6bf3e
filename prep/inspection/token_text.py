"""Token ids -> their bytes, and bytes -> text that is safe to print.

The text has no control character and loses no byte. A character that two tokens share is whole when
their bytes are put together, and shown as \\xe4\\xbd where they are not.
"""

import json
import re
from pathlib import Path

from shared.errors import ArtifactError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """The vocabulary of a tokenizer.json, read for display."""

    def __init__(self, tokenizer_json: Path) -> None:
        """Raises ArtifactError for a file that `tokenizers` cannot read."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
        except Exception as exc:  # the Rust binding raises plain Exception
            raise ArtifactError(f"{tokenizer_json} cannot be read as a tokenizer: {exc}") from exc
        parts = json.loads(self._tokenizer.to_str())
        names = _type_names(parts["decoder"]) | _type_names(parts["pre_tokenizer"])
        # The alphabet of byte-level vocabularies: visible bytes stand for themselves, the others
        # for U+0100 and on. Empty for other vocabularies.
        self._byte_alphabet: dict[str, bytes] = {}
        if "ByteLevel" in names:
            visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
            hidden = [byte for byte in range(256) if byte not in visible]
            characters = [*visible, *range(0x100, 0x100 + len(hidden))]
            for character, byte in zip(characters, [*visible, *hidden], strict=True):
                self._byte_alphabet[chr(character)] = bytes([byte])
        self._is_word_piece = "WordPiece" in names
        self._added = {
            number: token.content
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
        }

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of one token, or a note for an id that the tokenizer does not know."""
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return f"<unknown id {token_id}>".encode()
        if self._byte_alphabet:
            return b"".join(self._byte_alphabet.get(c, c.encode("utf-8")) for c in token)
        # The rest are SentencePiece's <0x0A> and U+2581 for a space, and WordPiece's ##.
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        if self._is_word_piece:
            return (token[2:] if token.startswith("##") else f" {token}").encode("utf-8")
        return str(token).replace("\u2581", " ").encode("utf-8")

    def text_of(self, token_ids: list[int]) -> str:
        """Return the printable text of consecutive tokens."""
        return printable(b"".join(map(self.bytes_of, token_ids)))


def printable(data: bytes) -> str:
    """Return text with everything but spaces and visible characters escaped.

    It cannot send a command to a terminal.
    """
    text = data.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\u3000" else _escape(c) for c in text)


def _escape(character: str) -> str:
    if 0x80 <= ord(character) <= 0xFF:  # \\xa0 would look like a lone byte
        return f"\\u{ord(character):04x}"
    return character.encode("unicode_escape").decode("ascii")


def _type_names(part: object) -> set[str]:
    """Return every `type` in a part of a tokenizer.json, nested ones too."""
    if isinstance(part, dict):
        name = {part["type"]} if isinstance(part.get("type"), str) else set()
        return name.union(*map(_type_names, part.values()))
    return set().union(*map(_type_names, part)) if isinstance(part, list) else set()
