"""The order of the text, and the step size over time."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffgym.recover.training import batch_at, rate_at


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 5))
def test_everything_is_seen_once_before_anything_is_seen_again(count: int, size: int, seed: int) -> None:
    steps = -(-3 * count // size)
    stream = np.concatenate([batch_at(step, size, count, [seed]) for step in range(steps)])
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert max(Counter(stream.tolist()).values()) <= -(-len(stream) // count)


def test_epochs_and_seeds_differ() -> None:
    first, second = batch_at(0, 50, 50, [0]), batch_at(1, 50, 50, [0])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, batch_at(0, 50, 50, [1]))


@pytest.mark.parametrize("steps", [1, 2, 20, 137])
def test_the_rate_rises_to_its_highest_and_falls_to_almost_nothing(steps: int) -> None:
    rates = [rate_at(step, steps, 0.1) for step in range(steps)]
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(0.1)
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[top:]))
    if steps > 20:
        assert rates[-1] < 0.001
