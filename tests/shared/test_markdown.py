"""Names from rows of strangers make no markup in a card, and the table adds up."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.markdown import sources_table, table_cell
from shared.shard_format import SourceEntry, Totals

MARKUP = "".join(("|[]`\\<>()!*", "a\n\t\r"))


@given(st.text() | st.text(alphabet=MARKUP))
@settings(deadline=None)
def test_a_cell_ends_where_it_should_and_reads_as_the_text(text: str) -> None:
    cell = table_cell(text)
    assert len(cell.splitlines()) <= 1
    assert "<" not in cell
    # read as Markdown does: a backslash makes the next character plain
    plain = re.sub(r"\\([\\|\[\]`])", "", cell)
    assert not set(plain) & set("\\|[]`")
    unescaped = re.sub(r"\\([\\|\[\]`])", r"\1", cell).replace("&lt;", "<")
    assert unescaped == " ".join(text.split()).replace("&lt;", "<")


def source(name: str, *, hub_id: str | None, revision: str | None, rows: int) -> SourceEntry:
    return SourceEntry(
        name=name, hub_id=hub_id, revision=revision, content_sha256="ab" * 32, rows_read=rows + 5,
        rows_used=rows, rows_rejected={}, rows_unrendered={}, rows_dropped={}, rows_truncated=0,
        rows_without_terminator=0, tokens=1000 * rows, loss_tokens=500 * rows,
    )  # fmt: skip


def test_the_table_names_each_source_and_adds_up() -> None:
    sources = [
        source("chats", hub_id="user/chats", revision="abc", rows=1200),
        source("local | file", hub_id=None, revision=None, rows=7),
    ]
    totals = Totals(packs=3, sequences=1207, tokens=1207000, loss_tokens=603500, density=0.9)
    assert sources_table(sources, totals).splitlines()[2:] == [
        "| user/chats | abc | 1,200 | 1,200,000 | 600,000 |",
        "| local \\| file | sha256 abababababababab | 7 | 7,000 | 3,500 |",
        "| **all** | | 1,207 | 1,207,000 | 603,500 |",
    ]
