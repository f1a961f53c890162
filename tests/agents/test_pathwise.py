"""Pathwise goes down the slope: to the optimum of a smooth problem, in the steps that its docstring states."""

from __future__ import annotations

import numpy as np
import pytest

from ffgym.agents.exploration import depth_covariance
from ffgym.agents.pathwise import Pathwise
from ffgym.agents.reinforce import Reinforce
from ffgym.config.toml import load_config
from ffgym.errors import ConfigError
from ffgym.prepare import configured
from ffgym.testing.conformance import AgentConformance
from ffgym.testing.toys import QuadraticEnv, SeparableEnv

OBSERVATION = np.array([0.2, 1.0], dtype=np.float32)


class TestPathwise(AgentConformance):
    def make(self):
        return Pathwise()


def told(agent, slopes, prior=None):
    """An agent that was told of these slopes, one an update."""
    agent.prior_mean = prior
    agent.begin(dimensions=len(slopes[0]), batch=1, seed=0)
    for slope in slopes:
        actions = agent.ask(OBSERVATION[None])
        agent.take_slopes(np.asarray(slope, dtype=np.float64)[None])
        agent.tell(OBSERVATION[None], actions, np.zeros(1))
    return agent


# Where nothing is known, 0, costs 0.165 and 0.135. What moves all importances alike is left alone, as a projection
# would undo it: 0.026 of the first.
@pytest.mark.parametrize(("problem", "distance"), [(SeparableEnv, 0.035), (QuadraticEnv, 0.06)])
def test_comes_close_to_a_known_optimum_in_60_episodes(problem, distance):
    agent, env = Pathwise(), problem(num_envs=1, dimensions=6, tokens=60, noise=0.02)
    agent.learn(env, seed=0, on_update=lambda update: None)
    assert 1 - env.value(agent.recommend(OBSERVATION)[0][None] - env.optimum)[0] < distance


def test_the_steps_are_those_of_the_formula():
    slopes = np.random.default_rng(0).standard_normal((3, 6))
    agent = told(Pathwise(), slopes)
    C = depth_covariance(6, smooth=0.5)
    means = [np.zeros(6)]
    for t in range(1, 4):
        squares = (slopes[:t] ** 2).mean(axis=0)
        # Layers 0, 1, 2 of one kind are every other sublayer; beyond an end the end counts again.
        v = [np.sqrt(np.mean(squares[[max(i - 2, i % 2), i, min(i + 2, 4 + i % 2)]])) for i in range(6)]
        means.append(means[-1] - 0.1 / np.sqrt(t) * C @ (slopes[t - 1] / v))
    np.testing.assert_allclose(agent.ask(OBSERVATION[None])[0], means[-1], rtol=1e-6)
    np.testing.assert_allclose(agent.recommend(OBSERVATION)[0], np.mean(means[-2:], axis=0), rtol=1e-6)


def test_what_has_no_slope_stays_where_the_prior_has_it():
    """An attention of a few KV groups: its slope is 0, also where its neighbours' are not."""
    slopes = np.random.default_rng(0).standard_normal((5, 8))
    slopes[:, 0::2] = 0
    prior = np.linspace(-0.5, 0.5, 8, dtype=np.float32)
    agent = told(Pathwise(), slopes, prior)
    found = agent.recommend(OBSERVATION)[0]
    np.testing.assert_array_equal(found[0::2], prior[0::2])
    assert (found[1::2] != prior[1::2]).all()


def test_no_slopes_at_all_move_nothing():
    agent = told(Pathwise(), np.zeros((3, 6)), np.full(6, 0.25, np.float32))
    np.testing.assert_array_equal(agent.recommend(OBSERVATION), np.full((1, 6), 0.25))


def test_a_later_search_starts_from_what_an_earlier_one_recommends():
    first = told(Pathwise(), np.random.default_rng(0).standard_normal((4, 6)))
    second = Pathwise()
    second.load_state(first.state())
    second.begin(dimensions=6, batch=1, seed=0)
    np.testing.assert_allclose(second.ask(OBSERVATION[None])[0], first.recommend(OBSERVATION)[0])


def test_an_environment_without_slopes_is_refused():
    env = SeparableEnv(num_envs=1, dimensions=6, tokens=60)
    step = env.step

    def without(actions):
        *rest, infos = step(actions)
        return *rest, {key: value for key, value in infos.items() if "final_info" not in key}

    env.step = without
    with pytest.raises(ConfigError, match="follows slopes, and this environment measures none"):
        Pathwise().learn(env, seed=0, on_update=lambda update: None)


def test_its_updates_are_one_episode_whatever_the_settings_say():
    assert (Pathwise().update_size(8), Reinforce().update_size(8)) == (1, 8)
    assert (Pathwise().update_cost(8), Reinforce().update_cost(8)) == (4, 8)
    configured.check_agent_fits(load_config(None, ["search.episodes=4"], agent={"name": "pathwise"}))
    with pytest.raises(
        ConfigError, match=r"less than an update of agent 'pathwise', which costs 4 episodes, its slopes included"
    ):
        configured.check_agent_fits(load_config(None, ["search.episodes=3"], agent={"name": "pathwise"}))
