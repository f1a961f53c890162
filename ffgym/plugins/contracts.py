"""Calls plugins and checks that they keep their contract: shape, finiteness, range.

A broken contract, an exception and ``sys.exit`` become a `PluginError` that names the plugin, its package, and what was
wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeVar

from ffgym.errors import FFGymError, ModelError, PluginError, is_out_of_memory
from ffgym.plugins.bases import Agent, Criterion, Heuristic, Plugin, Reward
from ffgym.plugins.discovery import located
from ffgym.plugins.manager import described, is_built_in
from ffgym.types import Evaluation, JSONDict, LayerStats, Sublayer, SublayerView, Update

if TYPE_CHECKING:
    import numpy as np
    import torch

Result = TypeVar("Result")
OUR_DEFECT = "This is a bug: please report it to ffgym, with the command and its output."
THEIR_DEFECT = (
    "The fault is in the plugin, not in ffgym: report it to the package's author. If that is you: try again with"
    " FFGYM_TRACEBACK=1 in the environment, to see the whole traceback."
)
ROUNDING = 1e-6  # how far beyond -1 or 1 an importance may lie
STATE_HINT = (
    "A state is a dict of finite numbers, text, arrays, lists and dicts with text as keys. Once the plugin is mended,"
    " `ffgym run --resume` goes on."
)
CALL_ON_UPDATE = "Call on_update(ffgym.Update(index, rewards)) once after every step, index from 0."


def check_scores(criterion: Criterion, weight: torch.Tensor, stats: LayerStats, sublayer: Sublayer) -> torch.Tensor:
    """A criterion's scores of a consumer: shape (m, n) or (n,), float32 or float64, finite, without a gradient.

    Raises:
        ModelError: the weight is not finite, and so no score can be.
    """
    import torch

    with torch.no_grad():
        scores = call_plugin(criterion, lambda: criterion.score(weight, stats), f"scoring {sublayer.name}")
    where = f"{described(criterion)}, {sublayer.name}"
    m, n = weight.shape
    if not isinstance(scores, torch.Tensor):
        raise PluginError(f"{where}: score returned {type(scores).__name__}, not a tensor")
    if tuple(scores.shape) not in ((m, n), (n,)):
        raise PluginError(
            f"{where}: score returned shape {tuple(scores.shape)}, not ({m}, {n}) elements or ({n},) channels"
        )
    if scores.is_complex():
        raise PluginError(f"{where}: score returned complex numbers, not real ones")
    scores = scores.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if bad := int((~torch.isfinite(scores)).sum()):
        if not torch.isfinite(weight).all():
            raise ModelError(
                f"{sublayer.name}: its output weights hold NaN or infinity",
                hint="The model's files are damaged: write or download it again.",
            )
        raise PluginError(f"{where}: {bad} of {scores.numel()} scores are NaN or infinite")
    return scores


def check_importance(heuristic: Heuristic, sublayers: Sequence[SublayerView]) -> np.ndarray:
    """A heuristic's importances for 2L views, shape (2L,), float32, in [-1, 1]."""
    import numpy as np
    import torch

    answer: Any = call_plugin(heuristic, lambda: heuristic.importance(sublayers), "giving importances")
    where = described(heuristic)
    try:
        if answer is None:  # which numpy takes for NaN
            raise TypeError
        answer = answer.detach().cpu() if torch.is_tensor(answer) else answer
        if np.iscomplexobj(answer):
            raise TypeError
        importance = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise PluginError(
            f"{where}: importance returned {type(answer).__name__}, not an array of real numbers"
        ) from None
    if importance.shape != (len(sublayers),):
        raise PluginError(f"{where}: importance returned shape {importance.shape}, not ({len(sublayers)},)")
    wrong = np.flatnonzero(~(np.abs(importance) <= 1 + ROUNDING))
    if wrong.size:
        first = sublayers[wrong[0]].sublayer.name
        raise PluginError(f"{where}: importance of {first} is {importance[wrong[0]]}, not in [-1, 1]")
    return np.clip(importance, -1, 1).astype(np.float32)


def check_reward(reward: Reward, pruned: Evaluation, dense: Evaluation) -> float:
    """What a reward gives two models whose losses are finite: a finite number, at least its ``worst``."""
    value = call_plugin(reward, lambda: reward(pruned, dense), "computing a reward")
    try:
        number = as_number(value)
    except (TypeError, ValueError):
        raise PluginError(f"{described(reward)} returned {type(value).__name__}, not a number") from None
    if not math.isfinite(number):
        raise PluginError(
            f"{described(reward)} returned {number} for a pruned loss of {pruned.loss:.4g} and a dense loss of "
            f"{dense.loss:.4g} nats per token; a reward is finite wherever the losses are"
        )
    if number < reward.worst:
        raise PluginError(
            f"{described(reward)} returned {number:.6g}, less than its worst = {reward.worst:g}, the reward of an "
            "episode whose loss is not finite: breaking the model would pay",
            hint="Set worst to a number that no finite loss earns less than.",
        )
    return number


def as_number(value: Any) -> float:
    """A number of any library; ``TypeError`` or ``ValueError`` for what is none, text among it."""
    if isinstance(value, str | bytes):
        raise TypeError
    return float(value)


def check_objectives(
    reward: Reward, pruned: Evaluation, dense: Evaluation, *, names: Sequence[str] | None = None
) -> dict[str, float]:
    """A reward's objectives, by the names that it gave before, for two models whose losses are finite."""
    answer = call_plugin(reward, lambda: reward.objectives(pruned, dense), "naming its objectives")
    try:
        numbers = {str(name): as_number(value) for name, value in answer.items()}
    except (AttributeError, TypeError, ValueError):
        raise PluginError(f"{described(reward)}: objectives returned {answer!r}, not numbers by name") from None
    if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise PluginError(f"{described(reward)}: objective {wrong[0]} is {numbers[wrong[0]]}, not finite")
    if names is not None and set(names) != set(numbers):
        raise PluginError(
            f"{described(reward)}: objectives are called {', '.join(numbers) or 'nothing'} now, and were called "
            f"{', '.join(names) or 'nothing'} before",
            hint="Return the same names every time.",
        )
    return numbers if names is None else {name: numbers[name] for name in names}


def check_actions(actions: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The actions of an update as float32; raises ``ValueError`` for another shape, NaN, or values outside [-1, 1].

    The shape is (episodes of an update, 2L); there may be fewer episodes, at least one.
    """
    import numpy as np

    array = np.asarray(actions)
    if array.ndim != 2 or array.shape[1] != shape[1] or not 1 <= len(array) <= shape[0]:
        raise ValueError(f"actions have shape {array.shape}, not {shape}: (episodes of an update, sublayers)")
    wrong = array[~(np.abs(array) <= 1 + ROUNDING)]
    if wrong.size:
        raise ValueError(f"actions must be finite and in [-1, 1], and one is {wrong[0]}")
    return np.asarray(np.clip(array, -1, 1), dtype=np.float32)


def check_recommendations(agent: Agent, observation: np.ndarray, sublayers: int) -> list[np.ndarray]:
    """An agent's recommendations, each of shape (2L,), float32, in [-1, 1]."""
    import numpy as np

    proposals = call_plugin(agent, lambda: agent.recommend(observation), "recommending importances")
    try:
        rows = [np.asarray(proposal) for proposal in proposals]
        if wrong := [row.shape for row in rows if row.shape != (sublayers,)]:
            raise ValueError(f"shape {(len(rows), *wrong[0])}, not a list of arrays of shape ({sublayers},)")
        return [check_actions(row[None], (1, sublayers))[0] for row in rows]
    except (TypeError, ValueError) as error:  # a TypeError of text or None in an array
        raise PluginError(f"{described(agent)}: recommend returned unusable importances: {error}") from None


def check_state(agent: Agent) -> JSONDict:
    """An agent's state as plain data, arrays as lists; an empty one where it has none."""
    state: Any = call_plugin(agent, agent.state, "giving its state")
    state = {} if state is None else state
    if not isinstance(state, dict):
        raise PluginError(f"{described(agent)}: its state is a {type(state).__name__}", hint=STATE_HINT)
    try:
        plain: JSONDict = json.loads(json.dumps(state, default=lambda array: array.tolist(), allow_nan=False))
    except (AttributeError, TypeError, ValueError) as error:
        raise PluginError(f"{described(agent)}: its state cannot be stored: {error}", hint=STATE_HINT) from error
    return plain


def update_episodes(agent: Agent, episodes_per_update: int) -> tuple[int, int]:
    """How many episodes an agent's updates have, and what one costs in episodes without slopes."""

    def asked(method: str) -> int:
        call: Callable[[], Any] = partial(getattr(agent, method), episodes_per_update)
        answer = call_plugin(agent, call, "saying how many episodes an update has")
        if not (isinstance(answer, Integral) and int(answer) >= 1):
            raise PluginError(f"{described(agent)}: {method} returned {answer!r}, not a whole number from 1")
        return int(answer)

    return asked("update_size"), asked("update_cost")


def check_update(agent: Agent, update: Update, episodes: int) -> None:
    """Refuse what is no ``Update`` of so many episodes, and diagnostics that cannot be logged."""
    import numpy as np

    where = described(agent)
    if not isinstance(update, Update):
        raise PluginError(
            f"{where}: learn called on_update with {type(update).__name__}, not an Update", hint=CALL_ON_UPDATE
        )
    if not isinstance(update.index, int | np.integer):
        raise PluginError(f"{where}: the index of an update is {update.index!r}, not a number", hint=CALL_ON_UPDATE)
    if np.shape(update.rewards) != (episodes,):
        raise PluginError(
            f"{where}: the rewards of an update have shape {np.shape(update.rewards)}, not ({episodes},)",
            hint=CALL_ON_UPDATE,
        )
    if not isinstance(update.diagnostics, Mapping):
        raise PluginError(
            f"{where}: diagnostics are {type(update.diagnostics).__name__}, not a dict of numbers by name"
        )
    value: Any
    for name, value in update.diagnostics.items():
        try:
            as_number(value)
        except (TypeError, ValueError):
            raise PluginError(f"{where}: diagnostic {name!r} is {type(value).__name__}, not a number") from None


def call_plugin(plugin: Plugin, call: Callable[[], Result], doing: str) -> Result:
    """What a call into a plugin returns; an error that a built-in raises on purpose stays as it is."""
    try:
        return call()
    except FFGymError as error:
        if isinstance(error, PluginError) or is_built_in(plugin):
            raise
        raise PluginError(f"{described(plugin)}, {doing}: {error.message}", hint=error.hint) from error
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):  # not the plugin's fault
            raise
        raise PluginError(
            f"{described(plugin)} failed while {doing}: {located(error, plugin)}",
            hint=OUR_DEFECT if is_built_in(plugin) else THEIR_DEFECT,
        ) from error
