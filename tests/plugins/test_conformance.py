"""The conformance tests catch what is wrong (the built-ins pass them); the toys have the optimum they claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from ffgym.agents.evolution import Evolution
from ffgym.agents.random_search import RandomSearch
from ffgym.costs.params import Params
from ffgym.criteria.magnitude import Magnitude
from ffgym.errors import PluginError
from ffgym.heuristics.uniform import Uniform
from ffgym.measure.metrics import Loss
from ffgym.models.built_in_families import Llama
from ffgym.plugins.bases import OnUpdate, Plugin, PluginConfig
from ffgym.rewards.perplexity import Perplexity
from ffgym.testing.conformance import (
    AgentConformance,
    CriterionConformance,
    HeuristicConformance,
    PluginConformance,
    ResourceConformance,
    RewardConformance,
)
from ffgym.testing.toys import QuadraticEnv, RuggedEnv, SeparableEnv, ToyEnv, toy_views
from ffgym.types import LayerStats, SublayerView, Update


def unconfigured(self: Evolution, config: PluginConfig | None = None) -> None:
    Evolution.__init__(self)


def centred(self: Evolution, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
    """Takes the mean off the rewards where they are."""
    rewards -= rewards.mean()
    return Evolution.tell(self, observations, actions, rewards)


class Lax(PluginConfig, extra="ignore"):
    """Options that nobody checks."""


class Named(PluginConfig):
    """An option that would be taken for the plugin's name."""

    name: str = "me"


class Price(PluginConfig):
    """An option that is right for most kinds."""

    price: float = 2.0


class Mistyped(PluginConfig):
    """A default that is no number."""

    power: float = "two"  # type: ignore[assignment]


def clears_statistics(self: Magnitude, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    assert stats.square is not None
    stats.square.data.zero_()
    return weight


def clears_weights(self: Uniform, views: Sequence[SublayerView]) -> np.ndarray:
    views[2].weight.numpy().fill(0)
    return np.zeros(len(views))


# By class: what a subclass of it gets wrong, and the test of its suite that catches that.
WRONG: dict[type[Plugin], list[tuple[str, dict[str, Any]]]] = {
    Magnitude: [
        ("test_has_a_name", {"name": "a/b"}),
        ("test_its_options_can_be_given", {"Config": dict}),
        ("test_its_options_can_be_given", {"Config": Named}),
        ("test_its_options_can_be_given", {"Config": Mistyped, "__init__": lambda self, config=None: None}),
        ("test_its_methods_take_what_ffgym_passes", {"score": lambda self, weight: weight}),
        ("test_its_attributes_have_their_types", {"needs": "square"}),
        ("test_its_attributes_have_their_types", {"edition": "new"}),
        ("test_its_attributes_have_their_types", {"edition": 0}),
        ("test_scores_keep_the_contract", {"needs": frozenset({"sqare"})}),
        ("test_leaves_what_it_is_given_unchanged", {"needs": frozenset({"square"}), "score": clears_statistics}),
        ("test_config_refuses_unknown_keys", {"Config": Lax}),
        ("test_scores_keep_the_contract", {"score": lambda self, weight, stats: stats.square}),  # not asked for
        ("test_same_input_same_scores", {"score": lambda self, weight, stats: torch.rand(weight.shape[1])}),
        (
            "test_scores_follow_a_permutation_of_channels",
            {"score": lambda self, weight, stats: torch.arange(weight.shape[1])},
        ),
    ],
    Uniform: [
        ("test_has_a_name", {"name": "none"}),
        ("test_leaves_what_it_is_given_unchanged", {"importance": clears_weights}),
        ("test_importances_keep_the_contract", {"importance": lambda self, views: np.zeros(9)}),
        (
            "test_same_input_same_importances",
            {"importance": lambda self, views: np.random.uniform(-1, 1, len(views))},
        ),
        (
            "test_takes_weights_in_bfloat16",
            {"importance": lambda self, views: [float(np.tanh(view.weight.numpy()[0, 0])) for view in views]},
        ),
    ],
    Perplexity: [
        ("test_its_attributes_have_their_types", {"tasks": "arc_easy"}),
        ("test_says_what_it_is_made_of", {"needs": frozenset({"KL"})}),
        ("test_says_what_it_is_made_of", {"examples": 0}),
        ("test_says_what_it_is_made_of", {"worst": -math.inf}),
        ("test_says_what_it_is_made_of", {"falls_with": "KL"}),
        ("test_says_what_it_is_made_of", {"falls_with": "kl"}),  # which it does not need
        (
            "test_objectives_have_fixed_names_and_finite_values",
            {"objectives": lambda self, pruned, dense: {"ratio (%)": 1.0}},
        ),
        (
            "test_objectives_have_fixed_names_and_finite_values",
            {"objectives": lambda self, pruned, dense: {f"at {pruned.loss:.0f}": 1.0}},
        ),
        ("test_finite_for_every_finite_loss", {"__call__": lambda self, pruned, dense: -pruned.perplexity}),
        ("test_same_input_same_reward", {"__call__": lambda self, pruned, dense: pruned.kl}),  # not asked for
        ("test_lower_loss_never_earns_less", {"__call__": lambda self, pruned, dense: 1 - 1 / (1 + pruned.loss)}),
    ],
    Evolution: [
        ("test_takes_its_config", {"__init__": unconfigured}),
        ("test_reports_every_update", {"tell": lambda self, *_: {"a/../b": 1.0}}),
        ("test_leaves_what_it_is_told_unchanged", {"tell": centred}),
        ("test_spends_the_budget", {"learn": lambda self, env, *, seed, on_update: env.reset(seed=seed)}),
        ("test_same_seed_same_search", {"ask": lambda self, seen: np.random.uniform(-1, 1, (len(seen), 6))}),
        ("test_takes_up_a_state", {"load_state": lambda self, state: None}),
        ("test_state_is_plain_data", {"state": lambda self: {"rng": np.random.default_rng()}}),
        ("test_recommends_importances", {"recommend": lambda self, observation: [np.full(6, 3.0)]}),
    ],
    Params: [
        ("test_leaves_the_model_unchanged", {"rest": lambda self, model, _: model.lm_head.weight.data.zero_().numel()}),
        ("test_leaves_the_model_unchanged", {"rest": lambda self, model, _: len(list(model.train().children()))}),
    ],
    Loss: [
        ("test_its_options_can_be_given", {"Config": Price}),  # a metric has none
        ("test_its_methods_take_what_ffgym_passes", {"scores": lambda self, model, tokenizer, *, limit: []}),
    ],
    Llama: [("test_its_attributes_have_their_types", {"mlp_producers": "mlp.up_proj"})],
}
SUITES: dict[type[Plugin], type[PluginConformance]] = {
    Magnitude: CriterionConformance,
    Uniform: HeuristicConformance,
    Perplexity: RewardConformance,
    Evolution: AgentConformance,
    Params: ResourceConformance,
}


@pytest.mark.parametrize(
    ("base", "test", "members"),
    [(base, test, members) for base, cases in WRONG.items() for test, members in cases],
)
def test_what_is_wrong_is_caught(base: type[Plugin], test: str, members: dict[str, Any]) -> None:
    """A plugin that is as it should be but for one thing."""
    plugin = type("Broken", (base,), {"name": "broken", **members})
    suite = type("Suite", (SUITES.get(base, PluginConformance),), {"make": lambda self: plugin()})()
    with pytest.raises((AssertionError, PluginError, pytest.fail.Exception)):
        getattr(suite, test)(*[4] * (test == "test_importances_keep_the_contract"))  # layers


def test_more_recommendations_than_announced_are_caught() -> None:
    """Plans and progress count on their number."""
    surplus = type("Surplus", (Evolution,), {"recommend": lambda self, observation: [np.zeros(6)] * 4})
    suite = type("Suite", (AgentConformance,), {"make": lambda self: surplus()})()
    with pytest.raises(AssertionError, match="more than `recommendations`"):
        suite.test_recommends_importances()


def test_a_state_is_taken_up_as_a_run_has_stored_it() -> None:
    class Arrays(Evolution):
        """Relies on an array, and JSON has lists."""

        name = "arrays"

        def load_state(self, state: Mapping[str, Any]) -> None:
            self._parents = state["parents"].reshape(-1, 6)

        def state(self) -> dict[str, Any]:
            assert self._parents is not None
            return {"parents": self._parents}

    suite = type("Suite", (AgentConformance,), {"make": lambda self: Arrays()})()
    with pytest.raises(AttributeError, match="'list' object has no attribute 'reshape'"):
        suite.test_takes_up_a_state()


def test_a_criterion_that_takes_vectors_for_float32_is_caught() -> None:
    """In a run they are float64."""

    class Mixed(Magnitude):
        name = "mixed"
        needs = frozenset({"square"})

        def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
            assert stats.square is not None
            return weight.square() @ stats.square.diag()

    suite = type("Suite", (CriterionConformance,), {"make": lambda self: Mixed()})()
    with pytest.raises(PluginError, match="dtype"):
        suite.test_scores_keep_the_contract()


# the toys


def test_toys_tell_an_agent_what_the_real_environment_tells() -> None:
    class Curious(Evolution):
        """Looks at all that a batch agent may look at."""

        name = "curious"

        def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
            super().begin(dimensions=dimensions, batch=batch, seed=seed)
            assert self.units is not None
            assert self.coarse is not None
            assert self.units.shape == self.coarse.shape == (dimensions,)

        def tell(
            self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray, kept: np.ndarray | None = None
        ) -> dict[str, float]:
            assert kept is not None
            assert kept.shape == actions.shape
            return {"kept": float((kept / self.units).mean())} | super().tell(observations, actions, rewards)

    suite = type("Suite", (AgentConformance,), {"make": lambda self: Curious()})()
    suite.test_reports_every_update()


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


@pytest.mark.parametrize("seed", [np.int64(4), [4, 9], [4, None]])
def test_toys_take_a_seed_in_every_form_that_the_real_environment_takes(seed: Any) -> None:
    rewards = []
    for given in (4, seed):
        env = QuadraticEnv(num_envs=2, dimensions=3, tokens=2, noise=0.5)
        env.reset(seed=given)
        rewards.append(env.step(np.zeros((2, 3)))[1])
    np.testing.assert_array_equal(rewards[0], rewards[1])


def test_toys_tell_the_rewards_and_the_slopes_that_are_asked_for() -> None:
    env = SeparableEnv(num_envs=3, dimensions=4, tokens=6)
    _, rewards, _, _, infos = env.step(np.zeros((3, 4)))
    assert set(infos["final_info"]) == {"kept", "reward"}
    np.testing.assert_array_equal(infos["final_info"]["reward"], rewards)
    env.slope_episodes = 2
    slopes = env.step(np.zeros((3, 4)))[4]["final_info"]["slopes"]
    np.testing.assert_allclose(slopes, np.outer([1, 1, 0], -2 * env.optimum / 4), atol=1e-9)


@pytest.mark.parametrize("asked", [0, 1])
def test_an_agent_that_reads_slopes_has_to_ask_for_them(asked: int) -> None:
    class Steep(RandomSearch):
        """Has a loop of its own, as agents have that are no batch agents."""

        name = "steep"
        slope_episodes = asked

        def learn(self, env: Any, *, seed: int, on_update: OnUpdate) -> None:
            env.reset(seed=seed)
            _, rewards, _, _, infos = env.step(np.zeros((env.num_envs, 6)))
            on_update(Update(0, rewards, {"steepness": float(np.abs(infos["final_info"]["slopes"]).max())}))

    suite = type("Suite", (AgentConformance,), {"make": lambda self: Steep()})()
    with nullcontext() if asked else pytest.raises(KeyError, match="slopes"):
        suite.test_state_is_plain_data()


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
