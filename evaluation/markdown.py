"""Names and figures in Markdown files, where whatever they hold is shown and not taken for markup."""

from __future__ import annotations

from collections.abc import Iterable


def escaped(text: str) -> str:
    """On one line, and with no HTML in it, which viewers of Markdown would take for their page's own."""
    return " ".join(text.splitlines()).replace("&", "&amp;").replace("<", "&lt;")


def table_row(cells: Iterable[str]) -> str:
    """A row of a pipe table, with cells as they stand."""
    return "| " + " | ".join(escaped(cell).replace("|", "\\|") for cell in cells) + " |"
