"""What a bench shows: one row per agent, quality and cost with their spread, and quality against tokens."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ffgym.report.figures import new_figure, save_figure, tidy
from ffgym.report.layout import Column, Table
from ffgym.types import JSONDict

LINES = ("-", "--", ":")
Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Stored(BaseModel):
    """What result files hold; JSON has no infinity and no NaN, so they are strings there."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Mark(_Stored):
    """An incumbent: tokens spent when it was noted, and its loss on the report split (nats per token)."""

    tokens: Count
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where it overflows."""
        return _perplexity(self.loss)


class Final(_Stored):
    """The chosen allocation: units kept per sublayer, report loss (nats per token), sparsity reached, origin.

    ``plain_loss`` is the report loss without any refit; ``None`` where it was not asked for.
    """

    kept: list[Count]
    loss: float
    sparsity: float
    origin: str
    plain_loss: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where it overflows."""
        return _perplexity(self.loss)


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


def _perplexity(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)


@dataclass(frozen=True)
class Mean:
    """Mean over seeds and its standard error; ``None`` for a single seed, or where one of them is not finite."""

    value: float
    stderr: float | None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.stderr is None else f" ± {self.stderr:.2f}")


def mean_of(values: Sequence[float]) -> Mean:
    """Mean of at least one value."""
    array = np.array(values)
    has_spread = len(array) > 1 and bool(np.isfinite(array).all())
    return Mean(float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if has_spread else None)


@dataclass(frozen=True)
class BenchRow:
    """One agent over its seeds.

    Attributes:
        label: the agent, heuristic or variant.
        perplexity: over seeds, report split.
        plain: the same without any refit; ``None`` where no seed has it.
        seeds: how many.
        dtypes: of its cells, e.g. ``float32``.
        tokens: mean tokens of search and finals.
        seconds: mean wall time of search and finals.
        tokens_to_baseline: tokens until the mean incumbent was as good as the baseline's final quality (interpolated
            between marks, in log tokens); ``None`` where it never was.
        at_first_mark: it was so at the first mark already: it may have taken fewer.
        times_fewer: the tokens that the baseline took to its final quality over those; its whole search, where none of
            its incumbents was as good as what its finals chose.
    """

    label: str
    perplexity: Mean
    plain: Mean | None
    seeds: int
    dtypes: str
    tokens: float
    seconds: float
    tokens_to_baseline: float | None
    at_first_mark: bool
    times_fewer: float | None


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
    rivals = groups.get(baseline, [])
    goal = float(np.mean([cell.final.loss for cell in rivals])) if rivals else None
    own = None if goal is None else tokens_until(rivals, goal)
    price = own or float(np.mean([cell.search_tokens for cell in rivals] or [0]))
    rows = []
    for label, cells in groups.items():
        plain = [_perplexity(cell.final.plain_loss) for cell in cells if cell.final.plain_loss is not None]
        reached = None if goal is None else tokens_until(cells, goal)
        rows.append(
            BenchRow(
                label=label,
                perplexity=mean_of([cell.final.perplexity for cell in cells]),
                plain=mean_of(plain) if plain else None,
                seeds=len(cells),
                dtypes=_dtypes(cells),
                tokens=float(np.mean([cell.search_tokens + cell.final_tokens for cell in cells])),
                seconds=float(np.mean([cell.seconds for cell in cells])),
                tokens_to_baseline=reached,
                at_first_mark=reached is not None and reached <= curves(cells)[0][0],
                times_fewer=price / reached if reached else None,
            )
        )
    first = results[0]
    targets = " and ".join(f"{target:.0%}" for target in sorted({result.target for result in results}))
    dtypes = _dtypes(results)
    # "none" is what the rewards saw; the report is measured after ridge all the same
    affine = {result.settings.get("prune", {}).get("calibration") == "affine" for result in results}
    refit = (
        "the same affine refit" if affine == {True} else "the same ridge" if affine == {False} else "ridge or affine"
    )
    data = first.settings.get("data", {})
    header = (
        f"Report split of {data.get('report', 'the run')}, {first.report_tokens:,} tokens in windows of "
        f"{data.get('window', 0):,}, {dtypes}, after {refit}; dense perplexity {math.exp(first.dense_loss):.2f}; "
        f"target sparsity {targets}; mean and standard error over seeds."
    )
    if rivals:
        header += f" Times fewer than the {price:,.0f} tokens " + (
            f"that {baseline} took to that quality itself."
            if own is not None
            else f"of {baseline}'s whole search: none of its incumbents was as good as what its finals chose."
        )
    return BenchTable(title, tuple(sorted(rows, key=_standing)), header, baseline)


def _dtypes(cells: Sequence[CellResult]) -> str:
    return " and ".join(dict.fromkeys(cell.dtype for cell in cells))


def _standing(row: BenchRow) -> tuple[bool, float]:
    """Best first; what came to no number comes last."""
    return math.isnan(row.perplexity.value), row.perplexity.value


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
    last of them begins to where the first of them ends.

    Returns:
        tokens, shape (marks,), float64, rising; losses, shape (cells, marks), nats per token, infinite where an
        incumbent broke down.
    """
    tokens = np.unique([mark.tokens for cell in cells for mark in cell.marks]).astype(float)
    begin, end = max(cell.marks[0].tokens for cell in cells), min(cell.marks[-1].tokens for cell in cells)
    tokens = tokens[(begin <= tokens) & (tokens <= end)]
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
    columns: list[Column[BenchRow]] = [
        Column("agent", lambda row: row.label, left=True),
        Column("perplexity", lambda row: str(row.perplexity)),
        Column("without any refit", lambda row: str(row.plain or "—")),
        Column("seeds", lambda row: str(row.seeds)),
        Column("dtype", lambda row: row.dtypes, left=True),
        Column("tokens", lambda row: f"{row.tokens:,.0f}"),
        Column("seconds", lambda row: f"{row.seconds:.0f}"),
        Column(f"tokens to {table.baseline}'s final quality", _tokens_to_baseline),
        Column("times fewer", _times_fewer),
    ]
    if not any(row.plain for row in table.rows):
        del columns[2]
    return f"# {table.title}\n\n{table.header}\n\n{Table(columns, table.rows).markdown()}"


def _tokens_to_baseline(row: BenchRow) -> str:
    tokens = row.tokens_to_baseline
    return "—" if tokens is None else f"{'≤ ' if row.at_first_mark else ''}{tokens:,.0f}"


def _times_fewer(row: BenchRow) -> str:
    return "—" if row.times_fewer is None else f"{'≥ ' if row.at_first_mark else ''}{row.times_fewer:.1f}"


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

    @property
    def lowest(self) -> float:
        """Of the mean."""
        return float(np.nanmin(self.mean))

    @property
    def highest(self) -> float:
        """Of the mean."""
        return float(np.nanmax(self.mean))


def bench_figure(table: BenchTable, results: Sequence[CellResult], path: Path) -> None:
    """Report perplexity of the incumbent against search tokens, mean and range over seeds; heuristics as lines.

    The better half of the searches sets the scale. What lies far above it is named, or it would flatten their curves.

    Args:
        table: gives title and order.
        results: the cells.
        path: PNG to write.
    """
    from matplotlib.ticker import NullLocator, StrMethodFormatter  # slow to import, and not every command draws

    figure = new_figure(10.0, 5.0)
    axes: Any = figure.add_subplot()
    axes.set_xscale("log", base=2)
    drawn: Counter[str] = Counter()
    searches, rules = _searches_and_rules(table, results)
    top = 1.15 * max((curve.highest for curve in searches[: -(-len(searches) // 2)]), default=math.inf)  # best first
    within = {curve.label for curve in searches if curve.lowest <= top}
    labels = list(dict.fromkeys(cell.label for cell in results if cell.label in within))  # the bench file's order
    for curve in searches:
        if curve.label in within:
            color = f"C{labels.index(curve.label) % 10}"
            seeds = f"{curve.label} ({len(curve.values)})"
            look = {"color": color, "linestyle": LINES[drawn[color] % len(LINES)]}  # of one colour, each its own line
            drawn[color] += 1
            axes.plot(curve.tokens, curve.mean, marker="o", markersize=4, label=seeds, **look)
            band = curve.values.min(axis=0), curve.values.max(axis=0)
            axes.fill_between(curve.tokens, *band, alpha=min(0.15, 0.8 / len(searches)), color=color)
    near = [row for row in rules if row.perplexity.value <= top]
    shown = [curve.values[curve.values <= top] for curve in searches] + [np.array([r.perplexity.value for r in near])]
    if len(values := np.concatenate(shown)):
        margin = 0.05 * max(np.ptp(values), 0.01 * values.max())
        axes.set_ylim(values.min() - margin, values.max() + margin)
    _draw_rules(axes, near)
    beyond = [
        f"{curve.label} from {curve.lowest:.2f}" if curve.lowest > top else f"{curve.label} up to {curve.highest:.2f}"
        for curve in searches
        if curve.highest > top
    ]
    beyond += [f"{row.label} {row.perplexity.value:.2f}" for row in rules if row.perplexity.value > top]
    if beyond:
        said = f"above the scale: {', '.join(beyond)}"  # beneath the axes, where no legend and no curve covers it
        axes.text(0.0, -0.16, said, transform=axes.transAxes, fontsize=7, va="top", wrap=True)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("search tokens evaluated")
    axes.set_ylabel("report perplexity of the incumbent")
    axes.set_title(f"{table.title}: quality against search cost", loc="left")
    tidy(axes)
    if axes.get_legend_handles_labels()[0]:  # beside the axes, where it covers no curve
        title = "agent (seeds):\nmean and range of seeds"
        figure.legend(title=title, loc="outside right upper", frameon=False, fontsize=8, title_fontsize=8)
    save_figure(figure, path)


def _searches_and_rules(table: BenchTable, results: Sequence[CellResult]) -> tuple[list[_Curve], list[BenchRow]]:
    """What can be drawn as a curve and what as a line, best first; what came to no number is neither."""
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


def _draw_rules(axes: Any, rules: Sequence[BenchRow]) -> None:
    """One-shot rules as lines, named at their right end; best first."""
    if not axes.lines:
        axes.set_xticks([])  # no search, no tokens
    for row in rules:
        axes.axhline(row.perplexity.value, linestyle=":", linewidth=1, color="0.5")
    low, high = axes.get_ylim()
    place = -math.inf
    for row in rules:
        place = max(row.perplexity.value, place + 0.025 * (high - low))  # neighbours would cover each other
        axes.annotate(row.label, (1.005, place), xycoords=("axes fraction", "data"), fontsize=7, va="center")
