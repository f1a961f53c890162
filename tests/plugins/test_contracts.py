"""A plugin that breaks its contract is named, with its package, the sublayer, and what was wrong."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from ffgym.errors import DataError, ModelError, PluginError
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent, Criterion, Heuristic, Plugin, Reward
from ffgym.plugins.contracts import (
    call_plugin,
    check_actions,
    check_importance,
    check_objectives,
    check_reward,
    check_scores,
    check_state,
)
from ffgym.testing.toys import toy_views
from ffgym.types import Evaluation, LayerStats, Sublayer

SUBLAYER = Sublayer(3, "mlp", 5, 1, unit_params=1, unit_macs=1, depth=6)
DENSE = Evaluation((3.0, 3.0), 8)
PRUNED = Evaluation((3.5, 3.5), 8)


def made(base: type[Plugin], name: str, **methods: Callable[..., Any]) -> Any:
    return type("Made", (base,), {"__module__": __name__, "name": name, **methods})()


def answered(answer: Any) -> Any:
    return answer() if callable(answer) else answer


def importances(answer: Any) -> Heuristic:
    heuristic: Heuristic = made(Heuristic, "importances", importance=lambda self, sublayers: answered(answer))
    return heuristic


def number(answer: Any, objectives: Any = None) -> Reward:
    reward: Reward = made(
        Reward,
        "number",
        __call__=lambda self, pruned, dense: answered(answer),
        objectives=lambda self, pruned, dense: answered(objectives or {}),
    )
    return reward


def scored(answer: Callable[[torch.Tensor], Any], weight: torch.Tensor | None = None) -> torch.Tensor:
    criterion = made(Criterion, "scores", score=lambda self, weight, stats: answer(weight))
    return check_scores(criterion, torch.ones(4, 5) if weight is None else weight, LayerStats(), SUBLAYER)


def fail() -> None:
    raise KeyError("lost")


def test_elements_and_channels_pass() -> None:
    assert scored(lambda weight: weight).shape == (4, 5)
    assert scored(lambda weight: weight[0]).shape == (5,)


def test_scores_come_back_as_wide_floats_without_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 5))
    assert scored(lambda weight: weight.sum(0).to(torch.int64), weight).dtype == torch.float32
    assert scored(lambda weight: weight.sum(0).to(torch.bfloat16), weight).dtype == torch.float32
    assert scored(lambda weight: weight.double(), weight).dtype == torch.float64
    assert not scored(lambda weight: weight * 2, weight).requires_grad


def test_inference_tensors_can_be_scored() -> None:
    with torch.inference_mode():
        assert scored(lambda weight: weight.abs(), torch.ones(4, 5)).shape == (4, 5)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda weight: weight.T, r"shape \(5, 4\), not \(4, 5\) elements or \(5,\) channels"),
        (lambda weight: weight * torch.nan, "20 of 20 scores are NaN or infinite"),
        (lambda weight: torch.tensor([1, 2, 3, 4, math.inf]), "1 of 5 scores"),
        (lambda weight: [1.0] * 5, "list, not a tensor"),
        (lambda weight: torch.fft.fft(weight.norm(dim=0)), "score returned complex numbers, not real ones"),
        (
            lambda weight: sys.exit(3),
            r"scoring layer 3 mlp: SystemExit: 3 \(.*test_contracts\.py, line \d+\)",
        ),
    ],
)
def test_bad_scores_name_plugin_package_and_sublayer(answer: Callable[[torch.Tensor], Any], complaint: str) -> None:
    with pytest.raises(PluginError, match=complaint) as caught:
        scored(answer)
    assert f"criterion 'scores' (package {__name__.partition('.')[0]})" in str(caught.value)
    assert "layer 3 mlp" in str(caught.value)


def test_damaged_weights_are_not_the_fault_of_the_criterion() -> None:
    with pytest.raises(ModelError, match="layer 3 mlp: its output weights hold NaN or infinity"):
        scored(torch.abs, torch.tensor([[1.0, torch.nan]]))


def test_errors_that_a_plugin_raises_on_purpose_name_it() -> None:
    def complain(weight: torch.Tensor) -> None:
        raise DataError("too short", hint="Give more.")

    with pytest.raises(PluginError, match=r"criterion 'scores' .*, scoring layer 3 mlp: too short") as caught:
        scored(complain)
    assert caught.value.hint == "Give more."


def test_a_failure_says_the_line_of_the_plugin() -> None:
    """Not the line of the library that raised."""
    line = inspect.currentframe().f_lineno + 2  # type: ignore[union-attr]
    with pytest.raises(PluginError, match=rf"LinAlgError: .* \(.*test_contracts\.py, line {line}\)"):
        scored(lambda weight: np.linalg.inv(np.zeros((2, 2))))


def test_an_answer_that_is_refused_once_it_was_given_names_the_file_of_the_plugin() -> None:
    agent = made(Agent, "too-far", learn=lambda self, env, *, seed, on_update: None)
    with pytest.raises(PluginError, match=r"one is 2\.0 \(.*test_contracts\.py\)"):
        call_plugin(agent, partial(check_actions, np.full((1, 4), 2.0), (1, 4)), "learning")


def test_a_reward_below_its_worst_would_make_breaking_the_model_pay() -> None:
    with pytest.raises(PluginError, match=r"reward 'number' .* returned -2, less than its worst = 0"):
        check_reward(number(-2.0), PRUNED, DENSE)


@pytest.mark.parametrize(
    ("name", "options", "check"),
    [
        ("perplexity", {}, check_reward),
        ("multi-objective", {"accuracy": 0, "cost": 0}, check_reward),
        ("multi-objective", {"accuracy": 0, "cost": 0}, check_objectives),
    ],
)
def test_a_built_in_reward_that_overflows_says_what_is_wrong_with_the_losses(
    name: str, options: dict[str, Any], check: Callable[..., Any]
) -> None:
    """Norm weights of 1e38 make a dense model with finite losses of thousands of nats."""
    reward = manager.create("reward", name, options)
    with pytest.raises(ModelError, match=r"the reward overflows: the pruned loss is 3\.5 and the dense loss 5000"):
        check(reward, PRUNED, Evaluation((5000.0, 5000.0), 8))


def test_somebodys_reward_that_overflows_is_theirs() -> None:
    with pytest.raises(PluginError, match="failed while computing a reward: OverflowError") as caught:
        check_reward(number(lambda: math.exp(5000)), PRUNED, DENSE)
    assert "the package's author" in str(caught.value.hint)
    assert "FFGYM_TRACEBACK=1 in the environment" in str(caught.value.hint)


def test_a_built_in_that_breaks_is_not_blamed_as_somebodys_plugin() -> None:
    reward = manager.create("reward", "perplexity", {})
    with pytest.raises(PluginError, match="failed while computing a reward") as caught:
        check_reward(reward, PRUNED, None)  # type: ignore[arg-type]
    assert "report it to ffgym" in str(caught.value.hint)
    assert "The fault is in the plugin" not in str(caught.value.hint)


@pytest.mark.parametrize("answer", [[1, -1, 0.5, 1 + 1e-9], torch.tensor([1, -1, 0.5, 1], requires_grad=True)])
def test_importance_comes_back_as_float32(answer: Any) -> None:
    checked = check_importance(importances(answer), toy_views(2, frozenset()))
    assert checked.dtype == np.float32
    assert checked.tolist() == [1, -1, 0.5, 1]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (np.zeros(3), r"shape \(3,\), not \(4,\)"),
        ([0, 0, 2, 0], r"layer 1 attention is 2\.0, not in \[-1, 1\]"),
        ([0, math.nan, 0, 0], "layer 0 mlp is nan"),
        ("high", "str, not an array of real numbers"),
        ([0, 1j, 0, 0], "not an array of real numbers"),
        (torch.zeros(4, dtype=torch.complex64), "not an array of real numbers"),
        (None, "NoneType, not an array of real numbers"),
        (fail, "failed while giving importances: KeyError"),
    ],
)
def test_bad_importances_name_the_plugin(answer: Any, complaint: str) -> None:
    with pytest.raises(PluginError, match=complaint) as caught:
        check_importance(importances(answer), toy_views(2, frozenset()))
    assert "heuristic 'importances' (package" in str(caught.value)


def test_reward_comes_back_as_a_python_float() -> None:
    assert type(check_reward(number(np.float32(0.5)), PRUNED, DENSE)) is float


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (math.nan, "returned nan for a pruned loss of 3.5 and a dense loss of 3 nats"),
        (None, "NoneType, not a number"),
        ("1", "str, not a number"),
        (fail, "failed while computing a reward: KeyError"),
    ],
)
def test_bad_rewards_name_the_plugin(answer: Any, complaint: str) -> None:
    with pytest.raises(PluginError, match=complaint) as caught:
        check_reward(number(answer), PRUNED, DENSE)
    assert "reward 'number' (package" in str(caught.value)


def test_objectives_come_back_as_python_floats() -> None:
    answer = check_objectives(number(0.0, {"a": np.float32(0.5), "b": 1}), PRUNED, DENSE)
    assert answer == {"a": 0.5, "b": 1.0}
    assert {type(value) for value in answer.values()} == {float}
    assert check_objectives(number(1.0), PRUNED, DENSE) == {}, "a reward may have none"


def test_objectives_keep_their_names_and_their_order() -> None:
    assert list(check_objectives(number(0.0, {"b": 1, "a": 2}), PRUNED, DENSE, names=("a", "b"))) == ["a", "b"]
    with pytest.raises(PluginError, match="objectives are called b, c now, and were called a, b before"):
        check_objectives(number(0.0, {"b": 1, "c": 2}), PRUNED, DENSE, names=("a", "b"))


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({"a": math.nan}, "objective a is nan, not finite"),
        ({"a": "high"}, "not numbers by name"),
        (fail, "failed while naming its objectives: KeyError"),
    ],
)
def test_bad_objectives_name_the_plugin(answer: Any, complaint: str) -> None:
    with pytest.raises(PluginError, match=complaint) as caught:
        check_objectives(number(0.0, answer), PRUNED, DENSE)
    assert "reward 'number' (package" in str(caught.value)


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ([1.0], "its state is a list"),
        ({(1, 2): 2.0}, "its state cannot be stored: keys must be str"),
        ({"best": [{"at": np.array([1, np.inf])}]}, "its state cannot be stored: Out of range float"),
        ({"rng": np.random.default_rng()}, "its state cannot be stored: .*Generator"),
        (fail, "failed while giving its state: KeyError"),
    ],
)
def test_a_state_that_cannot_be_stored_names_the_agent(state: Any, complaint: str) -> None:
    agent = made(Agent, "stateful", learn=None, state=lambda self: answered(state))
    with pytest.raises(PluginError, match=r"agent 'stateful' \(package .*\)" + f".*{complaint}"):
        check_state(agent)


def test_a_state_of_plain_data_passes() -> None:
    state = {"mean": np.zeros(2, np.float32), "step": np.int64(3), "names": ("a", None), "on": True}
    plain = {"mean": [0.0, 0.0], "step": 3, "names": ["a", None], "on": True}
    assert check_state(made(Agent, "stateful", learn=None, state=lambda self: state)) == plain
    assert check_state(made(Agent, "stateless", learn=None, state=lambda self: None)) == {}


def test_too_little_memory_is_not_the_plugins_mistake() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError):
        call_plugin(number(0.0), full, "scoring")
