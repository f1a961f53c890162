"""Both environment checkers accept the pruning environment, and so do those who make it by name."""

from __future__ import annotations

import re
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from gymnasium.utils.env_checker import check_env as check_with_gymnasium
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_with_sb3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import ffgym.envs
from ffgym.criteria.wanda import Wanda
from ffgym.envs.pruning_env import PruningEnv
from ffgym.envs.vector import PruningVectorEnv
from ffgym.errors import DataError, FFGymError, UnknownNameError
from ffgym.pipeline.make_env import make_pruning_env
from ffgym.prepare.paths import prepare
from ffgym.pruning.budget import Budget
from ffgym.rewards.perplexity import Perplexity
from ffgym.testing.models import tiny_model

SHORT = {"episode_tokens": 64, "final_tokens": 64}


def tiny_env(family):
    prepared = prepare(tiny_model(family), Wanda(), torch.randint(3, 128, (8, 32)), ridge=0.01)
    windows = torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(1))
    return PruningEnv(prepared.prunable, Perplexity(), windows, Budget(prepared.prunable.sublayers))


def check(env):
    """Have both checkers look at an environment without wrappers; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_with_gymnasium(env, skip_render_check=True)
        check_with_sb3(env)


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_both_checkers_pass_without_a_warning(family):
    check(tiny_env(family))


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"prune": {"uniform": True, "align": 16}},
        {"reward": {"name": "kl"}},
        {"reward": {"name": "multi-objective"}},
    ],
    ids=["plain", "one shape for all layers", "kl", "multi-objective"],
)
def test_so_does_a_configured_run(tiny_run, tables):
    check(make_pruning_env(tiny_run, **tables))


def test_gymnasium_makes_the_environment_by_name(tiny_run):
    env = gymnasium.make(ffgym.envs.ENV_ID, config=tiny_run, prune={"sparsity": 0.3})
    assert "<PruningEnv: LlamaForCausalLM, 6 sublayers, 30.0% sparsity (params)>" in repr(env)
    observation, _ = env.reset(seed=0)
    np.testing.assert_allclose(observation, [0.3, 1.0])
    action = np.zeros(env.action_space.shape, np.float32)
    _, reward, terminated, truncated, info = env.step(action)
    assert isinstance(reward, float)
    assert (terminated, truncated) == (True, False)
    assert info["sparsity"] >= 0.3
    env.reset(seed=0)
    assert env.step(action)[1] == reward, "the same seed and action give the same bits"
    env.close()


def test_a_first_reset_that_is_refused_breaks_nothing(tiny_run):
    """As it did while Gymnasium's own passive checker was around it, which keeps what the first reset returned."""
    env = gymnasium.make(ffgym.envs.ENV_ID, config=tiny_run)
    with pytest.raises(UnknownNameError, match="Did you mean 'sparsity'"):
        env.reset(options={"sparsty": 0.3})
    for _ in range(2):
        env.reset(seed=0)
        assert env.step(np.zeros(env.action_space.shape, np.float32))[2] is True


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"foo": {}}, "unknown table or key 'foo'"),
        ({"prnue": {"sparsity": 0.3}}, "Did you mean 'prune'"),
        ({"prune": {"sparsty": None}}, "Did you mean 'sparsity'"),
        ({"render_mode": "rgb_arry"}, "Did you mean 'rgb_array'"),
    ],
)
@pytest.mark.parametrize("make", [gymnasium.make, gymnasium.make_vec])
def test_what_make_does_not_know_is_refused(make, options, said):
    with pytest.raises(FFGymError, match=re.escape(said)):
        make(ffgym.envs.ENV_ID, **options)


@pytest.mark.parametrize("num_envs", [0, -1])
def test_an_update_of_no_episodes_is_refused_before_a_model_is_looked_for(num_envs):
    with pytest.raises(DataError, match=f"num_envs is {num_envs}: an update needs episodes"):
        gymnasium.make_vec(ffgym.envs.ENV_ID, num_envs=num_envs, model={"name": "missing"})


def test_make_vec_makes_one_model_with_shared_text_and_loses_no_step(tiny_run):
    envs = gymnasium.make_vec(ffgym.envs.ENV_ID, num_envs=3, render_mode="rgb_array", **tiny_run)
    assert isinstance(envs, PruningVectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)
    envs.reset(seed=0)
    actions = np.zeros(envs.action_space.shape, np.float32)
    for _ in range(2):
        _, rewards, terminated, _, infos = envs.step(actions)
        assert terminated.all()
        assert (rewards == rewards[0]).all(), "the same action on the same text"
        assert rewards[0] > 0
        np.testing.assert_array_equal(infos["episode"]["r"], rewards)
    assert len(envs.render()) == 3


def test_the_token_budget_ends_nothing(tiny_run):
    envs = gymnasium.make_vec(ffgym.envs.ENV_ID, num_envs=2, **{**tiny_run, "search": {"episodes": 2, **SHORT}})
    envs.reset(seed=0)
    actions = np.zeros(envs.action_space.shape, np.float32)
    envs.step(actions)
    assert envs.tokens_left == 0
    assert envs.step(actions)[1].shape == (2,)


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_stable_baselines3_makes_its_own_vector_environment(tiny_run, vec_env_cls):
    count = 2 if vec_env_cls is DummyVecEnv else 1  # each process imports torch
    name = f"ffgym.envs:{ffgym.envs.ENV_ID}"  # also where a process has not imported ffgym
    envs = make_vec_env(name, n_envs=count, env_kwargs=tiny_run, vec_env_cls=vec_env_cls)
    try:
        PPO("MlpPolicy", envs, n_steps=2, batch_size=2, seed=0, device="cpu").learn(4)
        assert envs.render().shape[2] == 3
    finally:
        envs.close()
