"""A whole search on a tiny model: what it spends and finds, its interruption, and going on from its log."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from glass_runs import ctrl_c, untimed
from made_up_episodes import Opinionated
from measured_alone import Recording

from ffgym.agents.one_shot import OneShot
from ffgym.agents.random_search import RandomSearch
from ffgym.costs.resource import standard_costs
from ffgym.envs.schedule import Schedule
from ffgym.errors import PluginError
from ffgym.evaluation.perplexity import evaluate
from ffgym.plugins.bases import Reward
from ffgym.pruning.budget import Budget
from ffgym.search.finals import finals_windows
from ffgym.search.log import read_log
from ffgym.search.loop import SearchInterrupted, search_front
from ffgym.types import do_nothing

SETTINGS = {"episodes": 12, "episodes_per_update": 4, "finalist_count": 3}
RAMPS = Schedule(0.3, 2, sparsity="cubic", fidelity="cubic")


@pytest.fixture
def make_env(make_env):
    """As elsewhere, with windows reserved for the finals."""
    return partial(make_env, reserved=5)


@pytest.fixture
def env(make_env):
    return make_env(sparsity=0.3)


def searched(env, agent=None, *, seed=3, schedule=RAMPS, settings=SETTINGS, **options):
    (found,) = search_front(env, agent or RandomSearch(), schedule, [env.sparsity], seed=seed, **settings, **options)
    return found


def bits(found):
    """Everything about it but the time it took; repr shows every bit of a float, and NaN equals NaN."""
    return repr([replace(e, action=e.action.tolist()) for e in found.history]) + repr(
        [(c.importance.tolist(), c.allocation, c.origin, c.loss) for c in [found.best, *found.finalists]]
        + [found.dense_loss, found.search_tokens, found.final_tokens]
    )


def ctrl_c_at(index):
    """For ``on_episode``: Ctrl-C comes with this episode."""
    return lambda episode: episode.index == index and ctrl_c()


class TestUniform:
    def test_finals_measure_every_shape_whatever_the_agent_has_seen(self, uniform_env):
        """The agent sees and believes in one shape only."""
        shapes = uniform_env.budget.shapes(0.3)
        assert len(shapes) == 2
        for shape in shapes:
            believed = uniform_env.budget.importance(shape.kept)
            found = searched(uniform_env, Opinionated(believed), schedule=Schedule(0.3, 2))
            assert {c.allocation.kept for c in found.finalists} == {s.kept for s in shapes}
            assert found.final_tokens == 2 * 160
            assert None not in [c.loss for c in found.finalists]
            assert found.best.allocation.kept == found.finalists[0].allocation.kept

    def test_fewer_shapes_than_episodes_are_measured_once_an_update(self, uniform_env):
        uniform_env.executor = recording = Recording(uniform_env.executor)
        found = searched(uniform_env, schedule=Schedule(0.3, 2))
        assert len(found.history) == 12
        measured = [
            request for call in recording.calls for request in call if request.kept != uniform_env.prunable.dense_units
        ]
        assert all(len(call) == len(set(call)) for call in recording.calls), "nothing is measured twice at once"
        assert len(measured) <= 3 * 2 * 2 + 2 * 5, "of two shapes: three updates of two texts, five windows of finals"

    def test_a_rule_that_is_run_alone_stays_what_it_is(self, uniform_env):
        agent = OneShot()
        agent.prior_mean = uniform_env.budget.importance(uniform_env.budget.shapes(0.3)[0].kept)
        found = searched(uniform_env, agent, schedule=Schedule(0.3, 2))
        assert [c.origin for c in found.finalists] == ["policy"]


class TestSearch:
    def test_spends_its_tokens_and_chooses_among_finalists(self, env):
        found = searched(env)
        assert found.search_tokens == sum(e.tokens for e in found.history) >= 12 * 64
        assert len(found.finalists) == 3
        assert len({c.allocation.kept for c in found.finalists}) == 3
        assert found.best is found.finalists[0]
        assert 0 < found.final_tokens <= 3 * 160
        assert found.best.loss is not None
        assert math.isfinite(found.dense_loss)
        assert all(c.allocation.sparsity >= 0.3 for c in found.finalists)
        assert found.seconds > 0

    def test_the_chosen_loss_is_that_of_the_cut_model(self, env):
        found = searched(env)
        env.prunable.cut(found.best.allocation.kept)
        windows = env.windows[list(finals_windows(env, 3)[2:])]
        assert found.best.loss == pytest.approx(evaluate(env.prunable.model, windows).loss, rel=1e-6)

    def test_the_same_seed_is_the_same_search_and_another_seed_another(self, make_env):
        first, again, other = (searched(make_env(sparsity=0.3), seed=seed) for seed in (3, 3, 4))
        assert bits(first) == bits(again) != bits(other)

    def test_hears_of_every_episode_and_update(self, env):
        episodes, updates = [], []
        found = searched(
            env, on_episode=episodes.append, on_update=lambda own, update: updates.append((list(own), update))
        )
        assert episodes == list(found.history)
        assert [update.index for _, update in updates] == list(range(len(updates)))
        assert [e for own, _ in updates for e in own] == episodes
        for own, update in updates:
            assert [e.reward for e in own] == update.rewards.tolist()
            assert {e.update for e in own} == {update.index}

    def test_an_environment_that_reserves_nothing_has_no_finals(self, make_env):
        found = searched(make_env(sparsity=0.3, reserved=0))
        assert len(found.finalists) == 3
        assert (found.final_tokens, found.dense_loss, found.best.loss) == (0, None, None)

    def test_one_shot_measures_its_heuristic_once_and_needs_no_finals(self, env):
        agent = OneShot()
        agent.prior_mean = np.linspace(-1, 1, 6)
        found = searched(env, agent, schedule=Schedule(0.3, 2))
        assert len(found.history) == 4
        assert found.best.allocation.kept == env.budget.project(agent.prior_mean, 0.3).kept
        assert found.best.origin == "policy"
        assert (found.final_tokens, found.dense_loss, found.best.loss) == (0, None, None)


class Traded(Reward):
    """Two aims that pull apart: what is lost, and attention that is kept."""

    name = "traded"
    needs = frozenset({"cost"})

    def __call__(self, pruned, dense):
        return sum(self.objectives(pruned, dense).values())

    def objectives(self, pruned, dense):
        return {"ratio": math.exp(dense.loss - pruned.loss), "kv_kept": pruned.costs["kv"] / dense.costs["kv"]}


class TestObjectives:
    @pytest.fixture
    def traded(self, make_env):
        env = make_env(sparsity=0.3)
        env.reward = Traded()
        kv = standard_costs(env.prunable.model, context=1024)["kv"]
        env.prices = {"kv": Budget(env.prunable.sublayers, kv.tables)}
        return env

    def test_a_search_that_is_read_from_its_log_ends_in_the_same_finals(self, traded, make_env, tmp_path):
        log, settings = tmp_path / "episodes.jsonl", {**SETTINGS, "episodes": 40, "finalist_count": 2}
        first = searched(traded, settings=settings, schedule=Schedule(0.3, 2), log=log)
        again = make_env(sparsity=0.3)
        again.reward, again.prices = traded.reward, traded.prices
        assert bits(searched(again, settings=settings, schedule=Schedule(0.3, 2), log=log)) == bits(first)

    def test_episodes_of_an_update_share_their_text_so_that_objectives_compare(self, traded, env):
        history = searched(traded, schedule=Schedule(0.3, 2)).history
        assert len({(e.update, e.windows) for e in history}) == len({e.update for e in history})
        alone = searched(env, schedule=Schedule(0.3, 2)).history
        assert len({(e.update, e.windows) for e in alone}) == 2 * len({e.update for e in alone}), "pairs have their own"

    def test_objectives_survive_the_log(self, traded, tmp_path):
        log = tmp_path / "episodes.jsonl"
        found = searched(traded, log=log)
        assert [e.objectives for e in read_log(log).episodes] == [e.objectives for e in found.history]
        assert all(set(e.objectives) == {"ratio", "kv_kept"} for e in found.history)


class Interrupting(RandomSearch):
    """Presses Ctrl-C when it is told the rewards of an update."""

    name = "interrupting"

    def __init__(self, update):
        super().__init__()
        self.left = update

    def tell(self, observations, actions, rewards):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return {}


class Stopping(Recording):
    """Ctrl-C while update ``after`` (from 0) is measured."""

    def __init__(self, executor, after):
        super().__init__(executor)
        self.after = after

    def measure(self, requests, on_progress=do_nothing):
        if len(self.calls) == self.after:
            raise KeyboardInterrupt
        return super().measure(requests, on_progress)


class TestInterruption:
    def test_while_an_update_is_measured_loses_that_update(self, make_env, tmp_path):
        whole, log = searched(make_env(sparsity=0.3)), tmp_path / "episodes.jsonl"
        env = make_env(sparsity=0.3)
        env.executor = Stopping(env.executor, after=2)
        with pytest.raises(SearchInterrupted) as raised:
            searched(env, log=log)
        assert len(raised.value.found.history) == len(read_log(log).episodes) == 8
        assert bits(searched(make_env(sparsity=0.3), log=log)) == bits(whole)

    def test_says_the_best_so_far(self, env):
        with pytest.raises(SearchInterrupted) as raised:
            searched(env, Interrupting(1), schedule=Schedule(0.3, 2))
        found = raised.value.found
        assert isinstance(raised.value, KeyboardInterrupt)
        assert "the attribute found holds the best so far" in str(raised.value)
        assert len(found.history) == 8
        assert found.best.origin == f"episode {max(found.history, key=lambda e: e.reward).index}"
        assert found.finalists == (found.best,)
        assert (found.dense_loss, found.final_tokens) == (None, 0)
        assert found.search_tokens == 8 * 64
        assert env.prunable.kept == env.prunable.dense_units

    def test_says_what_the_agent_believes_in_where_it_believes_in_something(self, env):
        class Torn(Interrupting):
            def recommend(self, observation):
                return [np.linspace(1, -1, 6)]

        with pytest.raises(SearchInterrupted) as raised:
            searched(env, Torn(1))
        assert raised.value.found.best.origin == "policy"

    def test_an_agent_that_has_nothing_to_recommend_yet_is_not_called_broken(self, env):
        class Late(Interrupting):
            def recommend(self, observation):
                raise AttributeError("nothing was told yet")

        with pytest.raises(KeyboardInterrupt) as raised:
            searched(env, Late(0))
        assert type(raised.value) is KeyboardInterrupt

    def test_in_the_finals_loses_nothing(self, env):
        with pytest.raises(SearchInterrupted) as raised:
            searched(env, on_finals=ctrl_c)
        assert raised.value.found.search_tokens >= 12 * 64

    def test_before_the_first_episode_is_plain_ctrl_c(self, env):
        env.executor = Stopping(env.executor, after=0)
        with pytest.raises(KeyboardInterrupt) as raised:
            searched(env)
        assert not isinstance(raised.value, SearchInterrupted)

    def test_other_errors_pass_through_and_the_log_is_closed(self, env, tmp_path):
        log = tmp_path / "episodes.jsonl"

        def broken(*_):
            raise RuntimeError("tracker is down")

        with pytest.raises(RuntimeError, match="tracker"):
            searched(env, log=log, on_update=broken)
        assert len(read_log(log).episodes) == 4


class TestLog:
    @pytest.fixture
    def whole(self, make_env, tmp_path):
        log = tmp_path / "whole.jsonl"
        return searched(make_env(sparsity=0.3), log=log), log.read_text()

    @pytest.mark.parametrize(
        ("lines", "torn"),
        [(0, "half a line"), (4, ""), (7, "all but the newline"), (None, "half a line")],
    )
    def test_a_resumed_search_is_the_uninterrupted_one_bit_for_bit(self, whole, make_env, tmp_path, lines, torn):
        """Killed at any episode, also while it wrote a line; on a new environment, as in a new process."""
        found, text = whole
        rows = text.splitlines(keepends=True)
        kept = rows[:lines]
        following = rows[len(kept)] if len(kept) < len(rows) else rows[0]
        kept.append({"": "", "all but the newline": following.rstrip("\n"), "half a line": following[:90]}[torn])
        log = tmp_path / "resumed.jsonl"
        log.write_text("".join(kept))
        again = searched(make_env(sparsity=0.3), log=log)
        assert bits(again) == bits(found)
        assert untimed(log) == untimed(tmp_path / "whole.jsonl")

    def test_a_finished_log_is_replayed_without_measuring_an_episode(self, whole, make_env, tmp_path):
        log = tmp_path / "done.jsonl"
        log.write_text(whole[1])
        env = make_env(sparsity=0.3)
        env.executor = recording = Recording(env.executor)
        assert bits(searched(env, log=log)) == bits(whole[0])
        windows = {place for call in recording.calls for request in call for place in request.windows}
        assert windows <= set(finals_windows(env, 3)), "only the finals are measured"

    def test_ctrl_c_while_a_search_is_replayed_hands_over_nothing(self, whole, make_env, tmp_path):
        log = tmp_path / "again.jsonl"
        log.write_text(whole[1])

        with pytest.raises(KeyboardInterrupt) as raised:
            searched(make_env(sparsity=0.3), log=log, on_episode=ctrl_c_at(2))
        assert not isinstance(raised.value, SearchInterrupted), "the earlier session handed over the best of more"
        assert log.read_text() == whole[1]


class TestSeconds:
    """The time of all sessions counts, that of a replay does not."""

    @pytest.fixture
    def slow(self, make_env, monkeypatch):
        """Every measurement takes a second of a clock that stands still otherwise."""
        now = [1000.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])

        def make():
            env = make_env(sparsity=0.3)
            executor = env.executor

            class Slow:
                def measure(self, requests, on_progress=do_nothing):
                    now[0] += sum(request.kept != env.prunable.dense_units for request in requests)
                    return executor.measure(requests, on_progress)

            env.executor = Slow()
            return env

        return make

    def test_of_earlier_sessions_are_added_up(self, slow, tmp_path):
        log = tmp_path / "episodes.jsonl"
        with pytest.raises(SearchInterrupted) as raised:
            searched(slow(), log=log, on_episode=ctrl_c_at(5))
        assert raised.value.found.seconds == 8, "two updates"
        found = searched(slow(), log=log)
        assert found.seconds == len(found.history) + found.final_tokens / 32 + 2, "two episodes were not recorded"
        assert searched(slow(), log=log).seconds == found.seconds, "a replay takes no time"

    def test_every_point_of_a_front_has_that_of_its_own_finals(self, slow):
        points = search_front(slow(), RandomSearch(), Schedule(0.3, 2, low=0.1), (0.1, 0.2, 0.3), seed=3, **SETTINGS)
        assert [point.final_seconds for point in points] == [point.final_tokens / 32 for point in points]
        assert len({point.seconds - point.final_seconds for point in points}) == 1, "the search is the same"


class TestFront:
    """A range of budgets: one history, and at every target finals of its own."""

    TARGETS = (0.1, 0.2, 0.3)
    RANGE = Schedule(0.3, 2, low=0.1)

    @pytest.fixture
    def env(self, make_env):
        return make_env(sparsity=0.2)

    def fronted(self, env, agent=None, **options):
        schedule = options.pop("schedule", self.RANGE)
        return search_front(env, agent or RandomSearch(), schedule, self.TARGETS, seed=3, **SETTINGS, **options)

    def test_every_point_is_chosen_at_its_own_target(self, env):
        points = []
        found = self.fronted(env, on_point=points.append)
        assert points == found
        assert [one.target for one in found] == list(self.TARGETS)
        for one in found:
            assert one.history == found[0].history
            assert one.search_tokens == found[0].search_tokens
            assert one.best is one.finalists[0]
            assert len(one.finalists) == 3
            assert 0 < one.final_tokens <= 3 * 160
            for candidate in one.finalists:
                assert candidate.allocation == env.budget.project(candidate.importance, one.target)
                assert candidate.allocation.sparsity >= one.target - 1e-9
        assert all(0.1 <= e.target_sparsity <= 0.3 for e in found[0].history)

    def test_what_the_agent_recommends_is_asked_for_at_every_target(self, env):
        asked = []

        class Told(RandomSearch):
            def recommend(self, observation):
                asked.append(float(observation[0]))
                return []

        self.fronted(env, Told())
        np.testing.assert_allclose(asked, self.TARGETS, rtol=1e-6)

    def test_candidates_stood_out_near_the_target(self, env):
        found = self.fronted(env)
        for one in found:
            nearest = min(abs(e.target_sparsity - one.target) for e in one.history)
            for candidate in one.finalists:
                number = int(candidate.origin.removeprefix("episode "))
                assert abs(one.history[number].target_sparsity - one.target) <= max(0.05, nearest) + 1e-9

    def test_ctrl_c_says_the_best_at_the_environments_own_target(self, env):
        with pytest.raises(SearchInterrupted) as raised:
            self.fronted(env, on_episode=ctrl_c_at(9))
        found = raised.value.found
        assert found.target == 0.2
        assert found.best.allocation.sparsity == pytest.approx(0.2, abs=0.05)


class Broken(RandomSearch):
    """Breaks the agent's contract in one way."""

    name = "broken"

    def __init__(self, how):
        super().__init__()
        self.how = how

    def ask(self, observations):
        actions = super().ask(observations)
        return {"rows": actions[:, :2], "range": actions * 7, "nan": actions * np.nan, "nothing": None}.get(
            self.how, actions
        )

    def tell(self, observations, actions, rewards):
        if self.how == "bug":
            return {"bug": 1 / 0}
        answers = {
            "diagnostics": [0.2],
            "text": {"policy/spread": "wide"},
            "digits": {"policy/spread": "0.5"},
        }
        return answers.get(self.how) or super().tell(observations, actions, rewards)

    def learn(self, env, *, seed, on_update):
        if self.how == "idle":
            return
        if self.how == "step":
            env.reset(seed=seed)
            env.step(np.zeros((4, 2)))
        if self.how == "greedy":
            env.reset(seed=seed)
            for _ in range(100):
                env.step(np.zeros((4, 6)))
        tell = {
            "silent": lambda update: None,
            "none": lambda update: on_update(None),
            "twice": lambda update: (on_update(update), on_update(update)),
            "always the first": lambda update: on_update(replace(update, index=0)),
            "word": lambda update: on_update(replace(update, index="seven")),
            "no rewards": lambda update: on_update(replace(update, rewards=None)),
            "mean": lambda update: on_update(replace(update, rewards=update.rewards[:1])),
            "from one": lambda update: on_update(replace(update, index=update.index + 1)),
        }.get(self.how, on_update)
        super().learn(env, seed=seed, on_update=tell)

    def state(self):
        return {"rng": np.random.default_rng()} if self.how == "state" else {}

    def recommend(self, observation):
        return {"shape": [np.zeros(5)], "flat": np.zeros(6), "number": 3, "words": [["a"] * 6]}.get(self.how, [])


class TestBrokenAgents:
    """Whatever an agent does wrong is an error that names it, before anything is measured on its word."""

    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("step", r"searching: ValueError: actions have shape \(4, 2\), not \(4, 6\)"),
            ("rows", r"searching: ValueError: actions have shape \(4, 2\), not \(4, 6\)"),
            ("range", r"searching: ValueError: actions must be finite and in \[-1, 1\], and one is"),
            ("nan", r"searching: ValueError: actions must be finite and in \[-1, 1\], and one is nan"),
            ("nothing", r"searching: ValueError: actions have shape \(\), not \(4, 6\)"),
            ("bug", "searching: ZeroDivisionError"),
            (
                "greedy",
                r"searching: RuntimeError: step after all 768 tokens were spent: stop when env\.tokens_left is 0",
            ),
        ],
    )
    def test_what_a_broken_agent_raises_names_it(self, env, how, said):
        with pytest.raises(PluginError, match=r"agent 'broken' \(package .*\) failed while " + said):
            searched(env, Broken(how))

    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("idle", "learn returned without a step"),
            ("silent", "learn never called on_update"),
            ("none", "learn called on_update with NoneType, not an Update"),
            ("twice", "learn called on_update without a step before it"),
            ("word", "the index of an update is 'seven', not a number"),
            ("no rewards", r"the rewards of an update have shape \(\), not \(4,\)"),
            ("mean", r"the rewards of an update have shape \(1,\), not \(4,\)"),
            ("diagnostics", "diagnostics are list, not a dict of numbers by name"),
            ("text", "diagnostic 'policy/spread' is str, not a number"),
            ("digits", "diagnostic 'policy/spread' is str, not a number"),
            ("shape", r"recommend returned unusable importances: shape \(1, 5\), not a list of arrays of shape \(6,\)"),
            ("flat", r"recommend returned unusable importances: shape \(6,\), not a list of arrays of shape \(6,\)"),
            ("number", "recommend returned unusable importances: 'int' object is not iterable"),
            ("words", "recommend returned unusable importances"),
        ],
    )
    def test_what_they_return_or_leave_out_is_said(self, env, how, said):
        with pytest.raises(PluginError, match=r"agent 'broken' \(package .*\): " + said):
            searched(env, Broken(how))

    def test_a_state_that_cannot_be_stored_ends_the_search_after_its_first_update(self, env):
        """Before, the whole search had run, and its result was lost."""
        told = []
        with pytest.raises(PluginError, match=r"agent 'broken' .*: its state cannot be stored: .*Generator") as raised:
            searched(env, Broken("state"), on_episode=told.append)
        assert len(told) == 4
        assert "--resume" in raised.value.hint

    @pytest.mark.parametrize("how", ["always the first", "from one"])
    def test_however_they_count_every_episode_is_told_once(self, env, how):
        told = []
        found = searched(env, Broken(how), on_update=lambda episodes, update: told.extend(e.index for e in episodes))
        assert told == [e.index for e in found.history]

    @pytest.mark.parametrize(
        ("where", "reaction"),
        [
            ("measuring", "does nothing"),
            ("measuring", "swallows it"),
            ("measuring", "breaks later"),
            ("on_episode", "raises its own"),
            ("on_update", "breaks later"),
        ],
    )
    def test_what_measuring_raises_is_not_put_down_to_an_agent_and_none_swallows_it(self, env, where, reaction):
        def fails(*args, **options):
            raise RuntimeError("the disk is gone")

        class FailingExecutor:
            measure = staticmethod(fails)

        class Hasty(RandomSearch):
            def learn(self, env, *, seed, on_update):
                try:
                    super().learn(env, seed=seed, on_update=on_update)
                except Exception:
                    if reaction == "does nothing":
                        raise
                    if reaction == "raises its own":
                        raise ValueError("something went wrong") from None
                if reaction == "breaks later":
                    raise KeyError("lost")

        options = {where: fails} if where != "measuring" else {}
        if where == "measuring":
            env.executor = FailingExecutor()
        with pytest.raises(RuntimeError, match="the disk is gone"):
            searched(env, Hasty(), **options)
