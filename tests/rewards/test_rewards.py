"""The built-in reward keeps its contract and is Eq. 2 of the paper."""

from __future__ import annotations

import pytest

from ffgym.rewards.perplexity import Perplexity
from ffgym.testing.conformance import RewardConformance
from ffgym.types import Evaluation


class TestPerplexity(RewardConformance):
    def make(self) -> Perplexity:
        return Perplexity()


def test_reward_is_dense_over_pruned_perplexity() -> None:
    pruned, dense = Evaluation((3.2, 3.6), 128), Evaluation((3.0, 3.1), 128)
    assert Perplexity()(pruned, dense) == pytest.approx(dense.perplexity / pruned.perplexity)


def test_dense_model_earns_one_and_a_broken_one_nothing() -> None:
    dense = Evaluation((3.0,), 128)
    assert Perplexity()(dense, dense) == 1.0
    assert Perplexity()(Evaluation((2000.0,), 128), dense) == 0.0
