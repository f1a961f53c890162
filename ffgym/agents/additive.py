"""The additive model of importances: what each sublayer's change is worth on its own, and the best of all together.

The problem: maximise the sum over sublayers of f_i(x_i), each f_i known at a few changes x and 0 at x = 0. It is
separable, so it is solved exactly one sublayer at a time: the vertex of the parabola through the origin that fits f_i
best, where that is a maximum between the changes measured, else the best change measured, else 0.
"""

from __future__ import annotations

import numpy as np


def one_at_a_time(prior: np.ndarray, levels: tuple[float, ...], rng: np.random.Generator) -> list[tuple[int, float]]:
    """What to measure: (sublayer, change) for every sublayer and level that [-1, 1] leaves room for.

    Level by level, the sublayers of each in a random order, so that a sweep that is cut short is spread over depth.

    Args:
        prior: importances to move from, shape (2L,).
        levels: changes of one importance.
        rng: of the order.
    """
    moves: list[tuple[int, float]] = []
    for level in levels:
        for i in rng.permutation(len(prior)):
            change = float(np.clip(prior[i] + level, -1.0, 1.0) - prior[i])
            if abs(change) > 1e-6:
                moves.append((int(i), change))
    return moves


def solve(dimensions: int, moves: list[tuple[int, float]], gains: np.ndarray) -> np.ndarray:
    """The changes that maximise the sum of all sublayers' models.

    Args:
        dimensions: 2L.
        moves: (sublayer, change).
        gains: shape (moves,); NaN = not measured.

    Returns:
        shape (2L,).
    """
    best = np.zeros(dimensions)
    for sublayer in range(dimensions):
        known = [(x, g) for (i, x), g in zip(moves, gains, strict=True) if i == sublayer and np.isfinite(g)]
        if known:
            best[sublayer] = _peak(np.array([x for x, _ in known]), np.array([g for _, g in known]))
    return best


def _peak(changes: np.ndarray, gains: np.ndarray) -> float:
    """Where a parabola through 0 and the gains peaks between the changes; else the best of them, or 0."""
    low, high = min(0.0, changes.min()), max(0.0, changes.max())
    if len(np.unique(changes)) > 1:
        slope, bend = np.linalg.lstsq(np.stack([changes, changes**2], axis=1), gains, rcond=None)[0]
        if bend < 0 and low < -slope / (2 * bend) < high:
            return float(-slope / (2 * bend))
    return float(changes[np.argmax(gains)]) if gains.max() > 0 else 0.0
