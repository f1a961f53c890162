"""One episode: what goes in, what comes out, and that nothing of it is left behind."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded

import ffgym
from ffgym.errors import BudgetError, DataError, ModelError, UnknownNameError
from ffgym.evaluation.perplexity import evaluate

ACTION = np.linspace(-1, 1, 6).astype(np.float32)


@pytest.fixture
def env(make_env):
    return make_env(sparsity=0.3)


def count_forwards(env):
    """Batches through the first layer."""
    calls = []
    first, *_ = env.prunable.family.layers(env.prunable.model)
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_spaces(env):
    assert env.action_space == spaces.Box(-1.0, 1.0, (6,), np.float32)
    assert env.observation_space == spaces.Box(0.0, 1.0, (2,), np.float32)
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    np.testing.assert_array_equal(observation, np.array([0.3, 1.0], np.float32))
    assert info == {}


def test_a_step_ends_the_episode_in_plain_python(env):
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(ACTION)
    assert observation in env.observation_space
    assert (type(reward), terminated, truncated) == (float, True, False)
    assert {type(terminated), type(truncated)} == {bool}
    assert set(info) == {"kept", "sparsity", "loss", "dense_loss", "tokens", "failed"}
    assert all(isinstance(value, int | float | np.ndarray) for value in info.values())
    assert info["kept"].dtype == np.int64


def test_a_step_before_reset_is_gymnasiums_error(env):
    with pytest.raises(ResetNeeded):
        env.step(ACTION)


def test_an_unknown_option_of_reset_is_refused_with_the_nearest(env):
    with pytest.raises(UnknownNameError, match=r"unknown reset option 'sparsty'\n  Did you mean 'sparsity'\?"):
        env.reset(options={"sparsty": 0.2})
    with pytest.raises(UnknownNameError, match="unknown reset option '1'"):
        env.reset(options={1: 2})


def test_draws_what_the_last_episode_kept_whatever_the_callers_style_is(env, dark_style):
    env.reset(seed=0)
    assert env.render() is None, "nobody asked for pictures"
    env.render_mode = "rgb_array"
    dense = env.render()
    env.step(ACTION)
    picture = env.render()
    assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
    assert not np.array_equal(picture, dense)
    np.testing.assert_array_equal(picture, env.render())
    with dark_style:
        np.testing.assert_array_equal(picture, env.render())


def test_the_reward_is_what_it_should_be(env):
    """Projection, cut, loss and dense loss, done by hand on a model of its own."""
    env.reset(seed=0, options={"subset": (3, 7)})
    _, reward, _, _, info = env.step(ACTION)
    allocation = env.budget.project(ACTION, 0.3)
    assert tuple(info["kept"]) == allocation.kept
    assert info["sparsity"] == allocation.sparsity >= 0.3
    assert info["tokens"] == 2 * 32
    assert info["failed"] == 0
    windows = env.windows[[3, 7]]
    dense = evaluate(env.prunable.model, windows).loss
    env.prunable.cut(allocation.kept)
    pruned = evaluate(env.prunable.model, windows).loss
    assert info["dense_loss"] == pytest.approx(dense, rel=1e-6)
    assert info["loss"] == pytest.approx(pruned, rel=1e-6)
    assert reward == pytest.approx(math.exp(dense - pruned), rel=1e-6)


def test_calibration_is_inside_the_reward_or_not(make_env):
    losses = []
    for calibrated in (True, False):
        env = make_env(sparsity=0.3, calibrated=calibrated)
        env.reset(options={"subset": (0, 1)})
        losses.append(env.step(ACTION)[4]["loss"])
        kept = env.budget.project(ACTION, 0.3).kept
        env.prunable.cut(kept, calibrated=calibrated)
        assert losses[-1] == pytest.approx(evaluate(env.prunable.model, env.windows[:2]).loss, rel=1e-6)
        env.prunable.restore()
    assert losses[0] != losses[1]


def test_reset_evaluates_nothing_and_is_seeded(env):
    calls = count_forwards(env)
    subsets = []
    for seed in (5, 5, 6):
        env.reset(seed=seed)
        subsets.append(env._subset)
    assert calls == []
    assert subsets[0] == subsets[1] != subsets[2]
    assert len(set(subsets[0])) == 2


def test_another_thread_is_refused_during_a_step_and_welcome_after_it(env):
    env.reset(options={"subset": (0, 1)})
    alone, refused = env.step(ACTION), []
    first, *_ = env.prunable.family.layers(env.prunable.model)
    with ThreadPoolExecutor(1) as other:

        def disturb(*_):
            if not refused:
                refused.append(other.submit(env.reset, options={"sparsity": 0.5, "subset": (2,)}).exception())
                refused.append(other.submit(env.step, -ACTION).exception())

        with first.register_forward_pre_hook(disturb):
            disturbed = env.step(ACTION)
        assert {type(error) for error in refused} == {ModelError}
        assert repr(disturbed) == repr(alone)
        assert repr(other.submit(env.step, ACTION).result()) == repr(alone)


class TestTasks:
    def test_sparsity_and_subset_come_in_through_options(self, env):
        observation, _ = env.reset(options={"sparsity": 0.5, "subset": (2,)})
        np.testing.assert_array_equal(observation, np.array([0.5, 0.5], np.float32))
        _, _, _, _, info = env.step(ACTION)
        assert info["sparsity"] >= 0.5
        assert info["tokens"] == 32
        observation, _ = env.reset()
        np.testing.assert_array_equal(observation, np.array([0.3, 1.0], np.float32))

    def test_a_sparsity_out_of_reach_is_refused_at_once(self, env, make_env):
        with pytest.raises(BudgetError, match="out of reach"):
            env.reset(options={"sparsity": 0.99})
        with pytest.raises(BudgetError, match="out of reach"):
            make_env(sparsity=0.99)

    @pytest.mark.parametrize("subset", [[], (), [12], [0, -1], np.array([], dtype=np.int64)])
    def test_a_subset_of_nothing_or_of_windows_that_are_not_there_is_refused(self, env, subset):
        with pytest.raises(DataError, match=r"the subset \[.*\] cannot be used .* windows 0 to 11") as raised:
            env.reset(options={"subset": subset})
        assert "leave the option out" in raised.value.hint

    @pytest.mark.parametrize(
        "refused", [{"sparsity": 0.99}, {"sparsity": 0.5, "subset": [99]}, {"subset": [0], "examples": [0]}]
    )
    def test_a_task_that_is_refused_leaves_the_one_before_it(self, env, refused):
        env.reset(seed=0)
        before = env.step(ACTION)
        with pytest.raises((BudgetError, DataError)):
            env.reset(seed=1, options=refused)
        assert repr(env.step(ACTION)) == repr(before)
        drawn = env.np_random.random()
        env.reset(seed=0)
        assert drawn == env.np_random.random(), "nor does it seed anything"

    @pytest.mark.parametrize(
        ("options", "wanted"),
        [
            ({"sparsity": None}, "a number"),
            ({"sparsity": "0.3"}, "a number"),
            ({"sparsity": [0.1, 0.2]}, "a number"),
            ({"sparsity": np.array([0.1, 0.2])}, "a number"),
            ({"subset": 0}, "a list of whole numbers"),
            ({"subset": "01"}, "a list of whole numbers"),
            ({"subset": [0.7]}, "a list of whole numbers"),
            ({"subset": [True, False]}, "a list of whole numbers"),  # a mask, and not windows 1 and 0
            ({"subset": torch.tensor([True, False])}, "a list of whole numbers"),
            ({"examples": 0}, "a list of whole numbers"),
            ({"slopes": "no"}, "True or False"),
        ],
    )
    def test_an_option_of_another_type_is_refused(self, env, options, wanted):
        ((name, _),) = options.items()
        with pytest.raises(DataError, match=rf"reset option '{name}' is .*, and it should be {wanted}") as raised:
            env.reset(options=options)
        assert "leave the option out" in raised.value.hint

    def test_options_may_be_of_numpy_and_torch(self, env):
        env.reset(options={"subset": np.array([3, 7])})
        assert env.step(ACTION)[4]["tokens"] == 2 * 32
        env.reset(options={"sparsity": np.float32(0.5), "subset": torch.tensor([2]), "slopes": np.True_})
        info = env.step(ACTION)[4]
        assert info["sparsity"] >= 0.5
        assert "slopes" in info
        assert env.reset(options={"sparsity": torch.tensor(0.25)})[0][0] == 0.25

    @pytest.mark.parametrize("options", [{"episode_windows": 13}, {"episode_windows": 0}, {"reserved": -3}])
    def test_an_episode_that_does_not_fit_the_split_is_refused(self, make_env, options):
        ((name, number),) = options.items()
        with pytest.raises(DataError, match=f"{name} = {number} .*do not fit a search split of 12 windows"):
            make_env(**options)

    def test_draw_gives_different_windows(self, env):
        drawn = env.draw(np.random.default_rng(0), 12)
        assert drawn == tuple(range(12))
        assert len(set(env.draw(np.random.default_rng(0), 5))) == 5


class TestFailures:
    @pytest.mark.parametrize("loss", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_earns_the_worst_and_is_recorded(self, env, break_half, loss):
        break_half(env.prunable.halves[1], loss)
        env.reset(seed=0)
        _, reward, terminated, _, info = env.step(ACTION)
        assert reward == env.reward.worst == 0.0
        assert terminated is True
        assert info["failed"] == 1
        assert not math.isfinite(info["loss"])
        assert math.isfinite(info["dense_loss"])
        assert env.prunable.kept == env.prunable.dense_units

    def test_a_reward_may_have_another_worst(self, env, break_half):
        class Logarithmic(ffgym.Reward):
            name = "log"
            worst = -50.0

            def __call__(self, pruned, dense):
                return dense.loss - pruned.loss

        env.reward = Logarithmic()
        break_half(env.prunable.halves[1])
        env.reset(seed=0)
        assert env.step(ACTION)[1] == -50.0

    def test_actions_that_are_not_finite_are_refused(self, env):
        env.reset(seed=0)
        with pytest.raises(BudgetError, match="finite"):
            env.step(np.full(6, np.nan, np.float32))

    @pytest.mark.parametrize(
        ("action", "said"),
        [
            (["much"] * 6, "their type is str_"),
            (np.full(6, "much", object), "could not convert string to float"),
            ([0.5j] * 6, "their type is complex128"),
            (torch.zeros(6, requires_grad=True), r".* requires grad\. Use tensor\.detach"),
        ],
    )
    def test_actions_that_are_no_real_numbers_are_refused(self, env, action, said):
        env.reset(seed=0)
        with pytest.raises(DataError, match=f"actions must be real numbers: {said}") as refused:
            env.step(action)
        assert "one importance" in refused.value.hint
