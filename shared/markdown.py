"""Names in Markdown: they may come from a stranger's rows."""


def table_cell(text: str) -> str:
    """Return `text` for one cell of a table, whatever is in it: no link, picture, tag or further cell."""
    plain = " ".join(text.split()).replace("<", "&lt;")
    return "".join(f"\\{char}" if char in "\\|[]`" else char for char in plain)
