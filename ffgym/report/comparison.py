"""Several runs side by side: one table, and a picture of their paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffgym.report.figures import BLACK, BLUE, default_style, new_figure, save_figure, tidy
from ffgym.report.layout import Column, Table, humane, percent
from ffgym.report.paired import MARGIN, SIGN, Difference, difference_columns, paired_difference
from ffgym.report.table import ReportTable, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAR = 5.0  # times as far from the reference as most rows that differ from it


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison."""

    name: str
    agent: str
    criterion: str
    resource: str
    table: ReportTable
    changes: str  # where its configuration is another than the reference's; empty where it is not
    target: float | None = None  # of the point that stands for a run over a range of budgets; None for another run

    @property
    def result(self) -> Row:
        """The row of the run's result."""
        return self.table.result


@dataclass(frozen=True)
class Comparison:
    """Runs that were measured on the same windows; the first one is what the others are compared with."""

    runs: tuple[ComparedRun, ...]

    @property
    def reference(self) -> ComparedRun:
        """The first run."""
        return self.runs[0]

    def difference(self, run: ComparedRun) -> Difference | None:
        """A run against the reference; ``None`` for itself, and where a loss is not finite."""
        return None if run is self.reference else paired_difference([run.result.losses], [self.reference.result.losses])

    def layout(self) -> Table[ComparedRun]:
        """What stands where."""
        columns: list[Column[ComparedRun]] = [
            Column("run", lambda run: run.name, left=True, plain=lambda run: {"run": run.name}),
            Column(
                "perplexity",
                lambda run: run.result.perplexity_text,
                plain=lambda run: {"perplexity": run.result.perplexity, "loss_stderr": run.result.loss_stderr},
            ),
            Column("x dense", _times_dense, plain=lambda run: {"ratio_to_dense": run.table.times_dense(run.result)}),
            *difference_columns(
                self.runs,
                self.reference.name,
                self.difference,
                lambda run: "reference" if run is self.reference else "—",
            ),
            _spare("params", lambda run: run.result.parameters, humane),
            _spare("sparsity", lambda run: run.result.sparsity_prunable, "{:.1%}".format),
            _spare("agent", lambda run: run.agent, str, left=True),
            _spare("criterion", lambda run: run.criterion, str, left=True),
            _spare("resource", lambda run: run.resource, str, left=True),
        ]
        return Table(columns, self.runs, self._notes())

    def _notes(self) -> list[str]:
        name = self.reference.name
        notes = [
            f"{run.name} has a range of budgets: its point at {percent(run.target)} stands here."
            for run in self.runs
            if run.target is not None
        ]
        notes += [f"{run.name} differs from {name}: {run.changes}." for run in self.runs if run.changes]
        if any(self.difference(run) for run in self.runs):
            notes.append(
                f"Nats per token against {name}, on the same {len(self.reference.result.losses)} windows, "
                f"{MARGIN}; {SIGN}"
            )
        return [*notes, *(f"{run.name}: {run.table.warning}" for run in self.runs if run.table.warning)]


def _spare(
    head: str, value: Callable[[ComparedRun], Any], text: Callable[[Any], str], *, left: bool = False
) -> Column[ComparedRun]:
    return Column(head, lambda run: text(value(run)), left, plain=lambda run: {head: value(run)}, spare=True)


def _times_dense(run: ComparedRun) -> str:
    ratio = run.table.times_dense(run.result)
    return "—" if ratio is None else f"{ratio:,.2f}"


@default_style()
def differences_figure(differences: Sequence[tuple[str, Difference]], reference: str, path: Path) -> Figure:
    """Draw a forest plot: every difference from a reference with its 95 % interval; ties are hollow.

    One that is far larger than most would leave these no room: it becomes an arrow at the edge.
    """
    every = [found for _, found in differences]
    # Ties and copies lie at 0: where most rows are such, all that differs would be called far.
    differing = [found for found in every if round(found.mean, 3)]
    differing = [found for found in differing if not found.is_tie] or differing
    limit = FAR * float(np.median([_reach(found) for found in differing])) if differing else math.inf
    edge = 1.2 * max(_reach(found) for found in every if abs(found.mean) <= limit)
    figure = new_figure(9.0, 1.7 + 0.38 * len(differences), f"Difference from {reference}")
    axes: Any = figure.add_subplot()
    axes.axvline(0, color=BLACK, linewidth=1)
    for place, (_, found) in enumerate(differences):
        look: dict[str, Any] = {"color": BLUE, "markerfacecolor": "white" if found.is_tie else BLUE}
        if abs(found.mean) > limit:
            arrow = ">" if found.mean > 0 else "<"
            axes.plot(math.copysign(edge, found.mean), place, arrow, markersize=10, **look)
        else:
            width = found.margin if math.isfinite(found.margin) else 0.0
            axes.errorbar(found.mean, place, xerr=width, fmt="o", markersize=8, capsize=4, linewidth=1.8, **look)
        axes.annotate(str(found), (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(differences)), [label for label, _ in differences])
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.margins(x=0.08)
    far = "; arrow: off scale" * any(abs(found.mean) > limit for found in every)
    axes.set_xlabel(f"nats per token on the same windows, 95 % intervals (left of 0: better; hollow: a tie{far})")
    tidy(axes, grid="x")
    return save_figure(figure, path)


def _reach(found: Difference) -> float:
    """The farther end of its interval."""
    return abs(found.mean) + (found.margin if math.isfinite(found.margin) else 0.0)
