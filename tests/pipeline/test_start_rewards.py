"""What the allocation that a search started from earns on the text of the search's updates."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ffgym.config.tables import RunConfig
from ffgym.envs.schedule import Schedule
from ffgym.envs.vector import PruningVectorEnv
from ffgym.heuristics.uniform import Uniform
from ffgym.pipeline.compare import MEASURED_TEXTS, start_rewards
from ffgym.pipeline.task import Task
from ffgym.report.progress import Reporter

REPORTER = Reporter(Console(file=io.StringIO()))


def searched(env: Any, *, actions: float, updates: int, seed: int = 0, num_envs: int = 2, **options: bool) -> Any:
    """A search that always proposes the same importance."""
    vector = PruningVectorEnv(env, Schedule(target=0.3, windows=2), num_envs=num_envs, token_budget=10**6, **options)
    vector.reset(seed=seed)
    for _ in range(updates):
        vector.step(np.full(vector.action_space.shape, actions, np.float32))
    return SimpleNamespace(history=tuple(vector.history))


@pytest.fixture
def task(make_env: Callable[..., Any]) -> Any:
    env = make_env(sparsity=0.3)
    start = np.zeros(len(env.budget.sublayers), np.float32)
    config = RunConfig.model_validate({"prior": {"name": "none"}})
    return SimpleNamespace(env=env, config=config, project=lambda _, __, target: env.budget.project(start, target))


def test_a_search_that_stays_where_it_started_earns_exactly_that(task: Any) -> None:
    found = searched(task.env, actions=0.0, updates=5)
    (rewards,) = start_rewards(task, [found], REPORTER)
    assert rewards == [episode.reward for episode in found.history]
    assert len(set(rewards)) == 5, "every update has text of its own"


def test_a_heuristic_is_asked_once_for_a_target(
    task: Any, prepared_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take seconds: an eigendecomposition of every weight."""
    asked: list[float] = []
    once = Uniform.importance
    monkeypatch.setattr(Uniform, "importance", lambda self, views: asked.append(self.target) or once(self, views))
    nothing: Any = None
    whole = Task(task.config, nothing, nothing, prepared_llama, task.env, nothing, {})
    for target in (0.3, 0.3, 0.2):
        whole.project("uniform", {}, target)
    assert asked == [0.3, 0.2]


def test_every_pair_is_compared_on_its_own_text(task: Any) -> None:
    found = searched(task.env, actions=0.0, updates=2, num_envs=8, pair_text=True)
    (rewards,) = start_rewards(task, [found], REPORTER)
    assert rewards == [episode.reward for episode in found.history]
    assert len(set(rewards[:8])) == 4


def test_another_search_is_compared_where_its_text_is_the_same(task: Any) -> None:
    found, same = searched(task.env, actions=0.0, updates=3), searched(task.env, actions=0.9, updates=4)
    rewards = start_rewards(task, [found, same, searched(task.env, actions=0.0, updates=3, seed=1)], REPORTER)
    assert rewards[0] == rewards[1][:6]
    assert np.isfinite(rewards[0]).all()
    assert np.isnan(rewards[1][6:] + rewards[2]).all()


def test_a_long_search_is_measured_at_some_updates_from_first_to_last(task: Any) -> None:
    (rewards,) = start_rewards(task, [searched(task.env, actions=0.0, updates=40)], REPORTER)
    known = np.flatnonzero(np.isfinite(rewards)) // 2
    assert MEASURED_TEXTS <= len(set(known)) < 40, "more only where updates happen to share their text"
    assert {0, 39} <= set(known)
