"""The pages agree with the repository and with each other: size, links, anchors, numbers."""

import re
from pathlib import Path

import pytest
from docs_pages import (
    BENCHMARKS,
    DOCS,
    GUIDES,
    PAGES,
    README,
    anchors_of,
    links_of,
    name_of,
    sections_of,
    text_of,
)
from repository import ROOT

from prep.config import shipped_mixtures
from shared.shard_format import COLUMNS

MEASUREMENTS = sorted(BENCHMARKS.glob("20*.md"))
# a number that somebody measured or planned, by its unit; limits and settings have none of these
MEASURED = re.compile(
    r"(?<![\w.,])(?:(\d[\d,.]*) ?(?:tokens/s|MB/s|MiB|bytes of memory)|(\d[\d.]*)x\b"
    r"|(\d+ min \d+ s)\b|(\d[\d,]*\.\d+) (?:s\b|%|times\b|GiB\b))"
)


def cited(section: str) -> set[Path]:
    """Return the measurements that a section links to."""
    names = re.findall(r"\(\S*?benchmarks/(20[\w-]+\.md)\)", section)
    return {BENCHMARKS / name for name in names}


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= 10_240


def test_pictures_are_small() -> None:
    pictures = list((DOCS / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 200_000, picture.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in links_of(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert place.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors_of(place), target


def test_every_page_is_in_the_index() -> None:
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in links_of(DOCS / "README.md")}
    assert {page for page in GUIDES if page.parent == DOCS} - {DOCS / "README.md"} <= listed


@pytest.mark.parametrize("page", MEASUREMENTS, ids=name_of)
def test_a_measurement_says_when_where_and_how(page: Path) -> None:
    assert re.fullmatch(r"20\d\d-\d\d-[a-z0-9-]+\.md", page.name)
    text = text_of(page)
    for item in ("Date", "Machine", "Releases", "Command", "Cited by"):
        assert re.search(rf"^- \*\*{item}\*\*: \S", text, re.MULTILINE), item
    assert "\n## Result\n" in text


def test_every_measurement_is_cited_where_it_says_so_and_listed() -> None:
    citing = {page: cited(text_of(page)) for page in GUIDES}
    for measurement in MEASUREMENTS:
        (line,) = re.findall(r"^- \*\*Cited by\*\*: (.*)$", text_of(measurement), re.MULTILINE)
        named = {ROOT / name for name in line.split(", ")}
        assert named == {page for page, cites in citing.items() if measurement in cites}
        assert f"]({measurement.name})" in text_of(BENCHMARKS / "README.md")


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_measured_number_stands_in_a_measurement_that_its_section_cites(page: Path) -> None:
    first = sections_of(page)[1] if page.name == "decisions.md" else ""  # one file for all of it
    for section in sections_of(page):
        numbers = [
            "".join(found).rstrip(".,") for found in MEASURED.findall(" ".join(section.split()))
        ]
        sources = cited(section) | cited(first)
        told = " ".join(text_of(source) for source in sources)
        for number in numbers:
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", told), (
                f"{number!r} in the section {section.splitlines()[0]!r} stands in none of"
                f" {sorted(source.name for source in sources)}"
            )


def test_the_format_that_is_shown_names_every_column() -> None:
    for name in COLUMNS:
        assert f"{name}.npy" in text_of(DOCS / "inspecting.md")


def test_every_template_mixture_and_recipe_that_ships_is_named() -> None:
    templates = {path.stem for path in (ROOT / "prep/templates").glob("*.jinja")}
    for name in templates:
        assert f"`{name}`" in text_of(DOCS / "masks-and-templates.md"), name
    recipes = {path.stem.removesuffix("-released") for path in (ROOT / "train/recipes").glob("*")}
    for name in {*shipped_mixtures(), *recipes}:
        assert f"`{name}`" in text_of(DOCS / "recipes.md") or name == "demo", name
