"""Paired differences: what must hold for any losses, and what scipy says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import ttest_ind, ttest_rel

from ffgym.report.paired import Difference, margin, paired_difference

LOSSES = st.floats(0.5, 12.0)
SEVERAL = st.integers(2, 20).flatmap(lambda n: st.tuples(*[arrays(float, (1, n), elements=LOSSES)] * 2))


@given(SEVERAL)
def test_the_interval_is_that_of_a_paired_t_test(drawn: tuple[np.ndarray, ...]) -> None:
    ours, theirs = drawn
    found = paired_difference(ours, theirs)
    assert found is not None
    assert found.mean == pytest.approx(float((ours - theirs).mean()), abs=1e-12)
    if found.margin > 1e-9:
        low, high = ttest_rel(ours[0], theirs[0]).confidence_interval(0.95)
        assert (found.mean - found.margin, found.mean + found.margin) == pytest.approx((low, high))


@given(st.tuples(*[st.integers(2, 9).flatmap(lambda n: arrays(float, n, elements=LOSSES))] * 2))
def test_two_samples_have_the_interval_of_welchs_t_test(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    found = margin(*drawn)
    if found > 1e-9:
        low, high = ttest_ind(*drawn, equal_var=False).confidence_interval(0.95)
        assert found == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (5, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.0], ids="seeds {} times as uncertain as windows".format)
def test_the_interval_holds_the_truth_95_times_in_100(seeds: tuple[int, int], spread: float) -> None:
    windows, draws, random = 30, 1000, np.random.default_rng(0)
    hits = 0
    for _ in range(draws):
        text = random.normal(0, math.sqrt(windows), windows)  # what windows add to the difference: a mean of error 1
        ours, theirs = (
            random.normal(0, spread * math.sqrt(count), (count, 1)) * (count > 1) + np.zeros(windows) for count in seeds
        )
        found = paired_difference((ours + text).tolist(), theirs.tolist())
        hits += found is not None and found.is_tie
    assert 0.92 < hits / draws < 0.97


def test_a_model_ties_with_itself() -> None:
    difference = paired_difference([[2.0, 3.0]], [[2.0, 3.0]])
    assert difference == Difference(0.0, 0.0)
    assert difference.is_tie


def test_seeds_that_disagree_widen_the_interval() -> None:
    reference = [[3.0, 3.1, 3.2]]
    alike = paired_difference([[2.9, 3.0, 3.11], [2.9, 3.0, 3.11]], reference)
    apart = paired_difference([[2.6, 2.7, 2.81], [3.2, 3.3, 3.41]], reference)
    assert alike is not None
    assert apart is not None
    assert alike.mean == pytest.approx(apart.mean)
    assert not alike.is_tie
    assert apart.is_tie


def test_one_window_says_nothing_and_no_number_gives_none() -> None:
    one = paired_difference([[2.0]], [[3.0]])
    assert one == Difference(-1.0, math.inf)
    assert one.is_tie
    assert paired_difference([[2.0, math.inf]], [[3.0, 3.0]]) is None


@pytest.mark.parametrize(
    ("mean", "margin", "text"),
    [
        (-0.0831, 0.0147, "-0.083 ± 0.015"),
        (0.002, 0.006, "+0.002 ± 0.006 tie"),
        (-0.0042, 0.0038, "-0.0042 ± 0.0038"),  # with three decimals it would look like a tie
        (0.0018, 0.0021, "+0.0018 ± 0.0021 tie"),
        (-1.0, math.inf, "-1.000 tie"),
        (0.0, 0.0, "same model"),  # nothing to be unsure of
    ],
)
def test_how_it_is_written(mean: float, margin: float, text: str) -> None:
    assert str(Difference(mean, margin)) == text
