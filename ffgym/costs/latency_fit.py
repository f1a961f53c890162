"""From measured times to the cost of every level: an isotonic fit, and straight lines between its points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PICOSECONDS = 1e12


def timed_sizes(units: int, parts: int = 16) -> list[int]:
    """Sizes at which a sublayer is timed: all if they are few, else 1 and as many equal parts of its units."""
    if units <= parts + 1:
        return list(range(1, units + 1))
    return sorted({1, *(round(units * part / parts) for part in range(1, parts + 1))})


def seconds_without(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """How long a whole model takes without the units of one shape of sublayer, from its times with some of them.

    It is where the line of least squares through the times meets zero units, at most the least of the times. A single
    size says nothing about that; the time itself comes back.

    Args:
        sizes: units that every sublayer of the shape keeps, rising.
        seconds: of the whole model at each size, shape (sizes,).
    """
    if len(sizes) == 1:
        return seconds[0]
    _, at_zero = np.polyfit(np.asarray(sizes, dtype=np.float64), np.asarray(seconds), 1)
    return min(float(at_zero), *seconds)


def cost_table(sizes: Sequence[int], seconds: Sequence[float]) -> np.ndarray:
    """What keeping 0 .. units units costs.

    Measured times are noisy and may fall where the size grows; a budget needs costs that do not. The isotonic
    regression is the non-decreasing sequence with the least squared distance from the times (Barlow et al., 1972;
    scikit-learn's ``IsotonicRegression``). Sizes between the timed ones are interpolated. Keeping no units costs
    nothing.

    Args:
        sizes: units kept at each timed size, strictly increasing from 1, last = all units.
        seconds: the median time of each, shape (sizes,).

    Returns:
        shape (units + 1,), float64, whole picoseconds, non-decreasing from 0: whole numbers, so that sums over
        sublayers are exact whatever their order.
    """
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression().fit_transform(np.asarray(sizes, dtype=np.float64), np.asarray(seconds))
    known = np.concatenate([[0], sizes])
    table = np.interp(np.arange(sizes[-1] + 1), known, np.concatenate([[0.0], fitted]))
    whole: np.ndarray = np.round(table * PICOSECONDS)
    return whole
