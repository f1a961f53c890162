"""What the measured candidates say about transfer: correlations with error bars, winners compared, a plain answer.

All of it is made from the JSON lines of ``transfer.py``; every random number comes from one seed.

* Accuracy is the mean over tasks of the share of questions answered right.
* A correlation is over candidates. Its interval is the percentile bootstrap over candidates (2,000 resamples, 95 %):
  what other candidates of the same kind would have shown on the same questions. The difference of two correlations is
  taken within each resample.
* Accuracies on few questions are noisy, and noise hides a correlation. The ceiling says how high one could be seen:
  split-half reliability r of the accuracies (Spearman-Brown: 2 r' / (1 + r'), r' the mean correlation between halves of
  the questions over 200 splits), ceiling = sqrt(r).
* Winners of two rewards answer the same questions. The difference's interval is the bootstrap over questions,
  stratified by task, the mean over seeds in each resample; that other seeds would find other winners is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ffgym.report.figures import BLUE, GREEN, ORANGE, YELLOW, new_figure, save_figure, tidy

SEED = 0
RESAMPLES = 2_000
SPLITS = 200
LEVEL = 95.0
COLOURS = (BLUE, ORANGE, GREEN, YELLOW)
HEURISTIC = "#777777"

Row = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; all ``None`` where it is not defined, e.g. where nothing varies."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool:
        """The interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """``"+0.62 [+0.31, +0.80]"``, or a dash."""
        if self.value is None:
            return "—"
        said = f"{scale * self.value:+.{digits}f}"
        if self.low is None or self.high is None:
            return said
        return f"{said} [{scale * self.low:+.{digits}f}, {scale * self.high:+.{digits}f}]"


@dataclass(frozen=True)
class Correlation:
    """One reward against accuracy, over one set of candidates."""

    reward: str
    spearman: Estimate
    pearson: Estimate
    by_task: dict[str, Estimate]


@dataclass(frozen=True)
class Population:
    """Correlations over one set of candidates, and what these candidates allow to be seen."""

    name: str
    candidates: int
    ceiling: float | None
    accuracy_spread: float
    correlations: tuple[Correlation, ...]
    differences: dict[str, Estimate]


@dataclass(frozen=True)
class Winners:
    """The winners of one reward minus those of another, in accuracy; by task, and in the mean."""

    reward: str
    baseline: str
    seeds: int
    mean: Estimate
    by_task: dict[str, Estimate]


@dataclass(frozen=True)
class Analysis:
    """Everything that the report says."""

    title: str
    tasks: dict[str, int]
    dense_accuracy: float
    standard_error: float
    paired_error: float
    tokens: int
    populations: tuple[Population, ...]
    winners: tuple[Winners, ...]
    winner_rows: tuple[Row, ...]
    answers: tuple[str, ...]
    dated: str = ""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def analyse(rows: Sequence[Row], title: str) -> Analysis:
    """The whole analysis.

    Args:
        rows: candidates as ``transfer.py`` writes them, the dense model among them; at least 3 others.
        title: of the tables.
    """
    (dense,) = [row for row in rows if row["source"] == "dense"]
    distinct: dict[tuple[int, ...], Row] = {}
    for row in rows:
        if row["source"] != "dense":
            distinct.setdefault(tuple(row["kept"]), row)
    every = list(distinct.values())
    searched = [row for row in every if row["source"] != "heuristic"]
    populations = [population("all candidates", every)]
    if 3 <= len(searched) < len(every):
        populations.append(population("candidates of the searches", searched))
    labels = list(dict.fromkeys(row["source"] for row in rows if row["winner"]))
    winners = [compare(rows, label, labels[0]) for label in labels[1:]]
    answered = questions(every)
    partial = Analysis(
        title=title,
        tasks={task: right.shape[1] for task, right in answered.items()},
        dense_accuracy=float(accuracy(questions([dense]))[0]),
        standard_error=float(np.median(standard_errors(answered))),
        paired_error=paired_error(answered),
        tokens=int(dense["tokens"]),
        populations=tuple(populations),
        winners=tuple(winners),
        winner_rows=tuple(row for row in rows if row["winner"]),
        answers=(),
    )
    return Analysis(**{**vars(partial), "answers": tuple(answers(partial))})


# --- accuracies -------------------------------------------------------------------------------------------------------


def questions(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Which questions were answered right, by task, shape (candidates, questions), bool."""
    return {task: np.array([[mark == "1" for mark in row["right"][task]] for row in rows]) for task in rows[0]["right"]}


def accuracy(right: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean over tasks of the share that was answered right, shape (candidates,)."""
    return np.asarray(np.mean([each.mean(axis=1) for each in right.values()], axis=0))


def standard_errors(right: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of each candidate's accuracy, from the number of questions, shape (candidates,)."""
    variances = [each.mean(axis=1) * (1 - each.mean(axis=1)) / each.shape[1] for each in right.values()]
    return np.asarray(np.sqrt(np.sum(variances, axis=0)) / len(right))


def paired_error(right: Mapping[str, np.ndarray]) -> float:
    """Standard error of the accuracy difference of two candidates on the same questions, median over pairs."""
    count = len(next(iter(right.values())))
    errors = []
    for one, other in combinations(range(count), 2):
        variances = [(each[one].astype(float) - each[other]).var() / each.shape[1] for each in right.values()]
        errors.append(np.sqrt(np.sum(variances)) / len(right))
    return float(np.median(errors))


def reliability(right: Mapping[str, np.ndarray]) -> float | None:
    """Split-half reliability of the candidates' accuracies, stepped up to all questions (Spearman-Brown), in [0, 1]."""
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(SPLITS):
        halves: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
        for task, each in right.items():
            order = rng.permutation(each.shape[1])
            middle = len(order) // 2
            halves[0][task], halves[1][task] = each[:, order[:middle]], each[:, order[middle : 2 * middle]]
        if all(half.shape[1] for half in halves[0].values()):
            found.append(pearson(accuracy(halves[0]), accuracy(halves[1])))
    if not found or np.isnan(found).all():
        return None
    half = float(np.nanmean(found))
    return min(1.0, max(0.0, 2 * half / (1 + half))) if half > -1 else 0.0


# --- correlations -----------------------------------------------------------------------------------------------------


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Linear correlation along the last axis, shape (..., candidates) -> (...); NaN where one does not vary."""
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    norm = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(norm > 1e-12, (x * y).sum(axis=-1) / norm, np.nan))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of the ranks along the last axis, ties sharing theirs; NaN where one does not vary."""
    return pearson(rankdata(x, axis=-1), rankdata(y, axis=-1))


def difference(x: np.ndarray, other: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much higher x correlates with y than the other does, in ranks."""
    return np.asarray(spearman(x, y) - spearman(other, y))


def bootstrap(values: Sequence[np.ndarray], statistic: Callable[..., np.ndarray]) -> Estimate:
    """A statistic of candidates with its percentile interval over resampled candidates.

    Args:
        values: arguments of the statistic, each shape (candidates,).
        statistic: of these, along the last axis.
    """
    count = len(values[0])
    draws = np.random.default_rng(SEED).integers(count, size=(RESAMPLES, count))
    value, resampled = float(statistic(*values)), statistic(*(each[draws] for each in values))
    return Estimate(None) if np.isnan(value) else _interval(value, resampled[~np.isnan(resampled)])


def _interval(value: float, resampled: Sequence[float] | np.ndarray) -> Estimate:
    low, high = np.percentile(resampled, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def population(name: str, rows: Sequence[Row]) -> Population:
    """All correlations over these candidates."""
    right = questions(rows)
    mean, by_task = accuracy(right), {task: each.mean(axis=1) for task, each in right.items()}
    rewards = {label: np.array([row["rewards"][label] for row in rows]) for label in rows[0]["rewards"]}
    seen = [row for row in rows if row["seen"] is not None]
    correlations = [_correlation(label, x, mean, by_task) for label, x in rewards.items()]
    if len(seen) >= 3:
        as_seen = np.array([np.exp(row["seen"][1] - row["seen"][0]) for row in seen])
        theirs = questions(seen)
        label = f"perplexity ratio as one episode saw it ({len(seen)} candidates)"
        tasks = {task: each.mean(axis=1) for task, each in theirs.items()}
        correlations.append(_correlation(label, as_seen, accuracy(theirs), tasks))
    first, *others = rewards
    reliable = reliability(right)
    return Population(
        name=name,
        candidates=len(rows),
        ceiling=None if reliable is None else float(np.sqrt(reliable)),
        accuracy_spread=float(mean.std(ddof=1)),
        correlations=tuple(correlations),
        differences={label: bootstrap([rewards[label], rewards[first], mean], difference) for label in others},
    )


def _correlation(label: str, x: np.ndarray, mean: np.ndarray, by_task: Mapping[str, np.ndarray]) -> Correlation:
    return Correlation(
        label,
        spearman=bootstrap([x, mean], spearman),
        pearson=bootstrap([x, mean], pearson),
        by_task={task: bootstrap([x, y], spearman) for task, y in by_task.items()},
    )


# --- winners ----------------------------------------------------------------------------------------------------------


def compare(rows: Sequence[Row], reward: str, baseline: str) -> Winners:
    """The winners of two rewards on the same questions, mean over the seeds that both have."""
    chosen = {(row["source"], row["seed"]): row for row in rows if row["winner"]}
    seeds = [seed for source, seed in chosen if source == reward and (baseline, seed) in chosen]
    ours, theirs = ([chosen[label, seed] for seed in seeds] for label in (reward, baseline))
    gaps = {
        task: (right.astype(float) - questions(theirs)[task]).mean(axis=0) for task, right in questions(ours).items()
    }
    rng = np.random.default_rng(SEED)
    resampled = {
        task: gap[rng.integers(len(gap), size=(RESAMPLES, len(gap)))].mean(axis=1) for task, gap in gaps.items()
    }
    return Winners(
        reward,
        baseline,
        len(seeds),
        mean=_interval(np.mean([gap.mean() for gap in gaps.values()]), np.mean(list(resampled.values()), axis=0)),
        by_task={task: _interval(gap.mean(), resampled[task]) for task, gap in gaps.items()},
    )


# --- in words ---------------------------------------------------------------------------------------------------------


def answers(found: Analysis) -> list[str]:
    """The plain answers, one sentence or two each."""
    said = []
    for each in found.populations:
        first = each.correlations[0]
        if first.spearman.value is None:
            said.append(
                f"Over {each.name} ({each.candidates}), nothing can be said: rewards or accuracies are all alike."
            )
            continue
        verdict = "no correlation that can be told from none"
        if first.spearman.is_clear:
            verdict = "it carries over" if first.spearman.value > 0 else "it misleads"
        ceiling = "" if each.ceiling is None else f"; noise in the accuracies allows at most about {each.ceiling:.2f}"
        said.append(
            f"Over {each.name} ({each.candidates}), the {first.reward} reward and downstream accuracy correlate at "
            f"Spearman {first.spearman.text()}{ceiling}: {verdict}."
        )
        for label, gap in each.differences.items():
            verdict = "no difference that these candidates can show"
            if gap.is_clear and gap.value is not None:
                verdict = "it predicts accuracy better" if gap.value > 0 else "it predicts accuracy worse"
            said.append(f"There, the correlation of {label} is {gap.text()} above that of {first.reward}: {verdict}.")
    for pair in found.winners:
        verdict = "no difference that these questions can show"
        if pair.mean.is_clear and pair.mean.value is not None:
            better = pair.reward if pair.mean.value > 0 else pair.baseline
            verdict = f"{better} finds the more accurate model"
        said.append(
            f"Winners of {pair.reward} minus winners of {pair.baseline}, {pair.seeds} seeds: "
            f"{pair.mean.text(100, 1)} points of accuracy: {verdict}."
        )
    return said


def markdown(found: Analysis) -> str:
    """The report."""
    counts = ", ".join(f"{task} {count}" for task, count in found.tasks.items())
    lines = [
        f"# Transfer: {found.title}",
        "",
        *(f"* {answer}" for answer in found.answers),
        "",
        (f"Computed {found.dated} by an earlier version. " if found.dated else "")
        + f"Accuracy is the mean over tasks on questions that no search has seen ({counts}); dense "
        f"{100 * found.dense_accuracy:.1f} %. One candidate's accuracy has a standard error of "
        f"{100 * found.standard_error:.1f} points; the difference of two on the same questions one of "
        f"{100 * found.paired_error:.1f} points. {found.tokens:,} tokens a candidate. Intervals are 95 % bootstrap.",
    ]
    tasks = list(found.tasks)
    for each in found.populations:
        ceiling = "unknown" if each.ceiling is None else f"{each.ceiling:.2f}"
        lines += [
            "",
            f"## {each.name.capitalize()} ({each.candidates})",
            "",
            f"Accuracies spread by {100 * each.accuracy_spread:.1f} points (standard deviation); ceiling {ceiling}.",
            "",
            "| reward | Spearman, mean accuracy | Pearson, mean accuracy | "
            + " | ".join(f"Spearman, {task}" for task in tasks)
            + " |",
            "|---|" + "---:|" * (2 + len(tasks)),
        ]
        for one in each.correlations:
            cells = [one.spearman, one.pearson, *(one.by_task[task] for task in tasks)]
            lines.append(f"| {one.reward} | " + " | ".join(cell.text() for cell in cells) + " |")
    lines += [
        "",
        "## Winners of the searches",
        "",
        "| reward | seed | perplexity ratio on search text | mean accuracy | " + " | ".join(tasks) + " |",
        "|---|" + "---:|" * (3 + len(tasks)),
    ]
    for row in found.winner_rows:
        right = questions([row])
        shares = [float(accuracy(right)[0]), *(float(right[task].mean()) for task in tasks)]
        ratio = np.exp(row["dense_loss"] - row["loss"])
        percents = " | ".join(f"{100 * share:.1f} %" for share in shares)
        lines.append(f"| {row['source']} | {row['seed']} | {ratio:.3f} | {percents} |")
    for pair in found.winners:
        points = " | ".join([pair.mean.text(100, 1), *(pair.by_task[task].text(100, 1) for task in tasks)])
        lines.append(f"| {pair.reward} minus {pair.baseline}, points | mean of {pair.seeds} | | {points} |")
    return "\n".join(lines) + "\n"


# --- in a picture -----------------------------------------------------------------------------------------------------


def figure(found: Analysis, rows: Sequence[Row], path: Path) -> None:
    """One panel a reward: every candidate's reward against its accuracy; the last panel compares the winners."""
    shown = [one for one in found.populations[0].correlations if one.reward in rows[0]["rewards"]]
    panels = len(shown) + bool(found.winners)
    canvas = new_figure(width=4.2 * panels, height=4.3)
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    sources = list(dict.fromkeys(row["source"] for row in rows if row["source"] != "dense"))
    looks = {source: COLOURS[i % len(COLOURS)] for i, source in enumerate(s for s in sources if s != "heuristic")}
    for panel, one in zip(axes, shown, strict=False):
        for source in sources:
            own = [row for row in rows if row["source"] == source]
            right = questions(own)
            panel.errorbar(
                [row["rewards"][one.reward] for row in own],
                100 * accuracy(right),
                yerr=100 * standard_errors(right),
                fmt="s" if source == "heuristic" else "o",
                color=looks.get(source, HEURISTIC),
                markersize=5,
                elinewidth=0.6,
                alpha=0.8,
                label="heuristics" if source == "heuristic" else f"search on {source}",
            )
        winners = [row for row in rows if row["winner"]]
        places = [row["rewards"][one.reward] for row in winners]
        rings = {"s": 110, "facecolors": "none", "edgecolors": "#222222", "linewidths": 1.3}
        panel.scatter(places, 100 * accuracy(questions(winners)) if winners else [], label="winners", zorder=4, **rings)
        panel.axhline(100 * found.dense_accuracy, color="#222222", linewidth=1, linestyle=":", label="dense")
        panel.set_title(f"{one.reward}\nSpearman {one.spearman.text()}", fontsize=10, loc="left")
        panel.set_xlabel(f"{one.reward} reward on search text")
        panel.set_ylabel("downstream accuracy (%)")
        tidy(panel)
    if found.winners:
        _draw_winners(axes[-1], found)
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    canvas.suptitle(f"Reward and downstream accuracy: {found.title}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    save_figure(canvas, path)


def _draw_winners(panel: Any, found: Analysis) -> None:
    names = ["mean", *found.tasks]
    for number, pair in enumerate(found.winners):
        for place, estimate in enumerate([pair.mean, *(pair.by_task[task] for task in found.tasks)]):
            assert estimate.value is not None
            assert estimate.low is not None
            assert estimate.high is not None
            panel.errorbar(
                [100 * estimate.value],
                [-place - 0.15 * number],
                xerr=[[100 * (estimate.value - estimate.low)], [100 * (estimate.high - estimate.value)]],
                fmt="o",
                color=COLOURS[(number + 1) % len(COLOURS)],
                capsize=3,
            )
    panel.axvline(0, color="#222222", linewidth=1)
    panel.set_yticks([-place for place in range(len(names))], names)
    pairs = "; ".join(f"{pair.reward} minus {pair.baseline}, {pair.seeds} seeds" for pair in found.winners)
    panel.set_title(f"Winners\n{pairs}", fontsize=10, loc="left")
    panel.set_xlabel("difference in accuracy (points)")
    tidy(panel)
