"""Reads a page back with the standard library's parser: its tokens, and everything that could reach
out or run."""

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class PageToken:
    classes: list[str]
    title: str
    text: str = ""  # all of it, chips too
    chips: list[str] = field(default_factory=list)  # what stands in a <u>


class ParsedPage(HTMLParser):
    """Tokens by card, in order, and the page's other parts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cards: list[list[PageToken]] = []
        self.heads: list[str] = []  # the header of each card
        self.words: list[str] = []  # text outside tokens
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self._open: list[tuple[str, str]] = []  # tag, class
        self.feed(page)
        self.close()
        assert self._open == []

    @property
    def tokens(self) -> list[PageToken]:
        return [token for card in self.cards for token in card]

    @property
    def ids(self) -> list[str]:
        return self.values("id")

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in found.items()]
        if tag == "article":
            self.cards.append([])
            self.heads.append("")
        if tag == "span" and self._open[-1] == ("div", "text"):
            self.cards[-1].append(PageToken(found["class"].split(), found["title"]))
        if tag == "u":
            self.cards[-1][-1].chips.append("")
        if tag not in ("meta", "hr", "input"):
            self._open.append((tag, found.get("class", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if tags[-1:] and tags[-1] in self.raw:
            self.raw[tags[-1]].append(data)
        elif ("div", "text") in self._open:
            assert "span" in tags, f"{data!r} stands between tokens"
            self.cards[-1][-1].text += data
            if tags[-1] == "u":
                self.cards[-1][-1].chips[-1] += data
        else:
            self.words.append(data)
            if "article" in tags:
                self.heads[-1] += data
