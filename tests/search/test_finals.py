"""The finals: who competes, what they are measured on, and who wins."""

from __future__ import annotations

import math

import numpy as np
import pytest
from made_up_episodes import Opinionated, episode
from measured_alone import Recording

from ffgym.agents.random_search import RandomSearch
from ffgym.rewards.multi_objective import MultiObjective
from ffgym.search.finalists import (
    STARTS,
    Candidate,
    contenders,
    finalists,
    near,
    starting_points,
    with_every_shape,
)
from ffgym.search.finals import expected_tokens, finals_windows, run_finals
from ffgym.types import Evaluation


@pytest.fixture
def env(make_env):
    return make_env(sparsity=0.3)


class TestFinalists:
    def test_recommendations_come_first_and_allocations_are_distinct(self, env):
        a, b = np.linspace(-1, 1, 6), np.linspace(1, -1, 6)
        nearly_a = a + 1e-6
        history = [episode(0, 0, 0.9, action=a), episode(1, 0, 0.5, action=b), episode(2, 0, 0.2, action=np.zeros(6))]
        agent = Opinionated(nearly_a)
        got = finalists(env, agent, history, 5, 0.3)
        assert [c.origin for c in got] == ["policy", "episode 1", "episode 2"]
        np.testing.assert_allclose(agent.asked, [0.3, 1.0])
        assert all(c.allocation == env.budget.project(c.importance, 0.3) for c in got)
        assert all(c.loss is None for c in got)
        assert [c.origin for c in finalists(env, RandomSearch(), history, 2, 0.3)] == ["episode 0", "episode 1"]

    def test_only_the_hardest_stage_counts_and_the_greatest_reward_comes_first(self, env):
        ramp = [(0.99, 0.1, 1.0), (0.8, 0.3, 0.5), (0.5, 0.3, 1.0), (0.55, 0.3, 1.0)]
        history = [
            episode(i, i, reward, sparsity=sparsity, fidelity=fidelity, action=np.eye(6)[i])
            for i, (reward, sparsity, fidelity) in enumerate(ramp)
        ]
        assert [c.origin for c in finalists(env, RandomSearch(), history, 4, 0.3)] == ["episode 3", "episode 2"]

    def test_the_prior_is_one_of_them_unless_the_policy_is_still_there(self, env):
        history = [episode(i, 0, 0.1 * i, action=np.eye(6)[i]) for i in range(4)]
        agent = Opinionated(np.linspace(-1, 1, 6))
        agent.prior_mean = np.linspace(1, -1, 6).astype(np.float32)
        starts = starting_points(env, agent, 0.3)
        origins = [c.origin for c in contenders(env, agent, history, 2, 0.3, None, starts)]
        assert origins == ["policy", "episode 3", "prior"]
        agent.believed = [agent.prior_mean]
        assert [c.origin for c in contenders(env, agent, history, 2, 0.3, None, starts)] == ["policy", "episode 3"]

    def test_the_policy_that_a_search_was_given_is_one_of_them(self, env):
        agent = Opinionated(np.linspace(-1, 1, 6))
        agent.policy_sublayers = tuple(sublayer.name for sublayer in env.budget.sublayers)
        starts = starting_points(env, agent, 0.3)
        assert [c.allocation for c in starts] == [env.budget.project(np.linspace(-1, 1, 6), 0.3)]
        agent.believed = [np.linspace(1, -1, 6)]  # what it has learnt
        got = contenders(env, agent, [episode(0, 0, 0.1, action=np.eye(6)[0])], 2, 0.3, None, starts)
        assert [c.origin for c in got] == ["policy", "episode 0", "given policy"]

    def test_are_projected_at_the_target_whatever_stage_they_were_found_at(self, env):
        got = finalists(env, RandomSearch(), [episode(0, 0, 0.9, sparsity=0.05)], 3, 0.3)
        assert got[0].allocation.sparsity >= 0.3


class TestChoice:
    """Losses by candidate and window are made up; the policy comes first, and the dense model has 0.5."""

    @staticmethod
    def run(env, losses, *, origins, reserved=12, allocations=()):
        rolled = (env.budget.project(np.roll(np.linspace(-1, 1, 6), i), 0.3) for i in range(len(origins)))
        candidates = [Candidate(np.zeros(6), *each) for each in zip(allocations or rolled, origins, strict=True)]
        table = {c.allocation.kept: loss for c, loss in zip(candidates, losses, strict=True)}
        table[env.prunable.dense_units] = lambda window: 0.5

        class Known:
            def measure(self, requests, on_progress):
                on_progress(0.5)
                on_progress(1.0)
                return [Evaluation(tuple(table[r.kept](w) for w in r.windows), 31) for r in requests]

        env.executor = recording = Recording(Known())
        env.reserved = reserved
        shares = []
        found, dense, tokens = run_finals(env, candidates, seed=0, on_progress=shares.append)
        assert dense == 0.5
        assert shares == sorted(shares)
        assert 0 < shares[0] < shares[-2] <= shares[-1] == 1.0
        measured = [(r.kept, r.windows) for call in recording.calls for r in call if r.kept != env.prunable.dense_units]
        assert tokens == 32 * len(measured), "each is measured once on a window"
        return found, measured

    @staticmethod
    def about(loss, spread=0.01):
        return lambda window: loss + spread * math.sin(7 * window)

    def test_luck_does_not_replace_the_policy(self, env):
        """Better on average, by less than it varies."""
        # 0.001 better on average, and 0.1 up or down from window to window
        lucky = lambda window: 1.0 + (0.1 if window % 2 else -0.102)  # noqa: E731
        found, _ = self.run(env, [lambda window: 1.0, lucky], origins=["policy", "episode 3"])
        assert found[0].origin == "policy"

    @pytest.mark.parametrize(("errors", "chosen"), [(1.7, "policy"), (2.3, "episode 3")])
    def test_what_replaces_the_policy_is_better_by_two_standard_errors(self, env, errors, chosen):
        env.reserved = 12
        deciding = finals_windows(env, seed=0)[6:]
        error = 0.01 / math.sqrt(5)  # of the mean of six differences that are 0.01 above and below it in turn
        rival = lambda window: 1.0 - errors * error - 0.01 * (-1) ** (window in deciding[::2])  # noqa: E731
        found, _ = self.run(env, [lambda window: 1.0, rival], origins=["policy", "episode 3"])
        assert found[0].origin == chosen

    def test_of_two_shared_shapes_all_windows_decide(self, uniform_env):
        """Nothing has chosen the other one, so no half has to."""
        uniform_env.reserved = 12
        place = {window: i for i, window in enumerate(finals_windows(uniform_env, seed=0))}
        # 2.5 standard errors of 12 differences that are 0.01 above and below it in turn, and 1.7 of 6 of them
        other = lambda window: 1.0 - 2.5 * 0.01 / math.sqrt(11) - 0.01 * (-1) ** place[window]  # noqa: E731
        shapes = uniform_env.budget.shapes(0.3)
        losses = [lambda window: 1.0, other]
        found, _ = self.run(uniform_env, losses, origins=["policy", "shape"], allocations=shapes)
        assert found[0].origin == "shape"

    def test_a_candidate_that_is_better_on_fresh_windows_does(self, env):
        found, _ = self.run(env, [self.about(1.0), self.about(0.9, 0.02)], origins=["policy", "episode 3"])
        assert [c.origin for c in found] == ["episode 3", "policy"]
        assert found[0].loss < found[1].loss

    def test_of_what_an_agent_recommends_the_best_on_all_windows_is_the_default(self, env):
        """By any difference: none of them was chosen by luck. A fourth is a candidate like others."""
        losses = [self.about(loss) for loss in (1.02, 1.03, 1.01, 0.9, 1.0)]
        found, measured = self.run(env, losses[:3], origins=["policy"] * 3)
        assert len(measured) == 3 * 12
        assert [round(c.loss, 1) for c in found] == [1.0, 1.0, 1.0]
        assert found[0].loss == min(c.loss for c in found)
        found, measured = self.run(env, losses, origins=[*["policy"] * 4, "episode 3"])
        assert round(found[0].loss, 1) == 0.9

    @pytest.mark.parametrize("origin", STARTS)
    def test_no_search_ends_behind_its_start(self, env, origin):
        losses = [self.about(1.1), self.about(1.2, 0.02), self.about(1.0, 0.03)]
        found, _ = self.run(env, losses, origins=["policy", "episode 3", origin])
        assert found[0].origin == origin

    def test_without_a_recommendation_the_best_of_all_is_the_default(self, env):
        losses = [self.about(loss) for loss in (1.2, 1.0, 1.1, 1.3)]
        found, _ = self.run(env, losses, origins=[f"episode {i}" for i in range(4)])
        assert found[0].origin == "episode 1"

    def test_what_chooses_among_candidates_does_not_decide(self, env):
        losses = [self.about(1.0 + 0.1 * i) for i in range(5)]
        found, measured = self.run(env, losses, origins=["policy", *(f"episode {i}" for i in range(4))])
        policy = {windows for kept, windows in measured if kept == found[0].allocation.kept}
        thinned = {windows for kept, windows in measured if kept == found[-1].allocation.kept}
        assert len(policy) == 6
        assert not policy & thinned
        assert [c.loss is None for c in found] == [False, False, True, True, True]

    @pytest.mark.parametrize("recommended", [1, 2, 3])
    @pytest.mark.parametrize("reserved", [12, 5, 2, 1])
    def test_tokens_are_what_was_expected(self, env, recommended, reserved):
        origins = ["policy"] * recommended + [f"episode {i}" for i in range(5 - recommended)] + ["prior"]
        losses = [self.about(1.0 + 0.1 * i) for i in range(6)]
        _, measured = self.run(env, losses, origins=origins, reserved=reserved)
        assert expected_tokens(5, reserved * 32, recommended, reserved) == 32 * len(measured)

    def test_objectives_are_means_over_the_windows_that_the_reward_is_of(self, env):
        env.reward = MultiObjective(MultiObjective.Config(accuracy=0))
        env.prices = {"macs": env.budget}
        losses = [self.about(1.0 + 0.1 * i) for i in range(5)]
        found, measured = self.run(env, losses, origins=["policy", *(f"episode {i}" for i in range(4))])
        assert len(measured) == 4 * 2 + 2 * 4 + 2 * 6, "they are thinned out as with other rewards"
        assert list(found[0].objectives) == ["perplexity_ratio", "macs_saved"]
        assert found[0].reward == pytest.approx(sum(found[0].objectives.values()) / 2)

    def test_a_single_window_measures_all_once_and_replaces_nothing(self, env):
        losses = [self.about(loss) for loss in (1.1, 1.2, 1.0, 0.9)]
        found, measured = self.run(env, losses, origins=["policy", "policy", "episode 3", "prior"], reserved=1)
        assert len(measured) == 4
        assert found[0].origin == "policy"
        assert found[0].loss == pytest.approx(1.1, abs=0.01)

    def test_without_a_window_the_first_is_chosen_as_it_is(self, env):
        first, other = (Candidate(np.zeros(6), env.budget.project(np.eye(6)[i], 0.3), "policy") for i in range(2))
        assert env.reserved == 0
        assert run_finals(env, [first, other], seed=0) == ([first, other], None, 0)

    def test_losses_order_what_rewards_are_too_small_to_tell_apart(self, env):
        losses = [self.about(loss) for loss in (1.0, 1000.0, 900.0)]
        found, _ = self.run(env, losses, origins=["policy", "prior", "given policy"])
        assert [c.origin for c in found] == ["policy", "given policy", "prior"]

    def test_a_broken_one_is_never_chosen(self, env):
        losses = [lambda window: math.nan, self.about(1.0), self.about(1.1)]
        found, _ = self.run(env, losses, origins=["episode 0", "episode 1", "prior"])
        assert found[0].origin == "episode 1"

    def test_rewards_are_never_drawn_from_the_reserve(self, env):
        env.reserved = 4
        drawn = {i for seed in range(50) for i in env.draw(np.random.default_rng(seed), 3)}
        assert drawn == set(range(8))
        assert set(finals_windows(env, 0)) == {8, 9, 10, 11}
        assert finals_windows(env, 0) == finals_windows(env, 0) != finals_windows(env, 1)


class TestShapes:
    def test_the_candidates_keep_their_place_and_what_is_added_says_so(self, uniform_env):
        first, second = uniform_env.budget.shapes(0.3)
        mine = Candidate(uniform_env.budget.importance(second.kept), second, "policy")
        both = with_every_shape(uniform_env, [mine], 0.3)
        assert both[0] is mine
        assert [(c.allocation, c.origin) for c in both[1:]] == [(first, "shape")]

    def test_with_layers_of_their_own_nothing_is_added(self, env):
        candidate = Candidate(np.zeros(6, np.float32), env.budget.project(np.zeros(6), 0.3), "policy")
        assert with_every_shape(env, [candidate], 0.3) == [candidate]


class TestNear:
    def test_takes_what_is_in_reach_or_else_the_nearest_update(self):
        history = [episode(i, i // 2, 0.5, sparsity=0.1 + 0.04 * (i // 2)) for i in range(10)]
        assert [e.index for e in near(history, 0.2, 0.05)] == [4, 5, 6, 7]
        assert {e.target_sparsity for e in near(history, 0.2, 0.05)} == {0.2}
        assert [e.index for e in near(history, 0.5, 0.05)] == [8, 9]
