"""The built-in heuristics keep their contract and spare what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ffgym.heuristics.fisher import Fisher
from ffgym.heuristics.mlp_first import MlpFirst, fitting_ends
from ffgym.heuristics.uniform import Uniform
from ffgym.testing.conformance import HeuristicConformance
from ffgym.testing.toys import toy_views


class TestUniform(HeuristicConformance):
    def make(self) -> Uniform:
        return Uniform()


class TestMlpFirst(HeuristicConformance):
    def make(self) -> MlpFirst:
        return MlpFirst()


class TestFisher(HeuristicConformance):
    def make(self) -> Fisher:
        return Fisher()


def test_fisher_keeps_what_would_cost_more_to_lose() -> None:
    """Twice the loss at every level of one MLP: it keeps more, the other less."""
    views = toy_views(2, Fisher.needs)
    dear = [*views[:3], replace(views[3], loss_increase=2 * np.asarray(views[3].loss_increase))]
    plain, raised = (Fisher().importance(given) for given in (views, dear))
    assert raised[3] > plain[3]
    assert raised[1] <= plain[1]


def test_uniform_is_zero_everywhere() -> None:
    np.testing.assert_array_equal(Uniform().importance(toy_views(3, frozenset())), np.zeros(6))


def test_mlp_first_spares_attention_and_the_ends() -> None:
    importance = MlpFirst().importance(toy_views(10, frozenset()))
    np.testing.assert_array_equal(importance[0::2], np.ones(10))
    np.testing.assert_array_equal(importance[1::2], [1, 1, 1, -1, -1, -1, -1, -1, -1, 1])


def test_mlp_first_spares_what_its_options_say() -> None:
    heuristic = MlpFirst(MlpFirst.Config(spare_first=0, spare_last=2))
    np.testing.assert_array_equal(heuristic.importance(toy_views(5, frozenset()))[1::2], [-1, -1, -1, 1, 1])


@pytest.mark.parametrize(
    ("first", "last", "depth", "expected"),
    [
        (3, 1, 30, (3, 1)),
        (3, 1, 8, (3, 1)),
        (3, 1, 4, (1, 0)),
        (3, 1, 1, (0, 0)),
        (0, 0, 1, (0, 0)),
        (10, 10, 4, (1, 1)),
    ],
)
def test_shallow_models_spare_proportionally_less(first: int, last: int, depth: int, expected: tuple[int, int]) -> None:
    assert fitting_ends(first, last, depth) == expected
