"""Calls a plugin and holds it to its contract: shape, finiteness, range.

A plugin that breaks its contract is a `PluginError` that names the plugin, its package, and what was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ffgym.errors import FFGymError, PluginError
from ffgym.plugins.bases import Criterion, Heuristic, Plugin, Reward
from ffgym.plugins.manager import described
from ffgym.types import Evaluation, LayerStats, Sublayer, SublayerView

if TYPE_CHECKING:
    import numpy as np
    import torch

Result = TypeVar("Result")


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
        PluginError: it raised, returned something else, or changed the weight.
    """
    import torch

    before = None if weight.is_inference() else weight._version  # counts changes in place; inference tensors do not
    with torch.no_grad():
        scores = _called(criterion, lambda: criterion.score(weight, stats), f"scoring {sublayer.name}")
    where = f"{described(criterion)}, {sublayer.name}"
    m, n = weight.shape
    if before is not None and weight._version != before:
        raise PluginError(f"{where}: score changed the weight", hint="Compute into a new tensor, e.g. weight.abs().")
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

    answer = _called(heuristic, lambda: heuristic.importance(sublayers), "giving importances")
    where = described(heuristic)
    try:
        importance = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError):
        raise PluginError(f"{where}: importance returned {type(answer).__name__}, not an array of numbers") from None
    if importance.shape != (len(sublayers),):
        raise PluginError(f"{where}: importance returned shape {importance.shape}, not ({len(sublayers)},)")
    rounding = 1e-6
    wrong = np.flatnonzero(~(np.abs(importance) <= 1 + rounding))
    if wrong.size:
        first = sublayers[wrong[0]].sublayer.name
        raise PluginError(f"{where}: importance of {first} is {importance[wrong[0]]}, not in [-1, 1]")
    return np.clip(importance, -1, 1).astype(np.float32)


def check_reward(reward: Reward, pruned: Evaluation, dense: Evaluation) -> float:
    """Let a reward compare two models whose losses are finite.

    Raises:
        PluginError: it raised, or returned something that is not a finite number.
    """
    value = _called(reward, lambda: reward(pruned, dense), "computing a reward")
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
    answer = _called(reward, lambda: reward.objectives(pruned, dense), "naming its objectives")
    try:
        numbers = {str(name): float(value) for name, value in answer.items()}
    except (AttributeError, TypeError, ValueError):
        raise PluginError(f"{described(reward)}: objectives returned {answer!r}, not numbers by name") from None
    if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise PluginError(f"{described(reward)}: objective {wrong[0]} is {numbers[wrong[0]]}, not finite")
    return numbers


def _called(plugin: Plugin, call: Callable[[], Result], doing: str) -> Result:
    try:
        return call()
    except FFGymError:
        raise
    except Exception as error:
        raise PluginError(
            f"{described(plugin)} failed while {doing}: {type(error).__name__}: {error}",
            hint="The plugin broke, not ffgym: report it to the package's author.",
        ) from error
