"""A latency table for the terminal: what was timed, and what the budget makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffgym.costs.latency_fit import PICOSECONDS
from ffgym.costs.latency_table import LatencyTable
from ffgym.report.layout import new_grid, on_console

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = ("sublayer", "units", "milliseconds", "quartiles", "cost", "of all")


def rows(table: LatencyTable) -> list[tuple[str, ...]]:
    """One row for each timed size: the median time, its quartiles, and the cost, which never falls with the size."""
    found: list[tuple[str, ...]] = []
    for curve in table.curves:
        name = f"{curve.shape.kind} {curve.shape.attends}".rstrip()
        costs = curve.costs / PICOSECONDS
        for size, median, low, high in zip(curve.sizes, curve.seconds, curve.low, curve.high, strict=True):
            quartiles = f"{_milliseconds(low)} to {_milliseconds(high)}"
            cost, share = _milliseconds(float(costs[size])), f"{costs[size] / costs[-1]:.0%}"
            found.append((name, f"{size:,}", _milliseconds(median), quartiles, cost, share))
    return found


def terminal(table: LatencyTable, place: Path) -> RenderableType:
    """Lay the table out for a ``rich`` console.

    Args:
        table: what is shown.
        place: where it is kept.
    """
    from rich.text import Text

    grid = new_grid(space=1)
    for index, column in enumerate(COLUMNS):
        grid.add_column(column, justify="right" if index else "left")
    for row in rows(table):
        grid.add_row(*(Text(cell) for cell in row))
    notes = [
        f"{table.measured}; medians of {table.repetitions} repetitions in turn. The whole dense model takes "
        f"{_milliseconds(table.whole_seconds)} ms. Cost: the isotonic fit that a latency budget counts.",
        f"Digest {table.digest[:12]}, kept in {place}",
    ]
    return on_console([grid], notes)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3f}"
