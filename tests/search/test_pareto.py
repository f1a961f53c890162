"""The Pareto set against the slow and obvious way, and what is left of it when it is thinned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ffgym.search.pareto import crowding, non_dominated, thinned

POINTS = arrays(np.float64, st.tuples(st.integers(1, 20), st.integers(1, 4)), elements=st.integers(-3, 3).map(float))


def dominates(a, b):
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


@given(POINTS)
def test_is_what_no_other_point_dominates(points):
    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert non_dominated(points).tolist() == expected


@given(POINTS, st.randoms())
def test_does_not_depend_on_the_order(points, random):
    order = list(range(len(points)))
    random.shuffle(order)
    assert non_dominated(points[order]).tolist() == non_dominated(points)[order].tolist()


def test_equal_points_do_not_dominate_each_other():
    assert non_dominated(np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 2.0]])).tolist() == [True, True, False]


def test_crowding_is_the_room_between_neighbours():
    """By hand: ends are infinite, the middle has the sum of its neighbours' distances as shares of the ranges."""
    points = np.array([[0.0, 8.0], [1.0, 6.0], [3.0, 4.0], [4.0, 0.0]])
    room = crowding(points)
    assert room[[0, 3]].tolist() == [np.inf, np.inf]
    assert room[1:3] == pytest.approx([3 / 4 + 4 / 8, 3 / 4 + 6 / 8])


def test_an_objective_without_range_gives_no_room():
    assert crowding(np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]))[1] == pytest.approx(1.0)


def test_thinning_keeps_the_ends_and_the_spread():
    line = np.array([[x, 1 - x] for x in (0.0, 0.01, 0.02, 0.5, 0.98, 0.99, 1.0)])
    assert thinned(line, 7) == list(range(7))
    three = thinned(line, 3)
    assert [three[0], three[-1]] == [0, 6]
    assert three[1] in (2, 3, 4), "something in the middle"
    assert thinned(line, 0) == []


def test_thinning_nothing_is_nothing():
    assert thinned(np.array([]), 4) == []
