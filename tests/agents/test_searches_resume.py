"""Every agent on a pruned tiny model, through the whole search: interrupted anywhere, it goes on bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ffgym.criteria.wanda import Wanda
from ffgym.envs.pruning_env import PruningEnv
from ffgym.envs.schedule import Schedule
from ffgym.plugins import manager
from ffgym.prepare.paths import prepare
from ffgym.pruning.budget import Budget
from ffgym.rewards.perplexity import Perplexity
from ffgym.search.loop import search_front
from ffgym.testing.models import tiny_model

SETTINGS = {"episodes": 24, "episodes_per_update": 4, "finalist_count": 3}


@pytest.fixture(scope="module")
def env():
    prepared = prepare(tiny_model("llama"), Wanda(), torch.randint(3, 128, (8, 32)), ridge=0.01)
    windows = torch.randint(3, 128, (12, 32), generator=torch.Generator().manual_seed(1))
    return PruningEnv(prepared.prunable, Perplexity(), windows, Budget(prepared.prunable.sublayers), reserved=4)


def found(env, name, log):
    agent = manager.create("agent", name)
    agent.prior_mean = np.linspace(-0.5, 0.5, env.action_space.shape[0]).astype(np.float32)
    schedule = Schedule(0.2, env.episode_windows, sparsity="cubic")
    (found,) = search_front(env, agent, schedule, [env.sparsity], **SETTINGS, seed=3, log=log)
    return found


@pytest.mark.parametrize("name", ["ppo", "evolution", "cma-es", "evopress"])
def test_an_interrupted_search_goes_on_where_it_stopped(env, name, tmp_path):
    log = tmp_path / "episodes.jsonl"
    whole = found(env, name, log)
    assert len(whole.history) == 24
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:10]))
    again = found(env, name, log)
    assert len(log.read_text().splitlines()) == len(lines)
    assert [e.action.tolist() for e in again.history] == [e.action.tolist() for e in whole.history]
    assert again.best.allocation == whole.best.allocation
    assert [episode.reward for episode in again.history] == [episode.reward for episode in whole.history]
