"""The choice among finalists: who competes, and what they are measured on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from made_up_episodes import Opinionated, episode
from measured_alone import Recording

from ffgym.agents.random_search import RandomSearch
from ffgym.search.finals import (
    Candidate,
    by_standing,
    finalists,
    near,
    objective_standings,
    run_finals,
    with_every_shape,
)
from ffgym.types import Evaluation


@pytest.fixture
def env(make_env):
    return make_env(sparsity=0.3)


class TestStanding:
    def test_compares_within_updates(self):
        """0.9 is the worst of an easy subset, 0.4 the best of a hard one."""
        history = [episode(0, 0, 0.95), episode(1, 0, 0.9), episode(2, 1, 0.4), episode(3, 1, 0.1)]
        assert [e.index for e in by_standing(history)] == [2, 0, 1, 3]

    def test_only_the_hardest_stage_counts(self):
        history = [
            episode(0, 0, 0.99, sparsity=0.1),
            episode(1, 0, 0.10, sparsity=0.1),
            episode(2, 1, 0.80, fidelity=0.5),
            episode(3, 1, 0.20, fidelity=0.5),
            episode(4, 2, 0.50),
            episode(5, 2, 0.55),
        ]
        assert [e.index for e in by_standing(history)] == [5, 4]
        assert [e.index for e in by_standing(history[:4])] == [2, 3]
        assert [e.index for e in by_standing(history[:2])] == [0, 1]

    def test_an_update_of_one_is_measured_by_all_of_its_stage(self):
        history = [episode(0, 0, 0.5), episode(1, 1, 0.7), episode(2, 2, 0.6)]
        assert [e.index for e in by_standing(history)] == [1, 2, 0]


class TestFinalists:
    def test_recommendations_come_first_and_allocations_are_distinct(self, env):
        a, b = np.linspace(-1, 1, 6), np.linspace(1, -1, 6)
        nearly_a = a + 1e-6
        history = [episode(0, 0, 0.9, action=a), episode(1, 0, 0.5, action=b), episode(2, 0, 0.2, action=np.zeros(6))]
        agent = Opinionated(nearly_a)
        got = finalists(env, agent, history, 5)
        assert [c.origin for c in got] == ["policy", "episode 1", "episode 2"]
        np.testing.assert_allclose(agent.asked, [0.3, 1.0])
        assert all(c.allocation == env.budget.project(c.importance, 0.3) for c in got)
        assert all(c.loss is None for c in got)
        assert [c.origin for c in finalists(env, RandomSearch(), history, 2)] == ["episode 0", "episode 1"]

    def test_episodes_that_were_each_measured_on_other_text_do_not_compete(self, env):
        alone = [episode(i, i, 0.1 * i, action=np.eye(6)[i]) for i in range(4)]
        assert [c.origin for c in finalists(env, Opinionated(np.zeros(6)), alone, 4)] == ["policy"]
        assert [c.origin for c in finalists(env, RandomSearch(), alone, 2)] == ["episode 3", "episode 2"]

    def test_are_projected_at_the_target_whatever_stage_they_were_found_at(self, env):
        got = finalists(env, RandomSearch(), [episode(0, 0, 0.9, sparsity=0.05)], 3)
        assert got[0].allocation.sparsity >= 0.3

    def test_the_least_loss_wins_and_a_broken_one_comes_last_in_one_call(self, env):
        candidates = [
            Candidate(np.zeros(6), env.budget.project(np.roll(np.linspace(-1, 1, 6), i), 0.3), f"episode {i}")
            for i in range(4)
        ]
        losses = {c.allocation.kept: loss for c, loss in zip(candidates, [2.0, math.nan, 1.0, 3.0], strict=True)}
        losses[env.dense_units] = 0.5

        class Known:
            def measure(self, requests, on_progress=None):
                return [Evaluation((losses[request.kept],), 31) for request in requests]

        env.executor = recording = Recording(Known())
        got, dense, tokens = run_finals(env, candidates, 170, seed=0)
        assert [c.origin for c in got] == ["episode 2", "episode 0", "episode 3", "episode 1"]
        (call,) = recording.calls
        assert len({request.windows for request in call}) == 1, "all on the same windows"
        assert len(call[0].windows) == 5
        assert tokens == 4 * 5 * 32
        assert dense == 0.5

    def test_more_tokens_than_the_split_has_means_all_of_it(self, env):
        candidates = finalists(env, RandomSearch(), [episode(i, 0, i / 3, action=np.eye(6)[i]) for i in range(3)], 3)
        _, _, tokens = run_finals(env, candidates, 10**6, seed=0)
        assert tokens == len(candidates) * 12 * 32


class TestShapes:
    def test_the_candidates_keep_their_place_and_what_is_added_says_so(self, uniform_env):
        first, second = uniform_env.budget.shapes(0.3)
        mine = Candidate(uniform_env.budget.importance(second.kept), second, "policy")
        both = with_every_shape(uniform_env, [mine])
        assert both[0] is mine
        assert [(c.allocation, c.origin) for c in both[1:]] == [(first, "shape")]

    def test_with_layers_of_their_own_nothing_is_added(self, env):
        candidate = Candidate(np.zeros(6, np.float32), env.budget.project(np.zeros(6), 0.3), "policy")
        assert with_every_shape(env, [candidate]) == [candidate]


class TestNear:
    def test_takes_what_is_in_reach_or_else_the_nearest_update(self):
        history = [episode(i, i // 2, 0.5, sparsity=0.1 + 0.04 * (i // 2)) for i in range(10)]
        assert [e.index for e in near(history, 0.2, 0.05)] == [4, 5, 6, 7]
        assert {e.target_sparsity for e in near(history, 0.2, 0.05)} == {0.2}
        assert [e.index for e in near(history, 0.5, 0.05)] == [8, 9]


def aimed(index, update, objectives, kept, **options):
    named = dict(zip("ab", objectives, strict=True))
    return replace(episode(index, update, sum(objectives), **options), objectives=named, kept=kept)


class TestObjectives:
    def test_are_compared_within_updates(self):
        """(0.9, 0.9) is the worst of an easy subset, (0.4, 0.4) the best of a hard one."""
        history = [
            aimed(0, 0, (1.0, 1.0), (1,)),
            aimed(1, 0, (0.9, 0.9), (2,)),
            aimed(2, 1, (0.4, 0.4), (3,)),
            aimed(3, 1, (0.1, 0.1), (4,)),
        ]
        points = {e.kept: point.tolist() for e, point in objective_standings(history)}
        assert points == {
            (1,): pytest.approx([0.05, 0.05]),
            (2,): pytest.approx([-0.05, -0.05]),
            (3,): pytest.approx([0.15, 0.15]),
            (4,): pytest.approx([-0.15, -0.15]),
        }

    def test_an_allocation_that_came_up_twice_counts_with_its_mean(self):
        history = [
            aimed(0, 0, (0.5, 0.1), (1,)),
            aimed(1, 0, (0.3, 0.3), (2,)),
            aimed(2, 1, (0.9, 0.3), (1,)),
            aimed(3, 1, (0.3, 0.3), (3,)),
        ]
        standing = {e.kept: (e.index, point.tolist()) for e, point in objective_standings(history)}
        assert standing[(1,)] == (0, pytest.approx([0.2, -0.05]))

    def test_failed_episodes_and_easier_stages_stay_out(self):
        history = [
            aimed(0, 0, (0.5, 0.5), (1,), sparsity=0.1),
            aimed(1, 1, (0.5, 0.1), (2,)),
            replace(episode(2, 1, 0.0), kept=(3,), failed=True),
        ]
        assert [e.index for e, _ in objective_standings(history)] == [1]
