"""The Markdown pages of the repository: their code blocks, headings and links."""

import re
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "benchmarks"
README = ROOT / "README.md"
GUIDES = (README, *sorted(DOCS.glob("*.md")))
"""The pages whose commands are run, the README first: later pages use what its example made."""
PAGES = (
    *GUIDES,
    *sorted(BENCHMARKS.glob("*.md")),
    *sorted(path for path in ROOT.glob("*.md") if path != README),
    ROOT / "shared" / "FORMAT.md",
    ROOT / "data_cache" / "README.md",
    ROOT / "tests" / "second_device" / "README.md",
    *sorted((ROOT / ".github").rglob("*.md")),
)
_FENCE = re.compile(r"^```(\S*)[ \t]*(.*?)\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: the words behind the fence, and what is in it."""

    language: str
    note: str
    """What follows the language: what the block needs, or what its text is a part of."""
    text: str


def name_of(page: Path) -> str:
    """Return a page's path within the repository."""
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    """Return the text of a page."""
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path, language: str) -> list[Block]:
    """Return the fenced blocks of a page in `language`."""
    found = [Block(*match) for match in _FENCE.findall(text_of(page))]
    return [block for block in found if block.language == language]


def prose_of(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))


def links_of(page: Path) -> list[str]:
    """Return the targets of all links and pictures of a page."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "`code`", prose_of(page)))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#+ +(.*)$", prose_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        anchors.add(f"{slug}-{count}" if count else slug)
    return anchors


def sections_of(page: Path) -> list[str]:
    """Return the text of a page cut at its headings, without its fenced blocks."""
    return re.split(r"^#+ ", prose_of(page), flags=re.MULTILINE)
