"""What a bench shows: one row per agent, quality and cost with their spread, and quality against tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ffgym.report.figures import new_figure, save_figure, tidy
from ffgym.types import JSONDict


class _Stored(BaseModel):
    """What result files hold; JSON has no infinity and no NaN, so they are strings there."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Mark(_Stored):
    """An incumbent: tokens spent when it was noted, and its loss on the report split (nats per token)."""

    tokens: int
    loss: float


class Final(_Stored):
    """The chosen allocation: units kept per sublayer, report loss (nats per token), sparsity reached, origin."""

    kept: list[int]
    loss: float
    sparsity: float
    origin: str

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where it overflows."""
        return math.inf if self.loss > 700 else math.exp(self.loss)


class CellResult(_Stored):
    """One agent with one seed: what a committed result file holds; ``settings`` is all that decided its numbers."""

    label: str
    agent: str
    seed: int
    settings: JSONDict
    target: float
    dense_loss: float
    report_tokens: int
    search_tokens: int
    final_tokens: int
    episodes: int
    seconds: float
    threads: int
    dtype: str
    marks: list[Mark]
    final: Final


@dataclass(frozen=True)
class BenchRow:
    """One agent over its seeds.

    Attributes:
        label: the agent, heuristic or variant.
        perplexity: mean over seeds, report split.
        stderr: standard error of that mean; ``None`` for a single seed.
        seeds: how many.
        tokens: mean tokens of search and finals.
        seconds: mean wall time of search and finals.
        tokens_to_baseline: tokens until the mean incumbent was as good as the baseline's final quality (interpolated
            between marks, in log tokens); ``None`` where it never was.
    """

    label: str
    perplexity: float
    stderr: float | None
    seeds: int
    tokens: float
    seconds: float
    tokens_to_baseline: float | None


@dataclass(frozen=True)
class BenchTable:
    """Rows, best first, and how they were measured."""

    title: str
    rows: tuple[BenchRow, ...]
    header: str
    baseline: str


def bench_table(title: str, results: Sequence[CellResult], *, baseline: str) -> BenchTable:
    """Summarise cells by label.

    Args:
        title: of the bench.
        results: at least one cell.
        baseline: label whose final quality the tokens are counted to.
    """
    groups: dict[str, list[CellResult]] = defaultdict(list)
    for result in results:
        groups[result.label].append(result)
    goal = np.mean([cell.final.loss for cell in groups[baseline]]) if groups.get(baseline) else None
    rows = []
    for label, cells in groups.items():
        perplexities = np.array([cell.final.perplexity for cell in cells])
        has_spread = len(cells) > 1 and bool(np.isfinite(perplexities).all())
        rows.append(
            BenchRow(
                label=label,
                perplexity=float(perplexities.mean()),
                stderr=float(perplexities.std(ddof=1) / math.sqrt(len(cells))) if has_spread else None,
                seeds=len(cells),
                tokens=float(np.mean([cell.search_tokens + cell.final_tokens for cell in cells])),
                seconds=float(np.mean([cell.seconds for cell in cells])),
                tokens_to_baseline=None if goal is None else tokens_until(cells, float(goal)),
            )
        )
    first = results[0]
    header = (
        f"Report split, {first.report_tokens:,} tokens, {first.dtype}, after the same ridge; dense perplexity "
        f"{math.exp(first.dense_loss):.2f}; target sparsity {first.target:.0%}; mean and standard error over seeds."
    )
    return BenchTable(title, tuple(sorted(rows, key=lambda row: row.perplexity)), header, baseline)


def tokens_until(cells: Sequence[CellResult], goal: float) -> float | None:
    """Tokens until the mean incumbent's report loss first came down to ``goal``; ``None`` where it never did."""
    count = min(len(cell.marks) for cell in cells)
    tokens = [float(np.mean([cell.marks[i].tokens for cell in cells])) for i in range(count)]
    losses = [float(np.mean([cell.marks[i].loss for cell in cells])) for i in range(count)]
    for i, loss in enumerate(losses):
        if loss <= goal:
            if i == 0 or not math.isfinite(losses[i - 1]):
                return tokens[i]
            share = (losses[i - 1] - goal) / (losses[i - 1] - loss)
            return math.exp(math.log(tokens[i - 1]) + share * (math.log(tokens[i]) - math.log(tokens[i - 1])))
    return None


def markdown(table: BenchTable) -> str:
    """The table as Markdown."""
    lines = [
        f"# {table.title}",
        "",
        table.header,
        "",
        f"| agent | perplexity | seeds | tokens | seconds | tokens to {table.baseline}'s final quality |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in table.rows:
        spread = "" if row.stderr is None else f" ± {row.stderr:.2f}"
        reached = "—" if row.tokens_to_baseline is None else f"{row.tokens_to_baseline:,.0f}"
        lines.append(
            f"| {row.label} | {row.perplexity:.2f}{spread} | {row.seeds} | {row.tokens:,.0f} | {row.seconds:.0f} "
            f"| {reached} |"
        )
    return "\n".join(lines) + "\n"


def bench_figure(table: BenchTable, results: Sequence[CellResult], path: Path) -> None:
    """Report perplexity of the incumbent against search tokens, mean and range over seeds; heuristics as lines.

    Args:
        table: gives title and order.
        results: the cells.
        path: PNG to write.
    """
    figure = new_figure(9.0, 5.0)
    axes: Any = figure.add_subplot()
    rules: list[BenchRow] = []
    for row in table.rows:
        cells = [cell for cell in results if cell.label == row.label]
        count = min(len(cell.marks) for cell in cells)
        if count < 2:
            rules += [row] if math.isfinite(row.perplexity) else []
            continue
        tokens = np.array([np.mean([cell.marks[i].tokens for cell in cells]) for i in range(count)])
        losses = np.array([[cell.marks[i].loss for i in range(count)] for cell in cells])
        values = np.exp(np.where(losses < 700, losses, np.nan))  # what broke down leaves a gap
        if not np.isfinite(values.mean(axis=0)).any():
            continue
        (line,) = axes.plot(tokens, values.mean(axis=0), marker="o", markersize=4, label=row.label)
        axes.fill_between(tokens, values.min(axis=0), values.max(axis=0), alpha=0.15, color=line.get_color())
    _draw_rules(axes, rules)
    axes.set_xscale("log")
    axes.set_xlabel("search tokens evaluated")
    axes.set_ylabel("report perplexity of the incumbent")
    axes.set_title(f"{table.title}: quality against search cost", loc="left")
    tidy(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _draw_rules(axes: Any, rules: Sequence[BenchRow]) -> None:
    """One-shot rules as lines; those far above every search are named instead, or they would flatten the curves."""
    top = 1.25 * axes.get_ylim()[1] if axes.lines else math.inf
    for index, row in enumerate(rule for rule in rules if rule.perplexity <= top):
        axes.axhline(row.perplexity, linestyle=":", linewidth=1, color="0.5")
        side = "top" if index % 2 == 0 else "bottom"  # neighbours would cover each other
        place = (1.0, row.perplexity)
        axes.annotate(row.label, place, xycoords=("axes fraction", "data"), fontsize=7, va=side)
    beyond = [f"{rule.label} {rule.perplexity:.2f}" for rule in rules if rule.perplexity > top]
    if beyond:
        axes.text(0.0, 1.0, f"above the scale: {', '.join(beyond)}", transform=axes.transAxes, fontsize=7, va="top")
