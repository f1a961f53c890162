"""What all tables share: their layout on a console and in Markdown, and numbers as people and JSON read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def new_grid(*, space: int = 0) -> Table:
    """An empty ``rich`` table in ffgym's look.

    Args:
        space: columns of blanks after every cell, beside the one that stands between two cells anyway.
    """
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, padding=(0, space, 0, 0), pad_edge=False, header_style="bold")


def on_console(grids: Sequence[Table], notes: Iterable[str]) -> RenderableType:
    """Tables for a ``rich`` console, the notes dim under them."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    return Group(*grids, *(Padding(Text(note, style="dim"), (0, 1)) for note in notes))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """The lines of a Markdown table (GitHub's flavour).

    Args:
        head: the columns' names.
        rows: cells that are `escape`d already.
        left: how many columns are text and stand on the left; numbers stand on the right.
    """
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    return [_line(head), rule, *map(_line, rows)]


def markdown_notes(notes: Iterable[str]) -> list[str]:
    """The lines that stand under a Markdown table: an empty one, then a line a note."""
    return ["", "<br>\n".join(map(escape, notes)), ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape(text: str) -> str:
    """Keep Markdown from reading pipes, stars and underscores of a label or a path as its own."""
    for sign in ("\\", "|", "*", "_", "<"):
        text = text.replace(sign, "\\" + sign)
    return text


def humane(value: float, unit: str = "") -> str:
    """Write a count with four digits at most and an SI prefix: ``134.5 M``, ``23.0 kB``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999,950 would be rounded to "1000.0 k": it belongs to the next prefix already.
        if abs(value) >= factor * 0.99995:
            return f"{value / factor:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def finite(value: float | None) -> float | None:
    """``None`` for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None
