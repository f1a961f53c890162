"""What a bench shows: one row per agent, quality and cost with their spread, and quality against tokens."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ffgym.config.mixture import described
from ffgym.files import Count
from ffgym.report.figures import SERIES, default_style, new_figure, save_figure, tidy
from ffgym.report.layout import Column, Table, counted, numeric, percent
from ffgym.report.paired import MARGIN, SIGN, Difference, difference_columns, paired_difference, standard_error
from ffgym.types import JSONDict, perplexity_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 6  # of searches in a picture; more could not be told apart


class _Stored(BaseModel):
    """What result files hold; JSON has no infinity and no NaN, so they are strings there."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Mark(_Stored):
    """An incumbent: tokens spent when it was noted, and its loss on the report split (nats per token)."""

    tokens: Count
    loss: float


class Final(_Stored):
    """The chosen allocation: units kept per sublayer, report loss (nats per token), sparsity reached, origin.

    ``losses`` are those of the windows that ``loss`` is the mean of; empty in results of earlier versions.
    ``plain_loss`` is the report loss without any refit; ``None`` where it was not asked for.
    """

    kept: list[Count]
    loss: float
    sparsity: float
    origin: str
    losses: list[float] = []
    plain_loss: float | None = None


class CellResult(_Stored):
    """One agent with one seed: what a committed result file holds.

    Beside ``settings``, its numbers were decided by the policy that it started from, where there was one, and by the
    times that its budget or its reward counts: ``policy`` and ``latency`` are the digests of those files. ``editions``
    are those of its plugins, by table, where they are not the first. ``asked_marks`` is how many token marks were asked
    for; where few updates pass many, fewer came.
    """

    label: str
    agent: str
    seed: int
    settings: JSONDict
    target: float
    dense_loss: float
    report_tokens: Count
    search_tokens: Count
    final_tokens: Count
    episodes: Count
    seconds: float
    threads: Count
    dtype: str
    policy: str | None = None
    latency: str | None = None
    editions: dict[str, int] = {}
    asked_marks: Count
    marks: list[Mark]
    final: Final


@dataclass(frozen=True)
class Mean:
    """Mean over seeds and its standard error; ``None`` for a single seed, or where one of them is not finite."""

    value: float
    stderr: float | None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.stderr is None else f" ± {self.stderr:.2f}")


def mean_of(values: Sequence[float]) -> Mean:
    """Mean of at least one value."""
    return Mean(float(np.mean(values)), standard_error(values) if np.isfinite(values).all() else None)


@dataclass(frozen=True)
class BenchRow:
    """One agent over its seeds."""

    label: str
    perplexity: Mean  # over seeds, report split
    times_dense: float  # the same as a multiple of the dense model's
    # from the best heuristic on the same windows; None for itself, and where windows were not kept
    difference: Difference | None
    plain: Mean | None  # the same without any refit; None where no seed has it
    seeds: int
    dtypes: str
    tokens: float  # mean tokens of search and finals
    seconds: float  # mean wall time of search and finals
    differences: Mapping[str, Difference | None]  # by baseline, from that search on the same windows, as difference
    # by baseline, tokens until the mean incumbent was as good as that one's final quality (interpolated between marks,
    # in log tokens); None where it never was
    tokens_to: Mapping[str, float | None]
    first_mark: float  # tokens of the first mark: what was reached by then may have taken fewer


@dataclass(frozen=True)
class BenchTable:
    """Rows, best first, and how they were measured."""

    title: str
    rows: tuple[BenchRow, ...]
    header: str
    baselines: tuple[str, ...]  # labels that every row is compared with, as far as they have results
    heuristic: str | None  # label of the best one, where there is one
    ties: tuple[str, ...]  # labels of the rows that tie with the first one on the same windows
    files: tuple[str, ...] = ()  # where the table and its picture were written

    def layout(self) -> Table[BenchRow]:
        """What stands where."""
        refit: Column[BenchRow] = numeric(
            "without any refit",
            lambda row: str(row.plain or "—"),
            lambda row: {"perplexity_without_refit": row.plain and row.plain.value},
        )
        columns: list[Column[BenchRow]] = [
            Column("agent", lambda row: row.label, left=True, plain=lambda row: {"label": row.label}),
            numeric(
                "perplexity",
                lambda row: str(row.perplexity),
                lambda row: {"perplexity": row.perplexity.value, "perplexity_stderr": row.perplexity.stderr},
            ),
            numeric("x dense", lambda row: f"{row.times_dense:.2f}", lambda row: {"ratio_to_dense": row.times_dense}),
            *difference_columns(
                self.rows,
                "best heuristic",
                lambda row: row.difference,
                lambda row: "best heuristic" if row.label == self.heuristic else "—",
            ),
            *([refit] if any(row.plain for row in self.rows) else []),
            numeric("seeds", lambda row: str(row.seeds), lambda row: {"seeds": row.seeds}, spare=True),
            Column("dtype", lambda row: row.dtypes, left=True, plain=lambda row: {"dtype": row.dtypes}, spare=True),
            numeric("tokens", lambda row: f"{row.tokens:,.0f}", lambda row: {"tokens": row.tokens}, spare=True),
            numeric("seconds", lambda row: f"{row.seconds:.0f}", lambda row: {"seconds": row.seconds}, spare=True),
            *chain.from_iterable(map(self._differences_from, self.baselines)),
            *map(_tokens_to, self.baselines),
        ]
        return Table(columns, self.rows)

    def _differences_from(self, baseline: str) -> list[Column[BenchRow]]:
        found, suffix = lambda row: row.differences[baseline], f"_from_{baseline}"
        return difference_columns(self.rows, baseline, found, suffix=suffix, spare=True)


def _tokens_to(baseline: str) -> Column[BenchRow]:
    def cell(row: BenchRow) -> str:
        tokens = row.tokens_to[baseline]
        return "—" if tokens is None else f"{'≤ ' if tokens <= row.first_mark else ''}{tokens:,.0f}"

    return numeric(
        f"tokens to {baseline}'s final quality",
        cell,
        lambda row: {f"tokens_to_{baseline}": row.tokens_to[baseline]},
        spare=True,
    )


def bench_table(title: str, results: Sequence[CellResult], *, baselines: Sequence[str]) -> BenchTable:
    """Summarise cells by label; baselines without results are left out."""
    groups: dict[str, list[CellResult]] = defaultdict(list)
    for result in results:
        groups[result.label].append(result)
    goals = {
        label: float(np.mean([cell.final.loss for cell in groups[label]])) for label in baselines if label in groups
    }
    rules = [cell for cell in results if cell.agent == "one-shot" and math.isfinite(cell.final.loss)]
    rule = min(rules, key=lambda cell: cell.final.loss, default=None)
    rows = []
    for label, cells in groups.items():
        plain = [perplexity_of(cell.final.plain_loss) for cell in cells if cell.final.plain_loss is not None]
        perplexities = [perplexity_of(cell.final.loss) for cell in cells]
        ratios = [value / perplexity_of(cell.dense_loss) for value, cell in zip(perplexities, cells, strict=True)]
        rows.append(
            BenchRow(
                label=label,
                perplexity=mean_of(perplexities),
                times_dense=float(np.mean(ratios)),
                difference=None if rule is None else _difference(cells, [rule]),
                plain=mean_of(plain) if plain else None,
                seeds=len(cells),
                dtypes=_dtypes(cells),
                tokens=float(np.mean([cell.search_tokens + cell.final_tokens for cell in cells])),
                seconds=float(np.mean([cell.seconds for cell in cells])),
                differences={baseline: _difference(cells, groups[baseline]) for baseline in goals},
                tokens_to={baseline: tokens_until(cells, goal) for baseline, goal in goals.items()},
                first_mark=float(curves(cells)[0][0]),
            )
        )
    rows.sort(key=lambda row: (math.isnan(row.perplexity.value), row.perplexity.value))
    header = _header(results, rows)
    best, *others = (groups[row.label] for row in rows)
    ties = tuple(cells[0].label for cells in others if (found := _difference(cells, best)) and found.is_tie)
    return BenchTable(title, tuple(rows), header, tuple(goals), None if rule is None else rule.label, ties)


def _header(results: Sequence[CellResult], rows: Sequence[BenchRow]) -> str:
    """How the numbers were measured."""
    targets = " and ".join(map(percent, sorted({result.target for result in results})))
    # prune.calibration = "none" is for rewards only: the report is measured after ridge then too
    affine = {result.settings.get("prune", {}).get("calibration") == "affine" for result in results}
    refit = "ridge or affine" if len(affine) > 1 else "the same affine refit" if True in affine else "the same ridge"
    first, data = results[0], results[0].settings["data"]
    repeated = any(row.seeds > 1 for row in rows)
    searches = {result.label for result in results if result.agent != "one-shot"}
    dense = [f"{perplexity_of(ends([result.dense_loss for result in results])):.2f}" for ends in (min, max)]
    said = (
        f"Report split of {described(data['report'])}, {first.report_tokens:,} tokens in windows of "
        f"{data['window']:,}, {_dtypes(results)}, after {refit}; dense perplexity {' to '.join(dict.fromkeys(dense))}; "
        f"target sparsity {targets}{'; mean and standard error over seeds' * repeated}."
    )
    if any(row.difference or any(row.differences.values()) for row in rows):
        said += (
            f" Nats per token are differences on the same windows, {MARGIN}"
            f"{', which both windows and seeds widen' * repeated}; {SIGN}"
        )
        if any(row.seeds == 1 and row.label in searches for row in rows):
            said += (
                " Where a search has one seed, its interval is of the windows only: what another seed would find is "
                "not in it."
            )
    return said


def _difference(cells: Sequence[CellResult], others: Sequence[CellResult]) -> Difference | None:
    """Cells against others; ``None`` for the same ones, and where not all kept the losses of as many windows."""
    losses, reference = ([cell.final.losses for cell in each] for each in (cells, others))
    if cells[0].label == others[0].label or not losses[0] or len({len(each) for each in losses + reference}) > 1:
        return None
    return paired_difference(losses, reference)


def _dtypes(cells: Sequence[CellResult]) -> str:
    return " and ".join(dict.fromkeys(cell.dtype for cell in cells))


def tokens_until(cells: Sequence[CellResult], goal: float) -> float | None:
    """Tokens until the mean incumbent's report loss first came down to ``goal``; ``None`` where it never did."""
    tokens, by_cell = curves(cells)
    losses = by_cell.mean(axis=0)
    for i, loss in enumerate(losses):
        if loss <= goal:
            if i == 0 or not math.isfinite(losses[i - 1]):
                return float(tokens[i])
            share = (losses[i - 1] - goal) / (losses[i - 1] - loss)
            return math.exp(math.log(tokens[i - 1]) + share * (math.log(tokens[i]) - math.log(tokens[i - 1])))
    return None


def curves(cells: Sequence[CellResult]) -> tuple[np.ndarray, np.ndarray]:
    """Report loss of the incumbents over tokens, between marks linear in log tokens.

    Seeds may have noted their incumbents at other tokens, or at fewer: all are read at the marks of any, from where the
    last of them begins to where the first of them ends. If one ended before another began, all are read where the last
    begins: a search that has ended keeps its incumbent.

    Returns:
        tokens, shape (marks,), float64, rising; losses, shape (cells, marks), nats per token, infinite where an
        incumbent broke down.
    """
    tokens = np.unique([mark.tokens for cell in cells for mark in cell.marks]).astype(float)
    begin, end = max(cell.marks[0].tokens for cell in cells), min(cell.marks[-1].tokens for cell in cells)
    tokens = tokens[(begin <= tokens) & (tokens <= max(begin, end))]
    losses = [
        np.interp(
            np.log(tokens),
            np.log([mark.tokens for mark in cell.marks]),
            [mark.loss if math.isfinite(mark.loss) else math.inf for mark in cell.marks],
        )
        for cell in cells
    ]
    return tokens, np.nan_to_num(np.array(losses), nan=math.inf, posinf=math.inf)


def markdown(table: BenchTable) -> str:
    """The table as Markdown."""
    return f"# {table.title}\n\n{table.header}\n\n{table.layout().markdown()}"


@dataclass(frozen=True)
class _Curve:
    """One search to draw: marks in tokens, shape (marks,), and perplexities, shape (seeds, marks), NaN in a gap."""

    label: str
    tokens: np.ndarray
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Over seeds, shape (marks,)."""
        mean: np.ndarray = self.values.mean(axis=0)
        return mean


@default_style()
def bench_figure(table: BenchTable, results: Sequence[CellResult], path: Path) -> Figure:
    """Report perplexity of the incumbent against search tokens: mean and range over seeds, and what the finals chose.

    At most `MOST_LINES` searches: the best, with the baselines among them, and the best heuristic as a line. What is
    not drawn is named under the picture.
    """
    from matplotlib.ticker import NullLocator  # slow to import, and not every command draws

    figure = new_figure(10.0, 5.0, table.title)
    axes: Any = figure.add_subplot()
    axes.set_xscale("log", base=2)
    searches, rules = _searches_and_rules(table, results)
    rest = [curve.label for curve in searches if curve.label not in table.baselines]
    baselines = [curve.label for curve in searches if curve.label in table.baselines][:MOST_LINES]
    chosen = {*baselines, *rest[: MOST_LINES - max(len(baselines), bool(baselines) + bool(rules))]}
    drawn = [curve for curve in searches if curve.label in chosen]
    labels = list(dict.fromkeys(cell.label for cell in results))  # the bench file's order
    looks = {label: SERIES[number] for number, label in enumerate(sorted((c.label for c in drawn), key=labels.index))}
    final = {row.label: row for row in table.rows}
    ends = [final[curve.label].perplexity.value for curve in drawn]
    low, high = _scale(drawn, ends + [row.perplexity.value for row in rules[:1]])
    for curve in drawn:
        look, count, row = looks[curve.label], len(curve.values), final[curve.label]
        value = row.perplexity.value
        label = f"{curve.label}: {value:.2f}, {counted(count, 'seed')}"
        label += ", above the scale" if np.nanmin(curve.mean) > high else ""
        axes.plot(curve.tokens, curve.mean, markersize=6, label=label, **look)
        band = curve.values.min(axis=0), curve.values.max(axis=0)
        axes.fill_between(curve.tokens, *band, alpha=0.12, color=look["color"], linewidth=0)
        end = {**look, "markersize": 9, "markerfacecolor": "white", "markeredgewidth": 1.8}
        axes.plot([row.tokens], [value], zorder=4, **end)
    if rules:
        best = rules[0]
        label = f"{best.label} (heuristic): {best.perplexity.value:.2f}"
        label += ", above the scale" if best.perplexity.value > high else ""
        axes.axhline(best.perplexity.value, linestyle="--", linewidth=1.2, color="0.35", label=label)
    if not drawn:
        axes.set_xticks([])  # no search, no tokens
    axes.set_ylim(low, high)
    beyond = [f"{row.label} {row.perplexity}" for row in table.rows if row.label not in looks and row not in rules[:1]]
    if beyond:
        said = textwrap.fill(f"Not drawn: {', '.join(beyond)}.", 150)
        figure.supxlabel(said, x=0.01, ha="left", fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e3:{',.0f' if tokens >= 1e3 else '.1g'}}")
    axes.set_xlabel("tokens evaluated (thousands, log scale)")
    axes.set_ylabel("report perplexity of the incumbent")
    tidy(axes)
    if axes.get_legend_handles_labels()[0]:  # beside the axes, where it covers no curve
        title = "Final perplexity (hollow marker, at\nthe tokens of search and finals);\nband: range of seeds"
        where: dict[str, Any] = {"loc": "outside right center", "alignment": "left", "frameon": False}
        figure.legend(title=title, fontsize=9, title_fontsize=9, **where)
    return save_figure(figure, path)


def _scale(drawn: Sequence[_Curve], others: Sequence[float]) -> tuple[float, float]:
    """Limits that the better half of the curves sets: one bad beginning would flatten all the others."""
    top = max(others, default=1.0)
    if drawn:
        top = 1.15 * sorted(float(np.nanmax(curve.mean)) for curve in drawn)[(len(drawn) - 1) // 2]
    values = np.concatenate([*(curve.values[curve.values <= top] for curve in drawn), [v for v in others if v <= top]])
    if not len(values):
        return 0.0, top
    margin = 0.05 * max(np.ptp(values), 0.01 * values.max())
    return float(values.min() - margin), float(values.max() + margin)


def _searches_and_rules(table: BenchTable, results: Sequence[CellResult]) -> tuple[list[_Curve], list[BenchRow]]:
    """Searches to draw as curves, and rules to draw as lines, best first; without what is not finite."""
    searches, rules = [], []
    for row in table.rows:
        cells = [cell for cell in results if cell.label == row.label]
        if min(len(cell.marks) for cell in cells) < 2:
            rules += [row] if math.isfinite(row.perplexity.value) else []
            continue
        tokens, losses = curves(cells)
        curve = _Curve(row.label, tokens, np.exp(np.where(losses < 700, losses, np.nan)))
        if np.isfinite(curve.mean).any():
            searches.append(curve)
    return searches, rules
