"""Slopes as a control variate: right whatever they say, and less noisy where they say something."""

from __future__ import annotations

import numpy as np
import pytest

from ffgym.agents.exploration import depth_covariance, square_root
from ffgym.agents.pathwise import Pathwise
from ffgym.agents.reinforce import Reinforce
from ffgym.errors import ConfigError, PluginError
from ffgym.plugins import manager
from ffgym.testing.conformance import AgentConformance
from ffgym.testing.toys import BudgetRangeEnv, QuadraticEnv, RuggedEnv, SeparableEnv

DIMENSIONS = 8
COVARIANCE = 0.04 * depth_covariance(DIMENSIONS, smooth=0.5, length=0.3)
ROOT = square_root(COVARIANCE)
OBSERVATION = np.array([0.2, 1.0], dtype=np.float32)


class TestReinforceWithSlopes(AgentConformance):
    def make(self):
        return Reinforce(Reinforce.Config(slopes=True))


def steps_of(rng, episodes):
    half = rng.standard_normal((episodes // 2, DIMENSIONS)) @ ROOT
    return np.concatenate([half, -half])


def test_a_linear_reward_is_known_without_noise():
    """Rewards that slopes explain leave nothing to sampling: the gradient is exact from any two episodes."""
    rng = np.random.default_rng(0)
    slope = rng.standard_normal(DIMENSIONS)
    steps = steps_of(rng, 2)
    rewards = 5.0 - 0.3 * steps @ slope
    pathwise = Pathwise()
    found = pathwise.gradient(rewards, steps, slope, COVARIANCE)
    assert pathwise.beta == pytest.approx(-0.3)
    assert pathwise.explained == pytest.approx(1.0)
    np.testing.assert_allclose(found, -0.3 * COVARIANCE @ slope / rewards.std(), rtol=1e-9)


def test_it_tends_to_the_true_gradient_also_where_slopes_are_wrong():
    """Half right, half made up: E[A (a - mu)] = s^2 C g / std for a linear reward with gradient g."""
    rng = np.random.default_rng(1)
    truth = rng.standard_normal(DIMENSIONS)
    slope = -truth + 1.5 * rng.standard_normal(DIMENSIONS)
    pathwise, found = Pathwise(), []
    for _ in range(4000):
        steps = steps_of(rng, 6)
        found.append(pathwise.gradient(steps @ truth + 0.1 * rng.standard_normal(6), steps, slope, COVARIANCE))
    assert 0.1 < pathwise.explained < 0.9
    wanted = COVARIANCE @ truth / np.sqrt(truth @ COVARIANCE @ truth + 0.01)
    np.testing.assert_allclose(np.mean(found, axis=0), wanted, atol=0.05 * np.abs(wanted).max() + 0.01)


def test_it_varies_less_than_plain_reinforce_where_slopes_are_about_right():
    rng = np.random.default_rng(2)
    truth = rng.standard_normal(DIMENSIONS)
    pathwise, with_slopes, plain = Pathwise(), [], []
    for _ in range(500):
        steps = steps_of(rng, 4)
        rewards = steps @ truth + 0.05 * rng.standard_normal(4)
        slope = -truth + 0.3 * rng.standard_normal(DIMENSIONS)
        with_slopes.append(pathwise.gradient(rewards, steps, slope, COVARIANCE))
        plain.append((rewards - rewards.mean()) @ steps / len(rewards) / rewards.std())
    assert np.var(with_slopes, axis=0).sum() < 0.25 * np.var(plain, axis=0).sum()


def test_slopes_that_mislead_are_not_followed():
    rng = np.random.default_rng(3)
    truth = rng.standard_normal(DIMENSIONS)
    pathwise = Pathwise()
    for _ in range(50):
        steps = steps_of(rng, 6)
        pathwise.gradient(steps @ truth, steps, truth, COVARIANCE)  # the wrong sign: less loss, less reward
    assert pathwise.beta == 0.0
    assert pathwise.explained == 0.0


def test_equal_rewards_move_nothing():
    rng = np.random.default_rng(4)
    found = Pathwise().gradient(np.ones(4), steps_of(rng, 4), np.ones(DIMENSIONS), COVARIANCE)
    np.testing.assert_array_equal(found, np.zeros(DIMENSIONS))


def regret(problem, seed, tokens=120, **options):
    agent = Reinforce(Reinforce.Config(**options))
    env = problem(num_envs=5, dimensions=6, tokens=tokens, noise=0.02)
    agent.learn(env, seed=seed, on_update=lambda update: None)
    return 1 - env.value(agent.recommend(OBSERVATION)[0][None] - env.optimum)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("problem", "distance"), [(SeparableEnv, 0.03), (QuadraticEnv, 0.035), (RuggedEnv, 0.13)])
def test_comes_close_to_a_known_optimum_on_half_the_episodes(problem, distance, seed):
    assert regret(problem, seed, slopes=True) < distance


def test_follows_the_optimum_over_a_range_of_budgets():
    agent = Reinforce(Reinforce.Config(slopes=True))
    env = BudgetRangeEnv(num_envs=5, dimensions=6, tokens=240)
    agent.budgets = env.budgets
    agent.learn(env, seed=0, on_update=lambda update: None)
    for sparsity in (0.1, 0.3, 0.5):
        (mean,) = agent.recommend(np.array([sparsity, 1.0], np.float32))
        assert np.abs(mean - env.optimum_at(sparsity)).max() < 0.15


def test_the_first_episode_of_every_update_is_the_mean():
    env = SeparableEnv(num_envs=5, dimensions=6, tokens=15)
    agent = Reinforce(Reinforce.Config(slopes=True))
    agent.prior_mean = np.full(6, 0.25, np.float32)
    asked, step = [], env.step
    env.step = lambda actions: asked.append(np.array(actions)) or step(actions)
    agent.learn(env, seed=0, on_update=lambda update: None)
    np.testing.assert_allclose(asked[0][0], 0.25)
    np.testing.assert_allclose(asked[0][1:3] - 0.25, 0.25 - asked[0][3:5], atol=1e-6)


def test_an_environment_without_slopes_is_searched_without():
    env = SeparableEnv(num_envs=8, dimensions=6, tokens=240)
    step = env.step

    def without(actions):
        *rest, infos = step(actions)
        return *rest, {key: value for key, value in infos.items() if "final_info" not in key}

    env.step = without
    agent = Reinforce(Reinforce.Config(slopes=True))
    agent.learn(env, seed=0, on_update=lambda update: None)
    assert 1 - env.value(agent.recommend(OBSERVATION)[0][None] - env.optimum)[0] < 0.05


def test_updates_too_small_for_slopes_are_refused():
    with pytest.raises(ConfigError, match=r"search\.episodes_per_update is 2"):
        Reinforce(Reinforce.Config(slopes=True)).check_batch(2)
    Reinforce(Reinforce.Config(slopes=True)).check_batch(3)
    Reinforce().check_batch(1)


@pytest.mark.parametrize("kind", ["rank", "leave-one-out"])
def test_slopes_need_standardised_advantages(kind):
    with pytest.raises((ConfigError, PluginError), match="slopes need advantage = 'standard'"):
        manager.create("agent", "reinforce", {"slopes": True, "advantage": kind})
