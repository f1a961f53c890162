"""The adapter says to Stable-Baselines3 what the vector environment says to us."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from stable_baselines3 import A2C

from ffgym.envs.sb3 import SB3VecEnv
from ffgym.errors import ConfigError, DataError
from ffgym.testing.toys import QuadraticEnv


def toy(tokens=1000, noise=0.1):
    return QuadraticEnv(num_envs=4, dimensions=6, tokens=tokens, noise=noise)


def test_rewards_and_observations_are_those_of_the_vector_environment():
    ours, theirs = toy(), SB3VecEnv(toy())
    theirs.seed(3)
    first, _ = ours.reset(seed=3)
    np.testing.assert_array_equal(theirs.reset(), first)
    for _ in range(3):
        actions = ours.action_space.sample()
        following, rewards, _, _, _ = ours.step(actions)
        observations, theirs_rewards, dones, infos = theirs.step(actions)
        np.testing.assert_array_equal(observations, following)
        np.testing.assert_array_equal(theirs_rewards, rewards.astype(np.float32))
        assert dones.all()
        assert all(info["terminal_observation"].shape == (2,) for info in infos)
        assert not any(info["TimeLimit.truncated"] for info in infos)


def test_an_episodes_info_says_what_came_of_it():
    ours, theirs = toy(), SB3VecEnv(toy())
    ours.reset(seed=3)
    theirs.seed(3)
    theirs.reset()
    ours.slope_episodes = theirs.env.slope_episodes = ours.num_envs
    actions = ours.action_space.sample()
    final = ours.step(actions)[4]["final_info"]
    infos = theirs.step(actions)[3]
    np.testing.assert_array_equal([info["slopes"] for info in infos], final["slopes"])


def test_actions_are_offsets_from_the_centre_and_reach_every_importance():
    centre = np.array([1.0, -1.0, 0.5, -0.3, 0.1, 0.0])
    env = SB3VecEnv(toy(), centre)
    np.testing.assert_allclose(env.importances(np.zeros(6)), centre, rtol=1e-6)
    np.testing.assert_allclose(env.importances(env.action_space.low), np.full(6, -1.0), rtol=1e-6)
    np.testing.assert_allclose(env.importances(env.action_space.high), np.full(6, 1.0), rtol=1e-6)
    np.testing.assert_array_equal(env.importances(np.full(6, 9.0)), np.full(6, 1.0))


def test_a_centre_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"centre has shape \(5,\), and importances have shape \(6,\)") as refused:
        SB3VecEnv(toy(), np.full(5, 0.5))
    assert "for each sublayer" in refused.value.hint


@pytest.mark.parametrize("shape", [(3, 6), (5, 6), (4, 5), (6,)])
def test_actions_of_another_shape_are_refused_before_they_are_measured(shape):
    env = SB3VecEnv(toy())
    env.reset()
    with pytest.raises(DataError, match=r"actions have shape .*, not \(4, 6\)"):
        env.step(np.zeros(shape, np.float32))
    assert env.env.tokens_spent == 0


def test_a2c_steps_it():
    env = toy()
    A2C("MlpPolicy", SB3VecEnv(env), n_steps=1, device="cpu", seed=0).learn(40)
    assert env.tokens_spent == 40


def test_attributes_and_methods_are_the_vector_environments():
    env = SB3VecEnv(toy())
    assert env.get_attr("tokens_left") == [1000] * 4
    assert env.get_attr("tokens_left", indices=[0, 2]) == [1000] * 2
    env.set_attr("noise", 0.0)
    assert env.get_attr("noise", indices=1) == [0.0]
    assert len(env.env_method("value", np.zeros((1, 6)))) == 4
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False] * 4
    env.close()


def test_other_autoreset_modes_are_refused():
    env = gymnasium.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync")
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    with pytest.raises(ConfigError, match="SAME_STEP"):
        SB3VecEnv(env)
