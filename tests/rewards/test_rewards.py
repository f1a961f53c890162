"""The built-in rewards keep their contracts and are the formulas of their docstrings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ffgym.errors import ConfigError
from ffgym.plugins import manager
from ffgym.plugins.bases import Reward
from ffgym.plugins.built_ins import BUILTINS
from ffgym.rewards.kl import KL
from ffgym.rewards.perplexity import Perplexity
from ffgym.testing.conformance import RewardConformance
from ffgym.types import Evaluation

OPTIONS = [
    *((name, {}) for name in BUILTINS["reward"]),
    ("kl", {"direction": "reverse"}),
    ("multi-objective", {"accuracy": 0, "resource": "kv"}),
]


class TestContract(RewardConformance):
    @pytest.fixture(params=OPTIONS, ids=str, autouse=True)
    def _choose(self, request: Any) -> None:
        self.name, self.options = request.param

    def make(self) -> Reward:
        return manager.create("reward", self.name, self.options)


def test_reward_is_dense_over_pruned_perplexity() -> None:
    pruned, dense = Evaluation((3.2, 3.6), 128), Evaluation((3.0, 3.1), 128)
    assert Perplexity()(pruned, dense) == pytest.approx(dense.perplexity / pruned.perplexity)


def test_dense_model_earns_one_and_a_broken_one_nothing() -> None:
    dense = Evaluation((3.0,), 128)
    assert Perplexity()(dense, dense) == 1.0
    assert Perplexity()(Evaluation((2000.0,), 128), dense) == 0.0


def test_kl_is_the_exponential_of_the_mean_divergence_in_the_direction_asked_for() -> None:
    pruned = Evaluation((9.0, 9.0), 128, kls=(0.2, 0.4), reverse_kls=(1.0, 2.0))
    dense = Evaluation((3.0, 3.0), 128, kls=(0.0, 0.0), reverse_kls=(0.0, 0.0))
    reverse = manager.create("reward", "kl", {"direction": "reverse"})
    assert KL()(pruned, dense) == pytest.approx(math.exp(-0.3))
    assert reverse(pruned, dense) == pytest.approx(math.exp(-1.5))
    assert (KL().needs, reverse.needs) == ({"kl"}, {"reverse_kl"})
    assert KL().objectives(pruned, dense) == {}, "one aim: nothing to trade"


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward.direction = 'sideways'"):
        manager.create("reward", "kl", {"direction": "sideways"})


class TestWeights:
    dense = Evaluation((3.0,), 128, accuracy=0.6, costs={"macs": 200.0, "kv": 50.0})
    pruned = Evaluation((3.5,), 128, accuracy=0.45, costs={"macs": 150.0, "kv": 20.0})

    def make(self, **options: Any) -> Reward:
        return manager.create("reward", "multi-objective", options)

    def test_is_the_weighted_mean_of_its_terms(self) -> None:
        got = self.make(perplexity=2, accuracy=1, cost=0.5)(self.pruned, self.dense)
        assert got == pytest.approx((2 * math.exp(-0.5) + 1 * 0.85 + 0.5 * 0.25) / 3.5)

    def test_perplexity_alone_is_the_papers_reward(self) -> None:
        alone = self.make(accuracy=0, cost=0)
        assert alone(self.pruned, self.dense) == pytest.approx(Perplexity()(self.pruned, self.dense))
        assert alone.needs == frozenset(), "a term without weight is not measured"

    def test_objectives_are_the_terms_that_have_a_weight(self) -> None:
        ratio = pytest.approx(math.exp(-0.5))
        named = self.make().objectives(self.pruned, self.dense)
        assert named == {"perplexity_ratio": ratio, "accuracy": 0.45, "macs_saved": 0.25}
        named = self.make(accuracy=0, resource="kv").objectives(self.pruned, self.dense)
        assert named == {"perplexity_ratio": ratio, "kv_saved": pytest.approx(0.6)}
        assert list(self.make(perplexity=0).objectives(self.pruned, self.dense)) == ["accuracy", "macs_saved"]

    def test_a_single_term_weighs_nothing_against_another(self) -> None:
        assert not self.make(accuracy=0, cost=0).has_objectives
        assert not self.make(perplexity=0, cost=0).has_objectives
        assert self.make(accuracy=0).has_objectives

    def test_what_costs_more_than_dense_saves_nothing(self) -> None:
        """A measured latency may: the reward never falls below ``worst``."""
        slower = Evaluation((3.0,), 128, accuracy=0.6, costs={"macs": 260.0})
        only_cost = self.make(perplexity=0, accuracy=0)
        assert only_cost(slower, self.dense) == 0.0
        assert only_cost.objectives(slower, self.dense) == {"macs_saved": pytest.approx(-0.3)}

    @pytest.mark.parametrize(("weight", "value"), [("perplexity", -0.1), ("accuracy", math.inf), ("cost", math.nan)])
    def test_weights_are_finite_and_not_negative(self, weight: str, value: float) -> None:
        with pytest.raises(ConfigError, match=rf"reward\.{weight} = "):
            self.make(**{weight: value})

    def test_weights_that_are_all_zero_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="are all 0") as caught:
            self.make(perplexity=0, accuracy=0, cost=0)
        assert "--set reward.perplexity=1" in str(caught.value.hint)

    @pytest.mark.parametrize("options", [{"examples": 0}, {"tasks": "arc_easy"}, {"weigths": 1}])
    def test_other_options_are_checked(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            self.make(**options)
