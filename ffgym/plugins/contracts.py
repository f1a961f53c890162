"""Calls a plugin and holds it to its contract: shape, finiteness, range.

A plugin that breaks its contract is a `PluginError` that names the plugin, its package, and what was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from ffgym.errors import FFGymError, PluginError
from ffgym.plugins.bases import Agent, Criterion, Heuristic, Plugin, Reward
from ffgym.plugins.manager import described
from ffgym.types import Evaluation, LayerStats, Sublayer, SublayerView

if TYPE_CHECKING:
    import numpy as np
    import torch

Result = TypeVar("Result")
ROUNDING = 1e-6  # how far beyond -1 or 1 an importance may lie


def check_scores(criterion: Criterion, weight: torch.Tensor, stats: LayerStats, sublayer: Sublayer) -> torch.Tensor:
    """Let a criterion score one consumer.

    Args:
        criterion: the plugin.
        weight: the consumer's weight, shape (m, n), float32.
        stats: what the criterion needs.
        sublayer: whose consumer it is, for messages.

    Returns:
        shape (m, n) elements or (n,) channels as the criterion returned them, float32 or float64, finite, no gradient.

    Raises:
        PluginError: it raised, returned something else, or changed what it was given.
    """
    import torch

    given = {"weight": weight, **{name: value for name, value in vars(stats).items() if torch.is_tensor(value)}}
    before = _versions(given)
    with torch.no_grad():
        scores = called(criterion, lambda: criterion.score(weight, stats), f"scoring {sublayer.name}")
    where = f"{described(criterion)}, {sublayer.name}"
    m, n = weight.shape
    if changed := [name for name, version in _versions(given).items() if version != before[name]]:
        raise PluginError(
            f"{where}: score changed the {changed[0]} it was given, which others go on with",
            hint=f"Compute into a new tensor, e.g. {changed[0]}.clone().",
        )
    if not isinstance(scores, torch.Tensor):
        raise PluginError(f"{where}: score returned {type(scores).__name__}, not a tensor")
    if tuple(scores.shape) not in ((m, n), (n,)):
        raise PluginError(
            f"{where}: score returned shape {tuple(scores.shape)}, not ({m}, {n}) elements or ({n},) channels"
        )
    if scores.is_complex():
        raise PluginError(f"{where}: score returned {scores.dtype}, not real numbers")
    scores = scores.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if bad := int((~torch.isfinite(scores)).sum()):
        raise PluginError(f"{where}: {bad} of {scores.numel()} scores are NaN or infinite")
    return scores


def _versions(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Counts of changes in place; inference tensors have none, and cannot be changed where plugins run."""
    return {name: 0 if tensor.is_inference() else tensor._version for name, tensor in tensors.items()}


def check_importance(heuristic: Heuristic, sublayers: Sequence[SublayerView]) -> np.ndarray:
    """Let a heuristic give its importances.

    Args:
        heuristic: the plugin.
        sublayers: 2L views.

    Returns:
        shape (2L,), float32, in [-1, 1].

    Raises:
        PluginError: it raised, or returned something else.
    """
    import numpy as np

    answer = called(heuristic, lambda: heuristic.importance(sublayers), "giving importances")
    where = described(heuristic)
    try:
        importance = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError):
        raise PluginError(f"{where}: importance returned {type(answer).__name__}, not an array of numbers") from None
    if importance.shape != (len(sublayers),):
        raise PluginError(f"{where}: importance returned shape {importance.shape}, not ({len(sublayers)},)")
    wrong = np.flatnonzero(~(np.abs(importance) <= 1 + ROUNDING))
    if wrong.size:
        first = sublayers[wrong[0]].sublayer.name
        raise PluginError(f"{where}: importance of {first} is {importance[wrong[0]]}, not in [-1, 1]")
    return np.clip(importance, -1, 1).astype(np.float32)


def check_reward(reward: Reward, pruned: Evaluation, dense: Evaluation) -> float:
    """Let a reward compare two models whose losses are finite.

    Raises:
        PluginError: it raised, or returned something that is not a finite number.
    """
    value = called(reward, lambda: reward(pruned, dense), "computing a reward")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise PluginError(f"{described(reward)} returned {type(value).__name__}, not a number") from None
    if not math.isfinite(number):
        raise PluginError(
            f"{described(reward)} returned {number} for a pruned loss of {pruned.loss:.4g} and a dense loss of "
            f"{dense.loss:.4g} nats per token; a reward is finite wherever the losses are"
        )
    return number


def check_objectives(reward: Reward, pruned: Evaluation, dense: Evaluation) -> dict[str, float]:
    """Let a reward name its objectives for two models whose losses are finite.

    Raises:
        PluginError: it raised, or returned something that is not finite numbers by name.
    """
    answer = called(reward, lambda: reward.objectives(pruned, dense), "naming its objectives")
    try:
        numbers = {str(name): float(value) for name, value in answer.items()}
    except (AttributeError, TypeError, ValueError):
        raise PluginError(f"{described(reward)}: objectives returned {answer!r}, not numbers by name") from None
    if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise PluginError(f"{described(reward)}: objective {wrong[0]} is {numbers[wrong[0]]}, not finite")
    return numbers


def check_actions(actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What an agent lets an update measure; the environments hold it to this.

    Args:
        actions: what it passed to ``step``.
        shape: (episodes of an update, 2L).

    Returns:
        the actions, float32.

    Raises:
        ValueError: another shape, NaN, or outside [-1, 1].
    """
    import numpy as np

    array = np.asarray(actions)
    if array.shape != shape:
        raise ValueError(f"actions have shape {array.shape}, not {shape}: (episodes of an update, sublayers)")
    wrong = array[~(np.abs(array) <= 1 + ROUNDING)]
    if wrong.size:
        raise ValueError(f"actions must be finite and in [-1, 1], and one is {wrong[0]}")
    return np.asarray(np.clip(array, -1, 1), dtype=np.float32)


def check_recommendations(agent: Agent, observation: np.ndarray, sublayers: int) -> list[np.ndarray]:
    """Let an agent say what it believes in.

    Args:
        agent: the plugin.
        observation: (target sparsity, fidelity), shape (2,), float32.
        sublayers: 2L.

    Returns:
        importances, each of shape (2L,), float32, in [-1, 1].

    Raises:
        PluginError: it raised, or recommends something else.
    """
    return called(
        agent,
        lambda: [check_actions(action, (sublayers,)) for action in agent.recommend(observation)],
        "recommending importances",
    )


def called(plugin: Plugin, call: Callable[[], Result], doing: str) -> Result:
    """What a call into a plugin returns.

    Raises:
        PluginError: it raised anything that is no error of ffgym's.
    """
    try:
        return call()
    except FFGymError:
        raise
    except Exception as error:
        raise PluginError(
            f"{described(plugin)} failed while {doing}: {type(error).__name__}: {error}",
            hint="The plugin broke, not ffgym: report it to the package's author.",
        ) from error
