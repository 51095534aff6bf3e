"""Names in Markdown: they may come from a stranger's rows."""


def table_cell(text: str) -> str:
    """Return `text` for one cell of a table, whatever is in it."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
