"""The result of a run over a range of budgets: perplexity against sparsity at every point, beside the rules.

One :class:`Front`: its table and :func:`front_figure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffgym.report.figures import BLUE, REFERENCE_LOOKS, default_style, new_figure, save_figure, tidy
from ffgym.report.layout import STAR, Table, humane, text_columns
from ffgym.report.paired import paired_difference
from ffgym.report.table import Row
from ffgym.types import Allocation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIE = "\N{NO-BREAK SPACE}tie"


@dataclass(frozen=True)
class FrontPoint:
    """One target: what was found there, and the rules at the same target, all after the same refit."""

    target: float  # sparsity that was asked for
    found: Row  # the chosen allocation on the report split
    references: Mapping[str, Row]  # the rules on the report split, by label; the same labels at every point
    allocation: Allocation
    origin: str  # where the choice came from, e.g. "policy" or "episode 37"
    # its loss on the finals' windows of the search split, nats per token; None without finals
    finals_loss: float | None


@dataclass(frozen=True)
class Front:
    """The points of one policy, by rising target."""

    label: str  # what the found column is called: the agent
    points: tuple[FrontPoint, ...]  # at least two
    dense: Row
    header: str
    search_tokens: int  # tokens of all episodes
    final_tokens: int  # tokens of the finals of all points
    seconds: float  # wall time of search and finals

    def _repr_markdown_(self) -> str:
        return self.layout().markdown()

    @property
    def labels(self) -> list[str]:
        """Found first, then the rules."""
        return [self.label, *self.points[0].references]

    def row(self, point: FrontPoint, label: str) -> Row:
        """What stands at a point under a label."""
        return point.found if label == self.label else point.references[label]

    def layout(self) -> Table[Sequence[str]]:
        """Target, perplexity under every label, and the size of what was found; the lowest has a star."""
        dense = ["0% (dense)", *[self.dense.perplexity_text] * len(self.labels), humane(self.dense.parameters)]
        notes = [
            "* lowest perplexity at that sparsity; tie: the 95 % interval of the difference from it, on the same "
            "windows, holds 0. All after the same refit.",
            f"One policy for all points: {self.search_tokens:,} tokens of search, {self.final_tokens:,} of finals, "
            f"{self.seconds / 60:.1f} min.",
            self.header,
        ]
        heads = ("perplexity at", *self.labels, "params")
        return Table(text_columns(*heads, overflow="fold"), [dense, *map(self._cells, self.points)], notes)

    def _cells(self, point: FrontPoint) -> list[str]:
        rows = [self.row(point, label) for label in self.labels]
        best = min((row for row in rows if math.isfinite(row.perplexity)), key=lambda r: r.perplexity, default=None)
        perplexities = (row.perplexity_text + (_mark(row, best) if best else "") for row in rows)
        return [f"{point.target:.1%}", *perplexities, humane(point.found.parameters)]


def _mark(row: Row, best: Row) -> str:
    """A star for the lowest perplexity; a word where the windows do not tell a row from the best one."""
    if row.perplexity == best.perplexity:
        return STAR
    difference = paired_difference([row.losses], [best.losses]) if row.losses and best.losses else None
    return TIE if difference is not None and difference.is_tie else ""


def point_name(target: float) -> str:
    """What the files of a point are called: ``"0.20"``, ``"0.225"``, ``"0.266667"``."""
    return max(f"{target:.2f}", f"{target:.6f}".rstrip("0"), key=len)


@default_style()
def front_figure(front: Front, path: Path) -> Figure:
    """Draw report perplexity against sparsity, the found allocations strong, the rules beside them."""
    figure = new_figure(8.0, 5.0, f"One policy, {len(front.points)} budgets")
    axes: Any = figure.add_subplot()
    targets = [100 * point.target for point in front.points]
    for number, label in enumerate(front.labels):
        values = [front.row(point, label).perplexity for point in front.points]  # matplotlib leaves a gap at infinity
        if number == 0:
            look: dict[str, Any] = {"color": BLUE, "marker": "o", "linewidth": 2.4, "zorder": 4}
        else:
            look = {**REFERENCE_LOOKS[(number - 1) % len(REFERENCE_LOOKS)], "linewidth": 1.2, "markersize": 4.5}
        axes.plot(targets, values, label=label, **look)
    if math.isfinite(front.dense.perplexity):
        axes.axhline(front.dense.perplexity, color="0.5", linewidth=1, linestyle=":")
        axes.annotate(
            f"dense {front.dense.perplexity:.1f}",
            (1.0, front.dense.perplexity),  # at the left end the curves are near this line
            xycoords=("axes fraction", "data"),
            fontsize=8,
            ha="right",
            va="bottom",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axes.get_ylim()
    labelled = "235" if high > 4 * low else "123456789"  # first digits; a short axis has few ticks, near each other
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in labelled else "")
    axes.set_xlabel(f"share of the prunable {front.points[0].allocation.resource} removed (%)")
    axes.set_ylabel("report perplexity (log scale)")
    axes.legend(frameon=False, fontsize=9)
    tidy(axes)
    return save_figure(figure, path)
