"""A latency table for the terminal: the times, and the costs that a budget derives from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ffgym.costs.latency_fit import PICOSECONDS
from ffgym.costs.latency_table import LatencyTable
from ffgym.costs.timing import ends
from ffgym.report.layout import Table, counted, text_columns


def rows(table: LatencyTable) -> list[tuple[str, ...]]:
    """One row for each timed size: the median time, its spread, and the cost, which never falls with the size."""
    found: list[tuple[str, ...]] = []
    for curve in table.curves:
        name = f"{curve.shape.kind} {curve.shape.attends}".rstrip()
        costs = curve.costs / PICOSECONDS
        for size, median, low, high in zip(curve.sizes, curve.seconds, curve.low, curve.high, strict=True):
            is_reference = table.serving is not None and size == curve.sizes[-1]
            spread = "" if is_reference else f"{_milliseconds(low)} to {_milliseconds(high)}"
            cost, share = _milliseconds(float(costs[size])), f"{costs[size] / costs[-1]:.0%}"
            found.append((name, f"{size:,}", _milliseconds(median), spread, cost, share))
    return found


def layout(table: LatencyTable, place: Path) -> Table[Sequence[str]]:
    """What a console shows of a table that is kept at ``place``."""
    spread = ends(table.repetitions)
    columns = text_columns("sublayer", "units", "milliseconds", spread, "cost", "of all")
    notes = [
        f"{table.measured}; medians of {counted(table.repetitions, 'repetition')} in turn. The whole dense model takes "
        f"{_milliseconds(table.whole_seconds)} ms. Cost: the isotonic fit that a latency budget counts.",
        f"Digest {table.digest[:12]}, kept in {place}",
    ]
    if table.serving is not None:
        notes.insert(
            1, f"Times are relative to the dense model's in the same repetition, so dense sizes have no {spread}."
        )
    return Table(columns, rows(table), notes, space=1)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3f}"
