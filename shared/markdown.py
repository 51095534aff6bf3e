"""Tables of the cards of sets and models. Names in them may come from rows of strangers."""

from collections.abc import Sequence

from shared.shard_format import SourceEntry, Totals


def table_cell(text: str) -> str:
    """Return `text` escaped for one cell of a table: it makes no link, picture, tag or second
    cell."""
    # `<` could begin raw HTML; as an entity it is text in every renderer
    plain = " ".join(text.split()).replace("<", "&lt;")
    return "".join(f"\\{char}" if char in "\\|[]`" else char for char in plain)


def sources_table(sources: Sequence[SourceEntry], totals: Totals) -> str:
    """Return a table of the sources of a set, and a line for all of them."""
    lines = ["| source | revision | rows | tokens | loss tokens |", "|---|---|---:|---:|---:|"]
    for source in sources:
        where = source.revision or (
            f"sha256 {source.content_sha256[:16]}" if source.content_sha256 else ""
        )
        cells = [table_cell(source.origin), table_cell(where)]
        cells += [f"{number:,}" for number in (source.rows_used, source.tokens, source.loss_tokens)]
        lines.append(f"| {' | '.join(cells)} |")
    rows = sum(source.rows_used for source in sources)
    lines.append(f"| **all** | | {rows:,} | {totals.tokens:,} | {totals.loss_tokens:,} |")
    return "\n".join(lines) + "\n"
