"""Rows of text as a table: in aligned columns for a terminal, or as Markdown."""

import re
from collections.abc import Collection, Sequence

Rows = Sequence[Sequence[str]]


def text(rows: Rows) -> str:
    """In aligned columns; the last column is not padded."""
    widths = [max(len(cell) for cell in column) for column in list(zip(*rows, strict=True))[:-1]]
    return "\n".join(
        "  ".join([cell.ljust(w) for cell, w in zip(row, widths, strict=False)] + [row[-1]])
        for row in rows
    )


def markdown(rows: Rows, words: Collection[str] = ()) -> str:
    """As Markdown: the first row is the header, and columns other than `words` hold numbers."""
    header, *body = rows
    rule = ["---" if name in words else "---:" for name in header]
    cells = [map(escape, header), rule, *(map(escape, row) for row in body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def escape(cell: str) -> str:
    """Names of rules hold characters that Markdown reads; it reads none inside a word."""
    return re.sub(r"([\\|*<`]|\b_|_\b)", r"\\\1", cell)
