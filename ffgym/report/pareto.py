"""The Pareto set of a run, as data and as a picture: what the scalar winner was traded against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffgym.report.figures import BLUE, ORANGE, default_style, new_figure, save_figure, tidy
from ffgym.types import Allocation, JSONDict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#888888"
DENSE = "#222222"


@dataclass(frozen=True)
class ParetoPoint:
    """One allocation that was measured on the finals' windows and examples.

    Attributes:
        allocation: units kept, and what that costs.
        origin: ``"episode 37"`` or ``"policy"``.
        loss: nats per token.
        reward: the weighted sum that chose the winner.
        objectives: by name, higher = better.
        dominated: another one is at least as good in every objective and better in one.
    """

    allocation: Allocation
    origin: str
    loss: float
    reward: float
    objectives: Mapping[str, float]
    dominated: bool
    chosen: bool


def pareto_json(points: Sequence[ParetoPoint], dense: Mapping[str, float], *, tokens: int, examples: int) -> JSONDict:
    """What ``pareto.json`` holds.

    Args:
        points: best reward first.
        tokens: text tokens that each was measured on.
        examples: task examples that each was measured on.
    """
    return {
        "objectives": list(dense),
        "measured_on": {"tokens": tokens, "examples": examples},
        "dense": dict(dense),
        "pareto_set": [{"number": n, **_row(p)} for n, p in enumerate(_winners(points), start=1)],
        "dominated": [_row(point) for point in points if point.dominated],
    }


def _winners(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    return [point for point in points if not point.dominated]


def _row(point: ParetoPoint) -> JSONDict:
    return {
        "origin": point.origin,
        "chosen": point.chosen,
        "reward": point.reward,
        "objectives": dict(point.objectives),
        "loss": point.loss,
        "resource": point.allocation.resource,
        "sparsity": point.allocation.sparsity,
        "kept": list(point.allocation.kept),
    }


@default_style()
def pareto_figure(points: Sequence[ParetoPoint], dense: Mapping[str, float], path: Path, note: str) -> Figure:
    """Draw every pair of objectives: the Pareto set numbered as in ``pareto.json``, what it dominates, the dense model.

    Args:
        points: best reward first; at least one not dominated.
    """
    pairs = list(combinations(dense, 2))
    figure = new_figure(width=max(6.5, 4.4 * len(pairs)), height=4.4)
    for axes, (across, up) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        _draw_pair(axes, points, dense, across, up)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    lines = [f"Pareto set: {len(_winners(points))} of {len(points)} allocations"]
    chosen = next((point for point in points if point.chosen), None)
    if chosen is not None:
        lines.append(f"chosen: {_values(chosen.objectives)}")
    lines += [f"dense: {_values(dense)}", note]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, fontweight="bold")
    return save_figure(figure, path)


def _draw_pair(axes: Axes, points: Sequence[ParetoPoint], dense: Mapping[str, float], across: str, up: str) -> None:
    from matplotlib.ticker import MaxNLocator

    def mark(wanted: Sequence[ParetoPoint], label: str, **look: Any) -> None:
        axes.scatter([p.objectives[across] for p in wanted], [p.objectives[up] for p in wanted], label=label, **look)

    winners = _winners(points)
    mark([p for p in points if p.dominated], "dominated", s=26, facecolors="none", edgecolors=GREY)
    mark(winners, "Pareto set", s=42, color=BLUE)
    mark([p for p in points if p.chosen], "chosen", s=130, facecolors="none", edgecolors=ORANGE, linewidths=2)
    # The allocations alone set the limits: the dense model may lie so far off that it would squeeze them together.
    axes.margins(0.12)
    axes.autoscale_view()
    axes.set_autoscale_on(False)
    axes.axvline(dense[across], color=DENSE, linewidth=1, linestyle=":", label="dense, where in view")
    axes.axhline(dense[up], color=DENSE, linewidth=1, linestyle=":")
    for number, point in enumerate(winners, start=1):
        axes.annotate(
            str(number),
            (point.objectives[across], point.objectives[up]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.xaxis.set_major_locator(MaxNLocator(4))  # labels such as 0.2125 would run into each other
    axes.set_xlabel(f"{_words(across)} (more is better)")
    axes.set_ylabel(f"{_words(up)} (more is better)")
    tidy(axes)


def _values(objectives: Mapping[str, float]) -> str:
    return ", ".join(f"{_words(name)} {value:.3f}" for name, value in objectives.items())


def _words(name: str) -> str:
    return name.replace("_", " ")
