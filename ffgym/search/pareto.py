"""The Pareto set: what no other candidate beats in every objective. Pure mathematics on points, higher = better."""

from __future__ import annotations

import numpy as np


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which points no other one dominates.

    A point dominates another where it is at least as good in every objective and better in one. Equal points do not
    dominate each other.

    Args:
        points: shape (points, objectives), finite, higher = better.

    Returns:
        shape (points,), bool.
    """
    at_least = (points[:, None] >= points[None]).all(axis=2)
    better = (points[:, None] > points[None]).any(axis=2)
    return np.asarray(~(at_least & better).any(axis=0))


def crowding(points: np.ndarray) -> np.ndarray:
    """How much room each point of a Pareto set has (NSGA-II, Deb et al. 2002, III-B).

    The sum over objectives of the distance between a point's two neighbours, as a share of the objective's range; the
    ends of every objective have infinite room.

    Args:
        points: shape (points, objectives), finite.

    Returns:
        shape (points,).
    """
    room = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]]
        room[order[[0, -1]]] = np.inf
        if span > 0:
            room[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
    return room


def thinned(points: np.ndarray, count: int) -> list[int]:
    """Indices of at most ``count`` points of a Pareto set, spread over all of it, in the order given.

    The most crowded point is left out until few enough are there.

    Args:
        points: shape (points, objectives), finite.
        count: how many are wanted, >= 0.
    """
    kept = np.arange(len(points))
    while len(kept) > count:
        kept = np.delete(kept, np.argmin(crowding(points[kept])))
    return [int(index) for index in kept]
