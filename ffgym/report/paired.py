"""The difference between two models on the same windows of text, and how sure it is.

Windows differ far more than models do: a hard text is hard for both. So losses are subtracted window by window, and
the interval is that of the mean of these differences (Student's t for paired samples). Where searches were repeated,
their seeds widen it (Welch and Satterthwaite).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ffgym.report.layout import Column, R, numeric
from ffgym.types import JSONDict

CONFIDENCE = 0.95
# how a table explains its differences
MARGIN = "± half of the 95 % interval"
SIGN = "below 0 is better, and a tie is an interval that holds 0."


@dataclass(frozen=True)
class Difference:
    """How much worse one model is than another, in nats per token; below 0 it is better."""

    mean: float  # of the differences
    margin: float  # half the width of its 95 % interval; infinite for a single window

    @property
    def is_tie(self) -> bool:
        """The interval holds 0: these windows do not tell the two models apart."""
        return abs(self.mean) <= self.margin

    @property
    def is_same(self) -> bool:
        """Every window has the same loss: the two are one model, such as an allocation that was found twice."""
        return self.mean == self.margin == 0

    @property
    def figures(self) -> str:
        """Both numbers with three decimals; with four where three leave open whether the interval holds 0."""
        digits = 4 if f"{abs(self.mean):.3f}" == f"{self.margin:.3f}" else 3
        return f"{self.mean:+z.{digits}f}" + (f" ± {self.margin:.{digits}f}" if math.isfinite(self.margin) else "")

    def __str__(self) -> str:
        return "same model" if self.is_same else f"{self.figures} tie" if self.is_tie else self.figures


def paired_difference(losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> Difference | None:
    """Mean difference of two models' losses on the same windows, with its 95 % interval.

    Where a search was repeated, its seeds are a second sample. The variances of the mean over windows and over each
    search's seeds add up, and Student's t has the degrees of freedom of their sum (Welch 1947, Satterthwaite 1946).

    Args:
        losses: nats per token, by seed and window, shape (seeds, windows); one seed for a single model.
        reference: the same windows; as many seeds as there are.

    Returns:
        ``None`` where a loss is not finite.
    """
    ours, theirs = np.array(losses, dtype=float), np.array(reference, dtype=float)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return None
    by_window = ours.mean(axis=0) - theirs.mean(axis=0)
    by_seed = [seeds.mean(axis=1) for seeds in (ours, theirs) if len(seeds) > 1]
    return Difference(float(by_window.mean()), margin(by_window, *by_seed))


def difference_data(found: Difference | None) -> JSONDict:
    """What JSON has of a difference; both values are null where it is not known."""
    return {
        "difference": None if found is None else found.mean,
        "difference_margin": None if found is None else found.margin,
    }


def difference_columns(
    rows: Sequence[R],
    against: str,
    difference: Callable[[R], Difference | None],
    otherwise: Callable[[R], str] = lambda _: "—",
    *,
    suffix: str = "",
    spare: bool = False,
) -> list[Column[R]]:
    """The column of a table's differences; none where no row has one.

    Args:
        against: what the rows differ from.
        otherwise: writes the cell of a row without a difference.
        suffix: of the column's keys in JSON.
    """

    def plain(row: R) -> JSONDict:
        return {f"{key}{suffix}": value for key, value in difference_data(difference(row)).items()}

    def text(row: R) -> str:
        return str(difference(row) or otherwise(row))

    return [numeric(f"nats against {against}", text, plain, spare=spare)] if any(map(difference, rows)) else []


def standard_error(values: Sequence[float] | np.ndarray) -> float | None:
    """Standard error of the mean; ``None`` for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def margin(*samples: Sequence[float] | np.ndarray) -> float:
    """Half the 95 % interval of a sum of independent samples' means (Welch, Satterthwaite); infinite for one value."""
    errors = [standard_error(values) for values in samples]
    if None in errors:
        return math.inf
    variances = np.array(errors, dtype=float) ** 2
    if not (variance := variances.sum()):
        return 0.0
    from scipy.special import stdtrit  # scipy takes a while to import, and not every command prints a table

    freedom = 1 / sum((variances / variance) ** 2 / [len(values) - 1 for values in samples])
    return float(np.sqrt(variance) * stdtrit(freedom, (1 + CONFIDENCE) / 2))
