"""Importances as a line in the target sparsity p, so that one policy serves a range of budgets.

    mu(p) = w_0 + w_1 (p - 0.2) / 0.2

Saved policies hold the weights w, shape (2, 2L). They are of order 1 over the usual budgets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

REFERENCE = 0.2
UNIT = 0.2
AT_ALL = np.array([1.0, 0.0])  # shares of a step that all sparsities make


def line_at(weights: np.ndarray, sparsity: float) -> np.ndarray:
    """The importances at a sparsity, shape (2L,)."""
    return np.asarray(_features(sparsity) @ weights)


def line_through(sparsities: Sequence[float], points: Sequence[np.ndarray]) -> np.ndarray:
    """Weights of the line through the importances at two sparsities, shape (2, 2L)."""
    return np.linalg.solve(np.stack([_features(p) for p in sparsities]), np.stack(points).astype(np.float64))


def line_from(sparsity: float, point: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Weights of the line through the importances at one sparsity, with a slope w_1; shape (2, 2L)."""
    return np.stack([point - _features(sparsity)[1] * slope, slope])


def shares_of_step(sparsity: float, budgets: tuple[float, float] | None) -> np.ndarray:
    """What of a step of mu(p) either weight makes, shape (2,); together they make all of it.

    How much of it the other sparsities get depends on the scale of p: here the budgets are [-1, 1], so that a step at
    one end leaves the other end where it is.
    """
    low, high = budgets or (REFERENCE - UNIT, REFERENCE + UNIT)
    centre, unit = (low + high) / 2, (high - low) / 2
    x = (sparsity - centre) / unit
    level, slope = np.array([1.0, x]) / (1.0 + x**2)
    # Of a line around the centre, in the units of the weights.
    return np.array([level + slope * (REFERENCE - centre) / unit, slope * (UNIT / unit)])


def _features(sparsity: float) -> np.ndarray:
    return np.array([1.0, (sparsity - REFERENCE) / UNIT])
