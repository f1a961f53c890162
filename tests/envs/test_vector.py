"""One vector step is one update: one task for all its episodes, tokens counted, nothing measured twice."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from measured_alone import Recording

from ffgym.envs.sb3 import SB3VecEnv
from ffgym.envs.schedule import Schedule
from ffgym.envs.vector import PruningVectorEnv
from ffgym.errors import DataError, ModelError
from ffgym.plugins import manager
from ffgym.plugins.bases import BatchAgent
from ffgym.testing.toys import SeparableEnv

RAMPS = Schedule(0.4, 4, start=0.1, sparsity="cubic", fidelity="cubic")


@pytest.fixture
def env(make_env):
    return make_env(sparsity=0.4, episode_windows=4)


def vector_of(env, schedule=None, *, num_envs=3, episodes=9, **options):
    return PruningVectorEnv(
        env,
        schedule or Schedule(env.sparsity, env.episode_windows),
        num_envs=num_envs,
        token_budget=episodes * env.episode_tokens,
        **options,
    )


def played(vector, seed=0, *, said=None):
    """Random actions until the budget is spent; ``said`` is the seed in another form."""
    rng = np.random.default_rng(seed)
    vector.reset(seed=seed if said is None else said)
    rewards = []
    while vector.tokens_left:
        actions = rng.uniform(-1, 1, vector.action_space.shape).astype(np.float32)
        rewards.append(vector.step(actions)[1])
    return rewards


def same_episode(a, b):
    plain = [replace(e, action=e.action.tolist()) for e in (a, b)]
    return repr(plain[0]) == repr(plain[1])  # repr: NaN equals NaN, and floats show every bit


@pytest.mark.parametrize("episodes", [0, -1])
def test_a_search_without_tokens_is_refused(env, episodes):
    with pytest.raises(DataError, match=r"token_budget is .*: a search needs tokens"):
        vector_of(env, episodes=episodes)


def test_spaces_and_autoreset(env):
    vector = vector_of(env)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert vector.num_envs == 3
    assert vector.action_space.shape == (3, 6)
    assert vector.observation_space.shape == (3, 2)
    assert vector.single_action_space == env.action_space
    observations, infos = vector.reset(seed=0)
    assert observations in vector.observation_space
    assert infos == {}


def test_a_step_before_reset_is_gymnasiums_error(env):
    with pytest.raises(ResetNeeded):
        vector_of(env).step(np.zeros((3, 6), np.float32))


def test_ramps_over_episodes_go_on_with_every_update(env):
    schedule = Schedule(0.4, 4, start=0.1, sparsity="cubic", fidelity="cubic", ramp_episodes=9)
    vector = vector_of(env, schedule, episodes=6)
    played(vector)
    stages = [(e.target_sparsity, e.fidelity) for e in vector.history]
    expected = [schedule.stage(0.0, episodes=3 * (i // 3)) for i in range(len(stages))]
    assert stages == [(stage.sparsity, stage.fidelity) for stage in expected]
    assert stages[-1] == (0.4, 1.0)


def test_reset_takes_no_options(env):
    with pytest.raises(DataError, match="no reset options, and was given 'sparsity'") as refused:
        vector_of(env).reset(options={"sparsity": 0.2})
    assert "Set prune.sparsity, or use a single environment" in refused.value.hint
    with pytest.raises(DataError, match="'1'"):
        vector_of(env).reset(options={1: 2})


def test_an_empty_list_of_seeds_is_refused(env):
    with pytest.raises(DataError, match="seed is an empty list"):
        vector_of(env).reset(seed=[])


def test_draws_every_episode_of_the_last_update(env):
    env.render_mode = "rgb_array"
    vector = vector_of(env)
    vector.reset(seed=0)
    actions = np.zeros((3, 6), np.float32)
    actions[1:, 1] = 1
    vector.step(actions)
    first, second, third = vector.render()
    assert not np.array_equal(first, second)
    assert np.array_equal(second, third)


def test_draws_the_dense_model_before_the_first_update(env):
    """As `PruningEnv` does: recorders of videos take a picture when an episode begins."""
    env.render_mode = "rgb_array"
    vector = vector_of(env)
    vector.reset(seed=0)
    for picture in (*(drawn := vector.render()), *SB3VecEnv(vector).get_images()):
        np.testing.assert_array_equal(picture, env.render())
    assert len(drawn) == 3


def test_options_that_stable_baselines3_sets_are_refused_as_well_and_forgotten(env):
    adapter = SB3VecEnv(vector_of(env))
    adapter.set_options({"sparsity": 0.1})
    with pytest.raises(DataError, match="sparsity"):
        adapter.reset()
    assert adapter.reset().shape == (3, 2)


def test_a_step_says_what_came_of_it_in_final_info(env):
    vector = vector_of(env)
    first, _ = vector.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 6)).astype(np.float32)
    following, rewards, terminated, truncated, infos = vector.step(actions)
    assert following in vector.observation_space
    assert rewards.shape == (3,)
    assert terminated.dtype == truncated.dtype == bool
    assert terminated.all()
    assert not truncated.any()
    final = infos["final_info"]
    np.testing.assert_array_equal(infos["final_obs"], first)
    assert infos["_final_info"].all()
    assert infos["_final_obs"].all()
    np.testing.assert_array_equal(final["reward"], rewards)
    assert final["kept"].shape == (3, 6)
    for i, action in enumerate(actions):
        assert tuple(final["kept"][i]) == env.budget.project(action, 0.4).kept
        assert rewards[i] == pytest.approx(math.exp(final["dense_loss"][i] - final["loss"][i]))
    assert final["tokens"].tolist() == [4 * 32] * 3
    assert final["failed"].tolist() == [0] * 3


def test_an_update_is_one_call_and_its_subset_is_redrawn_and_common_to_its_episodes(env):
    env.executor = recording = Recording(env.executor)
    vector = vector_of(env, episodes=12)
    played(vector)
    updates = [[request.windows for request in call] for call in recording.calls]
    assert [len(update) for update in updates] == [1 + 3] * 4, "the dense model, and every episode"
    assert all(len(set(update)) == 1 for update in updates)
    assert len({update[0] for update in updates}) > 1
    losses = {e.update: set() for e in vector.history}
    for episode in vector.history:
        losses[episode.update].add(episode.dense_loss)
    assert all(len(found) == 1 for found in losses.values())


def test_an_allocation_is_measured_once_an_update_and_counts_for_each_episode(env):
    env.executor = recording = Recording(env.executor)
    vector = vector_of(env, num_envs=4, episodes=8)
    vector.reset(seed=0)
    first, second = np.linspace(-1, 1, 6), np.linspace(1, -1, 6)
    near = first + np.array([1e-6, 0, 0, 0, 0, 0])  # another action, the same allocation
    actions = np.stack([first, second, near, second]).astype(np.float32)
    a, b = (env.budget.project(action, 0.4).kept for action in (first, second))
    rewards = vector.step(actions)[1]
    assert [[request.kept for request in call] for call in recording.calls] == [[env.prunable.dense_units, a, b]]
    assert rewards[0] == rewards[2] != rewards[1] == rewards[3]
    assert [e.index for e in vector.history] == [0, 1, 2, 3]
    np.testing.assert_array_equal([e.action for e in vector.history], actions)
    assert vector.tokens_spent == 4 * 4 * 32
    vector.step(actions)
    assert len(recording.calls[1]) == 3, "the next update measures on other tokens"


def test_the_seed_decides_all_subsets(env):
    runs = [vector_of(env) for _ in range(3)]
    rewards = [played(run, seed) for run, seed in zip(runs, (1, 1, 2), strict=True)]
    assert np.array_equal(rewards[0], rewards[1])
    assert all(same_episode(a, b) for a, b in zip(runs[0].history, runs[1].history, strict=True))
    assert not np.array_equal([e.dense_loss for e in runs[0].history], [e.dense_loss for e in runs[2].history])


@pytest.mark.parametrize("seed", [np.int64(1), [1, 2], (1,)], ids=["numpy", "list", "tuple"])
def test_a_seed_of_any_form_decides_them(env, seed):
    one, other = vector_of(env), vector_of(env)
    assert np.array_equal(played(one, 1), played(other, 1, said=seed))
    assert [e.dense_loss for e in one.history] == [e.dense_loss for e in other.history]


def test_tokens_are_counted_and_end_the_search(env):
    seen = []
    vector = vector_of(env, episodes=8, on_episode=seen.append)
    assert vector.tokens_left == 8 * 4 * 32
    played(vector)
    assert len(vector.history) == 9, "the update that crosses the budget is the last"
    assert vector.tokens_spent == sum(e.tokens for e in vector.history) == 9 * 4 * 32
    assert vector.tokens_left == 0
    assert seen == vector.history
    assert [e.index for e in seen] == list(range(9))
    assert [e.update for e in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("episodes", "slopes"), [(3, 0), (1, 1)])
def test_says_how_many_tokens_of_an_update_are_measured(env, episodes, slopes):
    seen = []
    vector = vector_of(env, slope_episodes=slopes, on_progress=seen.append, on_episode=lambda _: seen.append("episode"))
    vector.reset(seed=0)
    vector.step(np.random.default_rng(0).uniform(-1, 1, (episodes, 6)).astype(np.float32))
    tokens, ended = seen[:-episodes], seen[-episodes:]
    assert ended == ["episode"] * episodes
    assert tokens == sorted(tokens)
    assert tokens[-1] == pytest.approx(vector.tokens_spent), "an update of few episodes or with slopes costs its own"


def test_the_schedule_ticks_once_an_update(env):
    vector = vector_of(env, RAMPS, episodes=12)
    played(vector)
    spent = 0
    for update in range(vector.history[-1].update + 1):
        episodes = [e for e in vector.history if e.update == update]
        stage = RAMPS.stage(spent / vector.token_budget)
        for episode in episodes:
            assert (episode.target_sparsity, episode.fidelity) == (stage.sparsity, stage.fidelity)
            assert episode.tokens == stage.windows * 32
            assert episode.sparsity >= stage.sparsity - 1e-9
        spent += sum(e.tokens for e in episodes)
    assert vector.history[0].target_sparsity == pytest.approx(0.1)
    assert vector.history[0].tokens == 32
    assert vector.history[-1].target_sparsity == pytest.approx(0.4)
    assert vector.history[-1].fidelity == 1
    assert len(vector.history) > 12, "easy episodes are cheap"


def test_observations_are_the_running_stage(env):
    vector = vector_of(env, RAMPS, episodes=12)
    observations, _ = vector.reset(seed=0)
    while vector.tokens_left:
        stage = vector.stage
        np.testing.assert_array_equal(observations, np.tile(np.float32([stage.sparsity, stage.fidelity]), (3, 1)))
        observations, _, _, _, infos = vector.step(np.zeros((3, 6), np.float32))
        np.testing.assert_array_equal(infos["final_obs"][0], np.float32([stage.sparsity, stage.fidelity]))


def test_actions_may_be_reused_by_the_agent(env):
    """The history keeps its own copy."""
    vector = vector_of(env)
    vector.reset(seed=0)
    actions = np.zeros((3, 6), np.float32)
    vector.step(actions)
    actions[:] = 1
    assert all((e.action == 0).all() for e in vector.history)
    assert vector.history[0].action.dtype == np.float32


def test_another_thread_is_refused_during_an_update(env):
    vector, alone = vector_of(env), played(vector_of(env))
    refused, first = [], env.prunable.family.layers(env.prunable.model)[0]
    with ThreadPoolExecutor(1) as other:

        def disturb(*_):
            if not refused:
                refused.append(other.submit(vector.reset, seed=7).exception())
                refused.append(other.submit(vector.step, np.zeros((3, 6))).exception())

        with first.register_forward_pre_hook(disturb):
            assert repr(played(vector)) == repr(alone)
    assert {type(error) for error in refused} == {ModelError}


class TestRange:
    """Under a range of budgets every update has a target of its own."""

    RANGE = Schedule(0.5, 4, low=0.1)

    def test_all_episodes_of_an_update_share_it_and_it_is_what_is_observed(self, env):
        vector = vector_of(env, self.RANGE, episodes=30)
        observations, _ = vector.reset(seed=0)
        while vector.tokens_left:
            sparsity = vector.stage.sparsity
            np.testing.assert_array_equal(observations, np.tile(np.float32([sparsity, 1.0]), (3, 1)))
            observations, _, _, _, infos = vector.step(np.zeros((3, 6), np.float32))
            np.testing.assert_array_equal(infos["final_obs"][0], np.float32([sparsity, 1.0]))
            assert {e.target_sparsity for e in vector.history[-3:]} == {sparsity}
        targets = [e.target_sparsity for e in vector.history[::3]]
        assert len(set(targets)) == 10
        assert all(0.1 <= target <= 0.5 for target in targets)

    def test_ten_updates_leave_no_fifth_of_the_range_out(self, env):
        for seed in range(5):
            vector = vector_of(env, self.RANGE, num_envs=1, episodes=10)
            played(vector, seed)
            counts, _ = np.histogram([e.target_sparsity for e in vector.history], bins=5, range=(0.1, 0.5))
            assert counts.min() >= 1

    def test_the_seed_decides_them_again_whenever_it_is_given(self, env):
        vector = vector_of(env, self.RANGE, num_envs=1, episodes=10)
        drawn = []
        for _ in range(2):
            observations, _ = vector.reset(seed=3)
            following = vector.step(np.zeros((1, 6), np.float32))[0]
            drawn.append([observations[0, 0], following[0, 0]])
        assert drawn[0] == drawn[1]

    def test_a_single_target_draws_the_subsets_that_it_always_drew(self, env):
        vector = vector_of(env)
        vector.reset(seed=5)
        vector.step(np.zeros((3, 6), np.float32))
        expected = env.draw(np.random.default_rng(np.random.SeedSequence(5)), 4)
        assert {episode.windows for episode in vector.history} == {expected}


class TestReplay:
    def test_gives_the_same_history_without_a_forward_pass(self, env):
        first = vector_of(env, RAMPS)
        rewards = played(first)
        env.executor = recording = Recording(env.executor)
        seen = []
        again = vector_of(env, RAMPS, replay=first.history, on_episode=seen.append)
        for one, two in zip(rewards, played(again), strict=True):
            np.testing.assert_array_equal(one, two)
        assert recording.calls == []
        assert all(same_episode(a, b) for a, b in zip(again.history, first.history, strict=True))
        assert len(seen) == len(first.history)
        assert again.tokens_spent == first.tokens_spent

    @pytest.mark.parametrize(
        ("options", "stopped_after"),
        [
            *(({"schedule": RAMPS}, episodes) for episodes in (1, 4, 6)),
            ({"schedule": Schedule(0.5, 4, low=0.1)}, 4),
            ({"slope_episodes": 1}, 4),
            ({"pair_text": True}, 4),
        ],
    )
    def test_goes_on_where_it_stopped(self, make_env, options, stopped_after):
        """Also within an update, and on another environment, whose dense losses are not known yet."""
        whole, rest = (make_env(sparsity=0.4, episode_windows=4) for _ in range(2))
        first = vector_of(whole, episodes=12, **options)
        rewards = played(first)
        again = vector_of(rest, episodes=12, replay=first.history[:stopped_after], **options)
        assert all(map(np.array_equal, played(again), rewards))
        assert all(same_episode(a, b) for a, b in zip(again.history, first.history, strict=True))

    @pytest.mark.parametrize("options", [{"slope_episodes": 1}, {"pair_text": True}], ids=["slopes", "pairs"])
    def test_of_a_search_with_other_slopes_or_text_is_refused(self, env, options):
        plain = vector_of(env, num_envs=4, episodes=12)
        played(plain)
        with pytest.raises(DataError, match=r"episode \d of the log differs from what this search proposes"):
            played(vector_of(env, num_envs=4, episodes=12, replay=plain.history, **options))

    @pytest.mark.parametrize(
        "changed",
        [
            {"action": np.zeros(6, np.float32)},
            {"update": 1},
            {"target_sparsity": 0.3},
            {"fidelity": 0.25},
            {"kept": (2, 48, 2, 48, 2, 48)},
        ],
        ids=lambda changed: next(iter(changed)),
    )
    def test_of_another_search_is_refused(self, env, changed):
        """Same actions, but another stage, or another model or budget: nothing of it can be reused."""
        first = vector_of(env)
        played(first)
        history = list(first.history)
        history[1] = replace(history[1], **changed)
        with pytest.raises(DataError, match="episode 1 of the log differs from what this search proposes") as raised:
            played(vector_of(env, replay=history))
        assert "Delete the log" in raised.value.hint


def test_a_failed_episode_is_recorded_and_the_others_go_on(env, break_half):
    break_half(env.prunable.halves[-1], below=30)
    vector = vector_of(env)
    vector.reset(seed=0)
    actions = np.full((3, 6), 0.5, np.float32)
    actions[1, -1] = -1
    rewards = vector.step(actions)[1]
    assert [e.failed for e in vector.history] == [False, True, False]
    assert rewards[1] == 0.0 < rewards[0] == rewards[2]
    assert math.isnan(vector.history[1].loss)


class TestSlopes:
    """The first episodes of an update may be measured with slopes, which cost three more forward passes."""

    @staticmethod
    def first_update(env, slope_episodes):
        vector = vector_of(env, episodes=3, slope_episodes=slope_episodes)
        played(vector)
        return vector.history[:3]

    def test_the_first_episodes_have_them_and_pay_for_them(self, env):
        vector = vector_of(env, episodes=12, slope_episodes=1)
        played(vector)
        for episode in vector.history:
            first = episode.index % 3 == 0
            assert len(episode.slopes) == (6 if first else 0)
            assert episode.slope_tokens == (3 * 4 * 32 if first else 0)
            assert episode.tokens == (4 * 4 * 32 if first else 4 * 32)
        assert vector.tokens_spent == 2 * (4 + 1 + 1) * 4 * 32, "what slopes cost counts in the budget"

    def test_the_infos_of_a_step_hold_the_slopes(self, env):
        vector = vector_of(env, slope_episodes=1)
        vector.reset(seed=0)
        actions = np.random.default_rng(0).uniform(-1, 1, (3, 6)).astype(np.float32)
        slopes = vector.step(actions)[4]["final_info"]["slopes"]
        assert slopes.shape == (3, 6)
        assert slopes[0].any()
        assert not slopes[1:].any()
        np.testing.assert_array_equal(slopes[0], vector.history[0].slopes)
        plain = vector_of(env)
        plain.reset(seed=0)
        assert "slopes" not in plain.step(actions)[4]["final_info"]

    def test_rewards_are_those_without_slopes(self, env):
        plain, sloped = ([e.reward for e in self.first_update(env, n)] for n in (0, 1))
        assert plain == sloped

    def test_a_twin_of_an_episode_with_slopes_has_none_and_costs_as_little_as_any(self, env):
        vector = vector_of(env, slope_episodes=1)
        vector.reset(seed=0)
        vector.step(np.zeros((3, 6), np.float32))
        assert [e.tokens for e in vector.history] == [4 * 4 * 32, 4 * 32, 4 * 32]
        assert [len(e.slopes) for e in vector.history] == [6, 0, 0]


class TestPairText:
    """Every mirrored pair of an update may have text of its own."""

    def test_episodes_share_text_with_their_partner_only(self, env):
        vector = vector_of(env, num_envs=6, episodes=12, pair_text=True)
        played(vector)
        windows = [episode.windows for episode in vector.history[:6]]
        assert windows[:3] == windows[3:]
        assert len(set(windows)) == 3
        assert vector.tokens_spent == 12 * 4 * 32, "tokens are charged as without"

    def test_equal_actions_on_other_text_are_other_measurements(self, env):
        vector = vector_of(env, num_envs=4, pair_text=True)
        vector.reset(seed=0)
        rewards = vector.step(np.zeros((4, 6), np.float32))[1]
        assert rewards[0] == rewards[2] != rewards[1] == rewards[3]


class TestSmallerUpdates:
    """An agent may ask for less than a whole update, and decide from step to step what has slopes."""

    def test_fewer_actions_are_a_smaller_update(self, env):
        vector = vector_of(env)
        vector.reset(seed=0)
        vector.slope_episodes = 1
        _, rewards, terminated, _, infos = vector.step(np.zeros((1, 6), np.float32))
        assert rewards.shape == terminated.shape == (1,)
        assert infos["final_info"]["slopes"].shape == (1, 6)
        vector.slope_episodes = 0
        assert "slopes" not in vector.step(np.zeros((3, 6), np.float32))[4]["final_info"]
        assert [episode.update for episode in vector.history] == [0, 1, 1, 1]

    def test_more_or_none_are_refused(self, env):
        vector = vector_of(env)
        vector.reset(seed=0)
        for count in (0, 4):
            with pytest.raises(ValueError, match="actions have shape"):
                vector.step(np.zeros((count, 6), np.float32))


@pytest.mark.parametrize("made", [lambda vector: vector, SB3VecEnv], ids=["our own", "of Stable-Baselines3"])
def test_actions_that_are_no_real_numbers_are_refused(env, made):
    vector = made(vector_of(env))
    vector.reset()
    for wrong in (np.full((3, 6), "much"), np.full((3, 6), 0.5j), torch.zeros(3, 6, requires_grad=True)):
        with pytest.raises(DataError, match="actions must be real numbers"):
            vector.step(wrong)


class TestTelling:
    """A `BatchAgent` may ask to be told what its actions came to; one that does not works as it did."""

    class Plain(BatchAgent):
        name = "plain"

        def begin(self, *, dimensions, batch, seed):
            self.shape, self.rng = (batch, dimensions), np.random.default_rng(seed)

        def ask(self, observations):
            return self.rng.uniform(-1, 1, self.shape).astype(np.float32)

        def tell(self, observations, actions, rewards):
            return {}

    class Curious(Plain):
        name = "curious"

        def tell(self, observations, actions, rewards, kept=None):
            self.kept = kept
            return {}

    def test_an_agent_that_asks_is_told_what_was_kept(self, env):
        plain, curious = self.Plain(), self.Curious()
        vectors = [vector_of(env, episodes=6) for _ in range(2)]
        for agent, vector in zip((plain, curious), vectors, strict=True):
            agent.learn(vector, seed=0, on_update=lambda update: None)
        assert all(same_episode(a, b) for a, b in zip(*(vector.history for vector in vectors), strict=True))
        np.testing.assert_array_equal(curious.kept, [episode.kept for episode in vectors[1].history[-3:]])

    class Silent(SeparableEnv):
        def step(self, actions):
            *rest, infos = super().step(actions)
            del infos["final_info"]["kept"]
            return (*rest, infos)

    def test_nothing_where_the_environment_does_not_say(self):
        curious = self.Curious()
        curious.learn(self.Silent(2, 4, tokens=4), seed=0, on_update=lambda update: None)
        assert curious.kept is None


@pytest.mark.parametrize(("reward", "lead"), [("perplexity", True), ("kl", True), ("multi-objective", False)])
def test_slopes_lead_where_the_reward_falls_with_one_thing_alone(env, reward, lead):
    env.reward = manager.create("reward", reward)
    assert vector_of(env).slopes_lead == lead
