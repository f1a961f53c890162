"""The conformance tests pass what is right and catch what is wrong; the toys have the optimum they claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ffgym.errors import PluginError
from ffgym.plugins.bases import Agent, BatchAgent, Criterion, Heuristic, Plugin, PluginConfig, Reward
from ffgym.testing.conformance import (
    AgentConformance,
    CriterionConformance,
    HeuristicConformance,
    PluginConformance,
    RewardConformance,
)
from ffgym.testing.toys import QuadraticEnv, RuggedEnv, SeparableEnv, ToyEnv, toy_views
from ffgym.types import Evaluation, LayerStats, SublayerView


class Drift(BatchAgent):
    """A small honest agent: noise around the best action so far, resumable."""

    name = "drift"

    centre: np.ndarray | None = None

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.best, self.batch = -np.inf, batch
        if self.centre is None:
            self.centre = np.zeros(dimensions)

    def ask(self, observations: np.ndarray) -> np.ndarray:
        noise = self.rng.normal(scale=0.2, size=(self.batch, self.centre.size))
        return np.clip(self.centre + noise, -1, 1).astype(np.float32)

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        if rewards.max() > self.best:
            self.centre, self.best = actions[rewards.argmax()].astype(np.float64), float(rewards.max())
        return {"best": self.best}

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        return [self.centre]

    def state(self) -> dict[str, Any]:
        return {"centre": self.centre}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.centre = np.array(state["centre"])


class TestDrift(AgentConformance):
    def make(self) -> Drift:
        return Drift()


class Lazy(Drift):
    name = "lazy"

    def learn(self, env: Any, *, seed: int, on_update: Any) -> None:
        env.reset(seed=seed)


class Global(Drift):
    name = "global"

    def ask(self, observations: np.ndarray) -> np.ndarray:
        return np.random.uniform(-1, 1, (self.batch, self.centre.size))


class Forgetful(Drift):
    name = "forgetful"

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


class Pickled(Drift):
    name = "pickled"

    def state(self) -> dict[str, Any]:
        return {"rng": self.rng}


class Beyond(Drift):
    name = "beyond"

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        return [self.centre + 3]


class Centres(Drift):
    """Takes the mean off the rewards where they are."""

    name = "centres"

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        rewards -= rewards.mean()
        return super().tell(observations, actions, rewards)


class Unconfigured(Drift):
    name = "unconfigured"

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("agent", "test"),
    [
        (Centres, "test_leaves_what_it_is_told_unchanged"),
        (Unconfigured, "test_takes_its_config"),
        (Lazy, "test_spends_the_budget"),
        (Global, "test_same_seed_same_search"),
        (Forgetful, "test_takes_up_a_state"),
        (Pickled, "test_state_is_plain_data"),
        (Beyond, "test_recommends_importances"),
    ],
)
def test_broken_agents_are_caught(agent: type[Agent], test: str) -> None:
    caught(AgentConformance, agent, test)


class Positional(Criterion):
    name = "positional"

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        return torch.arange(weight.shape[1])


class Noisy(Criterion):
    name = "noisy"

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        return torch.rand(weight.shape[1])


class Undeclared(Criterion):
    name = "undeclared"

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        assert stats.square is not None
        return stats.square


class Misspelt(Criterion):
    name = "misspelt"
    needs = frozenset({"sqare"})

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        return weight.abs()


class Lax(Criterion):
    name = "lax"

    class Config(PluginConfig, extra="ignore"):
        pass

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        return weight.abs()


@pytest.mark.parametrize(
    ("criterion", "test"),
    [
        (Positional, "test_scores_follow_a_permutation_of_channels"),
        (Noisy, "test_same_input_same_scores"),
        (Undeclared, "test_scores_keep_the_contract"),
        (Misspelt, "test_is_accepted"),
        (Lax, "test_config_refuses_unknown_keys"),
    ],
)
def test_broken_criteria_are_caught(criterion: type[Criterion], test: str) -> None:
    caught(CriterionConformance, criterion, test)


class Long(Heuristic):
    name = "long"

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        return np.zeros(9)


class Dice(Heuristic):
    name = "dice"

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        return np.random.uniform(-1, 1, len(sublayers))


def test_broken_heuristics_are_caught() -> None:
    caught(HeuristicConformance, Dice, "test_same_input_same_importances")
    with pytest.raises(PluginError):
        conformance(HeuristicConformance, Long).test_importances_keep_the_contract(4)  # type: ignore[attr-defined]


class Upside(Reward):
    """Rewards damage; its worst is not the worst."""

    name = "upside"
    worst = 1.0

    def __call__(self, pruned: Evaluation, dense: Evaluation) -> float:
        return 1 - 1 / (1 + pruned.loss)


class Overflow(Reward):
    name = "overflow"

    def __call__(self, pruned: Evaluation, dense: Evaluation) -> float:
        return -pruned.perplexity


class Secretive(Reward):
    """Reads what it did not ask for."""

    name = "secretive"

    def __call__(self, pruned: Evaluation, dense: Evaluation) -> float:
        return -pruned.kl


class Wavering(Upside):
    """Has another aim for every model."""

    name = "wavering"

    def objectives(self, pruned: Evaluation, dense: Evaluation) -> dict[str, float]:
        return {f"at {pruned.loss:.0f}": 1.0}


@pytest.mark.parametrize(
    ("reward", "test"),
    [
        (Secretive, "test_finite_for_every_finite_loss"),
        (Wavering, "test_objectives_have_fixed_names_and_finite_values"),
        (Upside, "test_lower_loss_never_earns_less"),
        (Upside, "test_worst_is_the_floor"),
        (Overflow, "test_finite_for_every_finite_loss"),
    ],
)
def test_broken_rewards_are_caught(reward: type[Reward], test: str) -> None:
    caught(RewardConformance, reward, test)


def conformance(suite: type[PluginConformance], plugin: type[Plugin]) -> PluginConformance:
    return type("Suite", (suite,), {"make": lambda self: plugin()})()


def caught(suite: type[PluginConformance], plugin: type[Plugin], test: str) -> None:
    with pytest.raises((AssertionError, PluginError, pytest.fail.Exception)):
        getattr(conformance(suite, plugin), test)()


# the toys


@pytest.mark.parametrize("toy", [SeparableEnv, QuadraticEnv, RuggedEnv])
def test_toys_are_best_at_their_optimum(toy: type[ToyEnv]) -> None:
    env = toy(num_envs=64, dimensions=5, tokens=1000)
    points = np.random.default_rng(0).uniform(-1, 1, (64, 5)).astype(np.float32)
    points[0] = env.optimum
    _, rewards, terminated, truncated, _ = env.step(points)
    assert rewards[0] == pytest.approx(1.0)
    assert rewards[1:].max() < rewards[0]
    assert terminated.all()
    assert not truncated.any()


def test_toys_repeat_themselves_with_a_seed_and_count_tokens() -> None:
    runs = []
    for _ in range(2):
        env = QuadraticEnv(num_envs=2, dimensions=3, tokens=4, noise=0.5)
        env.reset(seed=4)
        runs.append([env.step(np.zeros((2, 3)))[1] for _ in range(2)])
        assert env.tokens_spent == 4
        assert env.tokens_left == 0
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0][0], runs[0][1])


def test_toys_refuse_what_the_real_environment_could_not_use() -> None:
    env = SeparableEnv(num_envs=2, dimensions=3, tokens=2)
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        env.step(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match=r"in \[-1, 1\]"):
        env.step(np.full((2, 3), 1.5))
    env.step(np.zeros((2, 3)))
    with pytest.raises(RuntimeError, match="budget is spent"):
        env.step(np.zeros((2, 3)))


def test_toy_views_are_in_path_order() -> None:
    views = toy_views(2, frozenset({"mean"}))
    assert [view.sublayer.name for view in views] == [
        "layer 0 attention",
        "layer 0 mlp",
        "layer 1 attention",
        "layer 1 mlp",
    ]
    for view in views:
        assert view.removal_error.shape == (view.sublayer.units + 1,)
        assert np.all(np.diff(view.removal_error) <= 0)
        assert view.removal_error[0] == pytest.approx(view.output_energy)
        assert torch.all(view.unit_scores.diff() <= 0)
        assert view.stats.mean is not None
        assert view.stats.square is None
        assert view.loss_increase is None


def test_toy_views_estimate_the_loss_where_output_gradients_are_asked_for() -> None:
    for view in toy_views(2, frozenset({"output_gradient"})):
        assert view.stats.output_gradient is not None
        assert view.stats.output_gradient.shape == (16, 16)
        assert torch.linalg.eigvalsh(view.stats.output_gradient).min() > 0
        assert view.loss_increase is not None
        assert view.loss_increase.shape == (view.sublayer.units + 1,)
        assert np.all(np.diff(view.loss_increase) < 0)
        assert view.loss_increase[-1] == 0
