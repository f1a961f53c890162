"""What a reward needs beside losses is measured, counted, redrawn and repeated to the bit; what it does not is not."""

from __future__ import annotations

import math
from typing import Any

import made_up_tasks
import numpy as np
import pytest
from made_up_examples import made_up_examples
from measured_alone import Recording, answered_right, compared, final_hidden

import ffgym
from ffgym.agents.random_search import RandomSearch
from ffgym.config.tables import RunConfig
from ffgym.costs.resource import standard_costs
from ffgym.costs.size import SizeMeter
from ffgym.envs.pruning_env import PruningEnv
from ffgym.envs.schedule import Schedule
from ffgym.envs.vector import PruningVectorEnv
from ffgym.errors import ConfigError, DataError, UnknownNameError
from ffgym.evaluation.multiple_choice import task_accuracy
from ffgym.pipeline.make_env import make_pruning_env
from ffgym.plugins import manager
from ffgym.prepare.parts import make_reward
from ffgym.pruning.budget import Budget
from ffgym.rewards.multi_objective import MultiObjective
from ffgym.search.finalists import Candidate
from ffgym.search.finals import run_finals
from ffgym.search.loop import search_front
from ffgym.types import Evaluation

ACTION = np.linspace(-1, 1, 6).astype(np.float32)


class Everything(ffgym.Reward):
    """Wants to know all there is."""

    name = "everything"
    needs = frozenset({"kl", "reverse_kl", "accuracy", "cost"})
    tasks = ("a", "b")
    examples = 6

    def __call__(self, pruned: Evaluation, dense: Evaluation) -> float:
        self.seen = pruned, dense
        return math.exp(-pruned.kl)

    def objectives(self, pruned: Evaluation, dense: Evaluation) -> dict[str, float]:
        assert pruned.accuracy is not None
        return {"closeness": math.exp(-pruned.kl), "accuracy": pruned.accuracy}


EXAMPLES = [*made_up_examples(20, "a", 0), *made_up_examples(10, "b", 1)]


@pytest.fixture
def measuring(prepared_llama, random_windows):
    """``measuring(reward=..., **options)``: an environment on the tiny llama that can measure everything."""

    def make(reward: ffgym.Reward | None = None, **options: Any) -> PruningEnv:
        prunable = prepared_llama.prunable
        costs = standard_costs(prunable.model, context=1024)
        prices = {name: Budget(prunable.sublayers, costs[name].tables) for name in ("macs", "kv")}
        options = {"examples": EXAMPLES, "prices": prices, "sparsity": 0.3, "episode_windows": 4, **options}
        budget = Budget(prunable.sublayers)
        return PruningEnv(prunable, reward or Everything(), random_windows(12, seed=1), budget, **options)

    return make


class TestOneEpisode:
    def test_everything_is_what_it_should_be(self, measuring):
        """Divergence, accuracy and cost, done by hand on the cut model."""
        env = measuring()
        env.reset(seed=0, options={"subset": (3, 7), "examples": (0, 4, 21, 25)})
        _, reward, _, _, info = env.step(ACTION)
        pruned, dense = env.reward.seen
        allocation = env.budget.project(ACTION, 0.3)
        model, windows = env.prunable.model, env.windows[[3, 7]]
        asked = [EXAMPLES[i] for i in (0, 4, 21, 25)]
        hidden = [final_hidden(model, window[None]) for window in windows]
        dense_accuracy = task_accuracy(asked, answered_right(model, asked))
        env.prunable.cut(allocation.kept)
        by_hand = compared(model, windows, hidden, frozenset({"kl", "reverse_kl"}))
        assert pruned.kls == pytest.approx(by_hand.kls)
        assert pruned.reverse_kls == pytest.approx(by_hand.reverse_kls)
        assert pruned.losses == pytest.approx(by_hand.losses)
        assert pruned.accuracy == task_accuracy(asked, answered_right(model, asked))
        env.prunable.restore()
        assert dense.accuracy == dense_accuracy
        assert (dense.kl, dense.reverse_kl) == (0.0, 0.0)
        assert reward == pytest.approx(math.exp(-by_hand.kl))
        assert info["objective/closeness"] == reward
        assert info["objective/accuracy"] == pruned.accuracy

    def test_costs_are_what_the_prunable_sublayers_cost(self, measuring):
        env = measuring()
        env.reset(seed=0)
        info = env.step(ACTION)[4]
        pruned, dense = env.reward.seen
        assert set(pruned.costs) == {"macs", "kv"}
        assert dense.costs["kv"] == 3 * 2 * 2 * 8 * 4
        sizes = SizeMeter(env.prunable, standard_costs(env.prunable.model, context=1024))
        kept = tuple(info["kept"])
        saved = sizes(env.prunable.dense_units)["macs"] - sizes(kept)["macs"]
        assert dense.costs["macs"] - pruned.costs["macs"] == pytest.approx(saved)

    def test_tokens_are_windows_and_examples(self, measuring):
        env = measuring()
        env.reset(seed=0, options={"subset": (3, 7), "examples": (0, 4, 21)})
        assert env.step(ACTION)[4]["tokens"] == 2 * 32 + sum(EXAMPLES[i].tokens for i in (0, 4, 21))

    def test_the_same_action_gives_the_bit_same_reward_whatever_came_before(self, measuring):
        """Dense hidden states and answers are remembered: when they first came up must not show."""
        task = {"subset": (1, 2, 4), "examples": (0, 3, 22, 23)}
        answers = []
        for before in ([], [((4,), (3, 22))], [((1, 2), (0,)), ((2, 3, 4), (23, 24))]):
            env = measuring()
            for subset, examples in before:
                env.reset(options={"subset": subset, "examples": examples})
                env.step(-ACTION)
            env.reset(options=task)
            info = env.step(ACTION)[4]
            answers.append(repr((env.reward.seen, sorted((k, v) for k, v in info.items() if k != "kept"))))
        assert len(set(answers)) == 1

    def test_the_dense_model_is_asked_once(self, measuring):
        env, calls = measuring(), []
        first, *_ = env.prunable.family.layers(env.prunable.model)
        first.register_forward_pre_hook(lambda *_: calls.append(1))
        for _ in range(2):
            env.reset(options={"subset": (0, 1), "examples": (0, 1, 20)})
            env.step(ACTION)
        assert len(calls) == (2 + 3) + 2 * 2, "two windows and three examples once; then one pass of each an episode"

    def test_a_loss_or_divergence_that_is_not_finite_earns_the_worst(self, measuring, break_half):
        env = measuring()
        break_half(env.prunable.halves[1])
        env.reset(seed=0)
        _, reward, _, _, info = env.step(ACTION)
        assert (reward, info["failed"]) == (0.0, 1)
        assert not any(key.startswith("objective/") for key in info)
        assert env.prunable.kept == env.prunable.dense_units


class TestOldContract:
    def test_a_reward_of_two_arguments_measures_and_draws_nothing_more(self, measuring, make_env):
        """Plugins written before `needs`: the same bits, the same random numbers, the same info."""

        class Nats(ffgym.Reward):
            name = "nats"

            def __call__(self, pruned: Evaluation, dense: Evaluation) -> float:
                assert (pruned.kls, pruned.accuracy, pruned.costs) == (None, None, None)
                assert (dense.kls, dense.accuracy, dense.costs) == (None, None, None)
                return dense.loss - pruned.loss

        env, plain = measuring(Nats()), make_env(sparsity=0.3, episode_windows=4)
        for seed in (0, 1):
            env.reset(seed=seed)
            plain.reset(seed=seed)
            assert (env._subset, env._examples) == (plain._subset, ())
            info, expected = env.step(ACTION)[4], plain.step(ACTION)[4]
            assert set(info) == {"kept", "sparsity", "loss", "dense_loss", "tokens", "failed"}
            assert (info["loss"], info["tokens"]) == (expected["loss"], expected["tokens"])

    def test_an_instance_may_ask_for_less(self, measuring):
        env = measuring(manager.create("reward", "multi-objective", {"accuracy": 0, "cost": 1}))
        env.reset(seed=0)
        info = env.step(ACTION)[4]
        assert info["tokens"] == 4 * 32
        assert {key for key in info if "/" in key} == {"objective/perplexity_ratio", "objective/macs_saved"}

    def test_needs_may_be_a_set(self, measuring):
        class Braces(Everything):
            needs = {"kl", "accuracy", "cost"}  # noqa: RUF012 - what its author types

        env = measuring(Braces())
        env.reset(seed=0)
        assert env.step(ACTION)[1] == math.exp(-env.reward.seen[0].kl)

    def test_a_vector_environment_says_what_each_episode_weighed(self, measuring):
        env = measuring()
        vector = PruningVectorEnv(env, Schedule(target=0.3, windows=4), num_envs=2, token_budget=10**6)
        vector.reset(seed=0)
        final = vector.step(np.stack([ACTION, -ACTION]))[4]["final_info"]
        for name in ("closeness", "accuracy"):
            assert final[f"objective/{name}"].tolist() == [e.objectives[name] for e in vector.history]


class TestExamplesAreDrawn:
    def test_as_many_of_every_task_and_more_for_more_windows(self, measuring):
        env = measuring()
        for windows, each in ((1, 1), (2, 2), (4, 3), (8, 6)):
            drawn = env.draw_examples(np.random.default_rng(0), windows)
            tasks = [EXAMPLES[i].task for i in drawn]
            assert (tasks.count("a"), tasks.count("b")) == (each, each)
            assert len(set(drawn)) == len(drawn)

    def test_no_more_than_there_are(self, measuring):
        drawn = measuring().draw_examples(np.random.default_rng(0), 100)
        assert drawn == tuple(range(30))

    def test_those_of_the_finals_are_reserved_for_them(self, measuring):
        env = measuring(reserved=4)
        finals = env.draw_examples(np.random.default_rng(0), 4, finals=True)
        assert [EXAMPLES[i].task for i in finals] == ["a"] * 3 + ["b"] * 3
        drawn = {i for seed in range(20) for i in env.draw_examples(np.random.default_rng(seed), 4)}
        assert not drawn & set(finals)
        assert drawn == set(range(30)) - set(finals), "no more is kept back than they take"

    def test_a_task_that_has_too_few_to_share_serves_both(self, measuring):
        env = measuring(reserved=4, examples=[*made_up_examples(3, "a", 0), *made_up_examples(9, "b", 1)])
        assert env.draw_examples(np.random.default_rng(0), 4)[:3] == (0, 1, 2)
        assert env.draw_examples(np.random.default_rng(0), 4, finals=True)[:3] == (0, 1, 2)

    def test_finals_have_an_example_for_every_window_however_few_there_are(self, measuring):
        reward = MultiObjective(MultiObjective.Config(examples=1, resource="kv"))
        env = measuring(reward, reserved=6, episode_windows=2)
        settings = {"episodes": 4, "episodes_per_update": 4, "finalist_count": 2}
        (found,) = search_front(env, RandomSearch(), Schedule(0.3, 2), [env.sparsity], seed=0, **settings)
        assert 0 <= found.best.objectives["accuracy"] <= 1

    def test_those_of_the_finals_count_in_their_progress(self, measuring):
        reward = MultiObjective(MultiObjective.Config(perplexity=0, cost=0, examples=6))
        env, shares = measuring(reward, reserved=4), []
        actions = zip(np.linspace(ACTION, -ACTION, 6), ["policy", *["episode 0"] * 4, "prior"], strict=True)
        candidates = [Candidate(action, env.budget.project(action, 0.3), origin) for action, origin in actions]
        run_finals(env, candidates, seed=0, on_progress=shares.append)
        assert shares == sorted(shares)
        assert [share for share in shares if share < 1][-1] > 0.9, "their tokens were expected"

    def test_anew_for_every_update_and_the_same_within_it(self, measuring):
        env = measuring()
        env.executor = recording = Recording(env.executor)
        vector = PruningVectorEnv(env, Schedule(0.3, 4, fidelity="cubic"), num_envs=3, token_budget=4000)
        vector.reset(seed=0)
        while vector.tokens_left:
            vector.step(np.random.default_rng(0).uniform(-1, 1, (3, 6)).astype(np.float32))
        updates = [[(request.windows, request.examples) for request in call[1:]] for call in recording.calls]
        seen = [each for update in updates for each in update]
        assert len(updates) > 3
        assert all(len(set(update)) == 1 for update in updates)
        full = [update[0][1] for update in updates if len(update[0][0]) == 4]
        assert len(set(full)) == len(full) > 2
        assert {len(examples) for _, examples in seen} == {2, 4, 6}, "fewer at low fidelity"
        assert vector.tokens_spent == sum(env.tokens(*each) for each in seen) == sum(e.tokens for e in vector.history)
        for episode in vector.history:
            assert list(episode.objectives) == ["closeness", "accuracy"]
            assert episode.objectives["closeness"] == episode.reward

    def test_the_seed_decides_them(self, measuring):
        env = measuring()
        drawn = []
        for seed in (5, 5, 6):
            env.reset(seed=seed)
            drawn.append(env._examples)
        assert drawn[0] == drawn[1] != drawn[2]


class TestBadInputs:
    def test_accuracy_without_examples(self, measuring):
        with pytest.raises(DataError, match="reward 'everything' needs accuracy, and the environment was given no"):
            measuring(examples=())

    def test_an_episode_without_examples(self, measuring):
        with pytest.raises(DataError, match=r"the examples \[\] cannot .* task examples 0 to 29, and an episode needs"):
            measuring().reset(options={"examples": []})

    @pytest.mark.parametrize("prices", [None, {}])
    def test_cost_without_prices(self, measuring, prices):
        with pytest.raises(DataError, match=r"reward 'everything' needs cost, .* no prices for any resource"):
            measuring(prices=prices)

    def test_cost_without_the_price_of_its_resource(self, measuring):
        reward = MultiObjective(MultiObjective.Config(accuracy=0, resource="params"))
        with pytest.raises(DataError, match=r"reward 'multi-objective' needs cost, .* no prices for params"):
            measuring(reward)

    def test_more_examples_than_a_task_has(self, measuring):
        class Greedy(Everything):
            name = "greedy"
            examples = 22

        with pytest.raises(DataError, match="asks for 22 examples an episode from 2 tasks, and b has 10"):
            measuring(Greedy())

    @pytest.mark.parametrize(
        ("options", "error", "said", "hint"),
        [
            ({"tasks": ["arc_eazy"]}, UnknownNameError, "'arc_eazy'", "Did you mean 'arc_easy'?"),
            ({"tasks": ["piqa"]}, UnknownNameError, "unknown multiple-choice task .piqa.", "arc_challenge"),
            ({"tasks": []}, ConfigError, "needs accuracy, but names no tasks", "arc_easy"),
            ({"resource": "mac"}, UnknownNameError, "unknown resource 'mac'", "Did you mean 'macs'?"),
            ({"resource": "params"}, ConfigError, "weighs params, and the budget is in params", "macs"),
        ],
    )
    def test_are_refused_before_anything_is_loaded(self, options, error, said, hint):
        config = RunConfig.model_validate(
            {"model": {"name": "/no/such/model"}, "reward": {"name": "multi-objective", **options}}
        )
        with pytest.raises(error, match=said) as caught:
            make_pruning_env(config)
        assert hint in caught.value.hint

    def test_what_has_no_weight_is_not_checked(self):
        options = {"name": "multi-objective", "accuracy": 0, "cost": 0, "tasks": ["nothing"], "resource": "params"}
        assert make_reward(RunConfig.model_validate({"reward": options})).needs == frozenset()


class TestFromAConfiguration:
    @pytest.fixture(autouse=True)
    def _made_up(self, monkeypatch):
        made_up_tasks.install(monkeypatch)

    def test_examples_of_the_search_split_and_the_named_resource(self, tiny_run):
        env = make_pruning_env(tiny_run, reward={"name": "multi-objective", "resource": "kv", "examples": 8})
        assert len(env.examples) == made_up_tasks.SPLITS["arc_easy"]["validation"]
        assert list(env.prices) == ["kv"]
        env.reset(seed=0)
        info = env.step(np.linspace(-1, 1, 6).astype(np.float32))[4]
        assert {key for key in info if "/" in key} == {
            "objective/perplexity_ratio",
            "objective/accuracy",
            "objective/kv_saved",
        }
        assert info["tokens"] > 64

    def test_a_reward_that_names_no_resource_gets_those_that_need_no_measurement(self, tiny_run, install):
        install(
            "acme-cheap",
            "import ffgym\nclass Cheap(ffgym.Reward):\n    name, needs = 'cheap', frozenset({'cost'})\n"
            "    def __call__(self, pruned, dense):\n        return -sum(pruned.costs.values())\n"
            "@ffgym.hookimpl\ndef ffgym_rewards():\n    return [Cheap]\n",
        )
        assert list(make_pruning_env(tiny_run, reward={"name": "cheap"}).prices) == ["params", "macs", "kv"]
