"""The built-in criteria keep their contract and compute what their docstrings say."""

from __future__ import annotations

import pytest
import torch

from ffgym.criteria.magnitude import Magnitude
from ffgym.criteria.random import Random
from ffgym.criteria.wanda import Wanda
from ffgym.errors import ConfigError
from ffgym.plugins import manager
from ffgym.testing.conformance import CriterionConformance
from ffgym.types import LayerStats

WEIGHT = torch.tensor([[1.0, -2.0], [0.0, 3.0]])


class TestWanda(CriterionConformance):
    def make(self) -> Wanda:
        return Wanda()


class TestMagnitude(CriterionConformance):
    def make(self) -> Magnitude:
        return Magnitude()


class TestRandom(CriterionConformance):
    def make(self) -> Random:
        return Random(Random.Config(seed=4))


def test_wanda_is_weight_times_input_norm() -> None:
    scores = Wanda().score(WEIGHT, LayerStats(square=torch.tensor([4.0, 9.0])))
    torch.testing.assert_close(scores, torch.tensor([[2.0, 6.0], [0.0, 9.0]]))


def test_magnitude_is_the_absolute_weight() -> None:
    torch.testing.assert_close(Magnitude().score(WEIGHT, LayerStats()), WEIGHT.abs())


def test_random_differs_between_seeds_and_sublayers() -> None:
    weight = torch.randn(6, 40)
    one, two = (Random(Random.Config(seed=seed)).score(weight, LayerStats()) for seed in (0, 1))
    other = Random().score(weight + 1, LayerStats())
    assert len(set(one.tolist())) == 40
    assert not torch.equal(one.argsort(), two.argsort())
    assert not torch.equal(one.argsort(), other.argsort())
    assert float(one.min()) >= 0
    assert float(one.max()) < 1


@pytest.mark.parametrize("seed", [-1, 2**64, "x"])
def test_random_refuses_impossible_seeds(seed: object) -> None:
    with pytest.raises(ConfigError, match=r"criterion\.seed"):
        manager.create("criterion", "random", {"seed": seed})
