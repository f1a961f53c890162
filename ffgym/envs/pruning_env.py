"""One decision, one episode: importances in, reward out (docs/design.md, The environment).

``step`` projects the importances onto the budget, cuts the model, measures it on the subset that ``reset`` chose, puts
the dense model back and ends the episode. Nothing here changes over time: ramps and new text come in through
``reset(options=...)``.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from ffgym.data.examples import EncodedExample
from ffgym.errors import DataError, ModelError, UnknownNameError, first_line
from ffgym.evaluation.evaluator import Evaluator, ModelEvaluator, Request
from ffgym.models.cut import PrunableModel
from ffgym.plugins.bases import SLOPE_PASSES, Reward
from ffgym.plugins.contracts import check_objectives, check_reward
from ffgym.pruning.budget import Budget
from ffgym.report.figures import default_style, draw_units_kept
from ffgym.types import Allocation, Evaluation, OnShare, do_nothing

Info = dict[str, Any]

MEASURED = frozenset({"kl", "reverse_kl", "accuracy"})  # on the model; costs follow from the units kept
OBJECTIVE = "objective/"  # prefix of the info's keys
RESET_OPTIONS = ("sparsity", "subset", "examples", "slopes")


@dataclass(frozen=True)
class Trial:
    """An allocation to be measured and judged, on text of its own."""

    allocation: Allocation  # what is kept
    subset: tuple[int, ...]  # indices of search windows
    examples: tuple[int, ...] = ()  # indices of task examples
    # the importances that gave the allocation, shape (2L,), if slopes by them are wanted
    slopes_at: np.ndarray | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a trial."""

    pruned: Evaluation  # the cut model
    dense: Evaluation  # the dense model on the same windows and examples
    tokens: int  # what it costs the search, slopes included
    reward: float  # what it earns: the reward's worst where it failed
    failed: bool  # the cut model's losses or divergences are not finite
    # what the reward weighs, by name, higher = better; empty where it weighs nothing, or failed
    objectives: dict[str, float]
    # derivative by importance of what the reward falls with, else of the loss, shape (2L,), float64, nats per token and
    # importance, all 0 where the cut model's loss is not finite; None where they were not asked for
    slopes: np.ndarray | None
    slope_tokens: int  # how many of tokens the slopes took


class OneThread:
    """A block that one thread at a time may be in; another one is refused at once, with ``ModelError``.

    It would measure what the first one has cut the model to, even as dense.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise ModelError(
                "another thread is using this environment or its model, which serve one thread at a time",
                hint="Make an environment for each thread, or use one thread (n_jobs=1).",
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[OneThread], tuple[()]]:
        """A lock cannot be copied or sent; an environment can, and its copy gets a lock of its own."""
        return OneThread, ()


class PruningEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A model, a pruning path, a budget and a reward as a one-step task.

    Action: importances, ``Box(-1, 1, (2L,), float32)``, order layer 0 attention, layer 0 mlp, layer 1 attention, ...
    Observation: (target sparsity, fidelity), ``Box(0, 1, (2,), float32)``.

    ``reset(options={"sparsity": p, "subset": indices, "examples": indices})`` sets the task: target sparsity, and the
    search windows and task examples that the episode is measured on. Without options the sparsity is the constructor's
    and the subsets are drawn.
    With ``"slopes": True`` the step's info also holds ``slopes`` (float64, (2L,)), the derivative by importance of what
    the reward falls with, else of the loss, on the windows that were measured. Their passes count in ``tokens``:
    ``slope_tokens`` of them.

    The step's info holds ``kept`` (int64, (2L,)), ``sparsity``, ``loss`` and ``dense_loss`` (nats per token),
    ``tokens`` (evaluated in this step), ``failed`` (0 or 1: the loss was not finite) and, where the reward weighs
    objectives and the episode did not fail, ``objective/NAME`` for each.

    With ``render_mode = "rgb_array"``, ``render`` draws what the last episode kept.

    Args:
        windows: search split, token ids, shape (windows, length), int64.
        sparsity: default target.
        episode_windows: windows of an episode at full fidelity.
        reserved: how many of ``windows``, the last ones, are not drawn for rewards: the finals are measured on them.
        calibrated: whether episodes see refitted consumers ("calibration inside the reward").
        tokens_per_batch: tokens of one forward pass.
        examples: multiple-choice examples, for a reward that needs ``accuracy``; an episode at full fidelity is
            measured on ``reward.examples`` of them.
        prices: budgets by resource, for a reward that needs ``cost``; only their prices are used.
        executor: has allocations measured; this process measures them where left out.

    Attributes:
        on_close: called by ``close``.
        one_thread: held by ``reset`` and ``step``; while one thread is in either, another one is refused.

    Raises:
        BudgetError: a sparsity out of reach.
        DataError: an episode that does not fit the windows, or a reward that needs examples or prices which are not
            given.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        prunable: PrunableModel,
        reward: Reward,
        windows: torch.Tensor,
        budget: Budget,
        *,
        sparsity: float = 0.2,
        episode_windows: int = 2,
        reserved: int = 0,
        calibrated: bool = True,
        tokens_per_batch: int = 4096,
        examples: Sequence[EncodedExample] = (),
        prices: Mapping[str, Budget] | None = None,
        executor: Evaluator | None = None,
    ) -> None:
        budget.check(sparsity)
        if episode_windows < 1 or not 0 <= reserved <= len(windows) - episode_windows:
            raise DataError(
                f"episode_windows = {episode_windows} and reserved = {reserved} do not fit a search split of "
                f"{len(windows)} windows: an episode is measured on 1 or more of those that are not reserved",
                hint="Change search.episode_tokens or search.final_tokens, or take more text (data.search_tokens).",
            )
        self._tasks, self._finals_tasks = _by_task(reward, examples, reserved / episode_windows)
        self.examples = tuple(examples)
        self.prices = dict(prices or {})
        unpriced = [name for name in reward.resources if name not in self.prices]
        if "cost" in reward.needs and (unpriced or not self.prices):
            raise DataError(
                f"reward {reward.name!r} needs cost, and the environment was given no prices for "
                f"{', '.join(unpriced) or 'any resource'}",
                hint="Give PruningEnv prices, a Budget for each resource, or use a reward that does not need cost.",
            )
        self.prunable = prunable
        self.reward = reward
        self.windows = windows
        self.budget = budget
        self.sparsity = sparsity
        self.episode_windows = episode_windows
        self.reserved = reserved
        self.calibrated = calibrated
        self.tokens_per_batch = tokens_per_batch
        self.action_space = spaces.Box(-1.0, 1.0, (len(prunable.sublayers),), np.float32)
        self.observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self.executor = executor or ModelEvaluator(
            prunable, windows, examples=examples, calibrated=calibrated, tokens_per_batch=tokens_per_batch
        )
        self.one_thread = OneThread()
        self.on_close: Callable[[], None] = do_nothing
        self._target = sparsity
        self._subset: tuple[int, ...] = ()
        self._examples: tuple[int, ...] = ()
        self._slopes = False
        self._objectives: tuple[str, ...] | None = None
        self._last: tuple[Allocation, float | None] = budget.allocation(prunable.dense_units), None

    def __str__(self) -> str:  # its wrappers show it
        model, sublayers = type(self.prunable.model).__name__, len(self.prunable.sublayers)
        return f"<PruningEnv: {model}, {sublayers} sublayers, {self.sparsity:.1%} sparsity ({self.budget.resource})>"

    __repr__ = __str__

    @property
    def window_tokens(self) -> int:
        """Tokens in one window, and so what evaluating it costs the search."""
        return int(self.windows.shape[1])

    @property
    def episode_tokens(self) -> int:
        """Tokens in the windows of an episode at full fidelity."""
        return self.episode_windows * self.window_tokens

    def recall(self, objectives: Sequence[str]) -> None:
        """Take note of what an episode that was measured before called its objectives."""
        self._objectives = tuple(objectives)

    def draw(self, rng: np.random.Generator, windows: int) -> tuple[int, ...]:
        """Indices of ``windows`` different search windows that are not reserved."""
        return tuple(int(i) for i in np.sort(rng.choice(len(self.windows) - self.reserved, windows, replace=False)))

    def draw_examples(self, rng: np.random.Generator, windows: int, *, finals: bool = False) -> tuple[int, ...]:
        """Indices of different examples to go with ``windows`` windows; none for a reward that needs no accuracy.

        There are as many of every task, as far as it has them. Those of the finals are reserved for them, as windows
        are.
        """
        drawn: list[int] = []
        for owned in (self._finals_tasks if finals else self._tasks).values():
            wanted = -(-self.reward.examples * windows // (self.episode_windows * len(self._tasks)))
            drawn.extend(rng.choice(owned, min(len(owned), wanted), replace=False).tolist())
        return tuple(sorted(drawn))

    def tokens(self, subset: Sequence[int], examples: Sequence[int] = ()) -> int:
        """What measuring one allocation on these windows and examples costs the search, in tokens."""
        return len(subset) * self.window_tokens + sum(self.examples[i].tokens for i in examples)

    def slope_tokens(self, trial: Trial) -> int:
        """What the slopes of a trial cost in addition, in tokens."""
        return 0 if trial.slopes_at is None else SLOPE_PASSES * len(trial.subset) * self.window_tokens

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Info]:
        """Set the task; evaluates nothing.

        Raises:
            BudgetError: a sparsity out of reach.
            DataError: an option of another type; a subset that is empty, or names windows that are not there; examples
                that are not there, or none for a reward that needs accuracy.
            ModelError: another thread is using the environment.
            UnknownNameError: an option that does not exist.
        """
        options = options or {}
        for option in options:
            if option not in RESET_OPTIONS:
                raise UnknownNameError("reset option", str(option), RESET_OPTIONS)
        # All is checked before anything changes: a task that is refused leaves the one before it.
        target = _number("sparsity", options.get("sparsity", self.sparsity))
        self.budget.check(target)
        subset, examples = options.get("subset"), options.get("examples")
        if subset is not None:
            subset = _indices("subset", subset, "search windows", len(self.windows), needed=True)
        if examples is not None:
            examples = _indices("examples", examples, "task examples", len(self.examples), needed=bool(self._tasks))
        slopes = options.get("slopes", False)
        if not isinstance(slopes, bool | np.bool_):
            raise _mistyped("slopes", slopes, "True or False")
        with self.one_thread:
            super().reset(seed=seed)
            self._target, self._slopes = target, bool(slopes)
            self._subset = self.draw(self.np_random, self.episode_windows) if subset is None else subset
            self._examples = self.draw_examples(self.np_random, len(self._subset)) if examples is None else examples
            return self.observation(), {}

    def observation(self) -> np.ndarray:
        """(target sparsity, fidelity), shape (2,), float32."""
        fidelity = min(1.0, len(self._subset) / self.episode_windows)
        return np.array([self._target, fidelity], dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, Info]:
        """Prune as the action says, measure, put the dense model back.

        Raises:
            BudgetError: an action of another shape, or not finite.
            DataError: an action of anything but real numbers.
            ModelError: another thread is using the environment.
            ResetNeeded: before the first ``reset``.
        """
        with self.one_thread:
            if not self._subset:
                raise ResetNeeded("Cannot call env.step() before calling env.reset()")
            action = real_numbers(action)
            allocation = self.budget.project(action, self._target)
            trial = Trial(allocation, self._subset, self._examples, slopes_at=action if self._slopes else None)
            (outcome,) = self.outcomes([trial])
            self._last = allocation, outcome.reward
            info: Info = {
                "kept": np.array(allocation.kept, dtype=np.int64),
                "sparsity": allocation.sparsity,
                "loss": outcome.pruned.loss,
                "dense_loss": outcome.dense.loss,
                "tokens": outcome.tokens,
                "failed": int(outcome.failed),
                **{OBJECTIVE + name: value for name, value in outcome.objectives.items()},
            }
            if outcome.slopes is not None:
                info |= {"slopes": outcome.slopes, "slope_tokens": outcome.slope_tokens}
            return self.observation(), outcome.reward, True, False, info

    def render(self) -> np.ndarray | None:
        """Draw what the last episode kept of every sublayer, or the dense model before the first.

        Returns:
            shape (height, width, 3), uint8; ``None`` without a render mode.
        """
        return self.picture(*self._last) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """End the workers, where there are some."""
        self.on_close()

    @default_style()
    def picture(self, allocation: Allocation, reward: float | None = None) -> np.ndarray:
        """An allocation and its reward as a picture, shape (height, width, 3), uint8."""
        title = f"{allocation.sparsity:.1%} sparsity ({allocation.resource})"
        title = title if reward is None else f"Reward {reward:.4g} at {title}"
        figure = draw_units_kept(self.budget.sublayers, {"kept": allocation}, title)
        canvas: Any = figure.canvas
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def outcomes(self, trials: Sequence[Trial], on_progress: OnShare = do_nothing) -> Iterator[Outcome]:
        """Measure all trials at once (equal ones only once), then judge one after another.

        ``on_progress`` is called with the share that has been measured, from 0 to 1.
        """
        requests = [self._request(t.allocation.kept, t, slopes=t.slopes_at is not None) for t in trials]
        references = [self._request(self.prunable.dense_units, trial) for trial in trials]
        once = list(dict.fromkeys([*references, *requests]))
        measured = zip(once, self.executor.measure(once, on_progress), strict=True)
        found = {request: replace(each, costs=self._costs(request.kept)) for request, each in measured}
        for trial, request, reference in zip(trials, requests, references, strict=True):
            yield self._outcome(trial, found[request], found[reference])

    def _request(self, kept: tuple[int, ...], trial: Trial, *, slopes: bool = False) -> Request:
        needs = MEASURED & self.reward.needs  # a plugin's may be a set
        if not slopes:
            return Request(kept, trial.subset, trial.examples, needs)
        return Request(kept, trial.subset, trial.examples, needs | {"slopes"}, self.reward.falls_with or "loss")

    def _outcome(self, trial: Trial, pruned: Evaluation, dense: Evaluation) -> Outcome:
        reward, objectives, slopes = float(self.reward.worst), dict[str, float](), None
        if pruned.finite:
            reward = check_reward(self.reward, pruned, dense)
            objectives = check_objectives(self.reward, pruned, dense, names=self._objectives)
            self._objectives = tuple(objectives)
        if trial.slopes_at is not None and pruned.slopes is not None:
            slopes = self.budget.importance_slopes(trial.slopes_at, trial.allocation.kept, pruned.slopes)
            slopes = slopes if np.isfinite(slopes).all() else np.zeros_like(slopes)
        slope_tokens = self.slope_tokens(trial)
        tokens = self.tokens(trial.subset, trial.examples) + slope_tokens
        return Outcome(pruned, dense, tokens, reward, not pruned.finite, objectives, slopes, slope_tokens)

    def _costs(self, kept: Sequence[int]) -> dict[str, float] | None:
        if "cost" not in self.reward.needs:
            return None
        return {resource: prices.allocation(kept).cost for resource, prices in self.prices.items()}


def real_numbers(actions: Any) -> np.ndarray:
    """Actions as an array; raises ``DataError`` for text, complex numbers, and what NumPy cannot read."""
    try:
        array = np.asarray(actions)
        array = array.astype(np.float64) if array.dtype == object else array
        if array.dtype.kind in "biuf":
            return array
        why = f"their type is {array.dtype.type.__name__}"
    except (RuntimeError, TypeError, ValueError) as error:  # torch's is a RuntimeError for a tensor that requires grad
        why = first_line(error)
    raise DataError(f"actions must be real numbers: {why}", hint="Give one importance in [-1, 1] for each sublayer.")


def _number(option: str, given: Any) -> float:
    if isinstance(given, SupportsFloat) and not isinstance(given, bool):
        with suppress(TypeError):  # an array of several numbers
            return float(given)
    raise _mistyped(option, given, "a number")


def _indices(option: str, given: Sequence[int], what: str, count: int, *, needed: bool) -> tuple[int, ...]:
    """Indices of what the environment has so many of; at least one where an episode needs it."""
    try:
        indices = tuple(_index(each) for each in given)
    except TypeError:
        raise _mistyped(option, given, "a list of whole numbers") from None
    if (needed and not indices) or not all(0 <= index < count for index in indices):
        there = f"{what} 0 to {count - 1}" if count else f"no {what}"
        least = ", and an episode needs at least one" if needed else ""
        raise DataError(
            f"the {option} {list(indices)} cannot be used for an episode: this environment has {there}{least}",
            hint=f"Give indices of {what}, or leave the option out to draw them at random.",
        )
    return indices


def _index(given: Any) -> int:
    if isinstance(given, bool) or getattr(given, "dtype", None) is torch.bool:  # of a mask, and not 0 or 1
        raise TypeError
    return operator.index(given)


def _mistyped(option: str, value: object, wanted: str) -> DataError:
    return DataError(
        f"the reset option {option!r} is {value!r}, and it should be {wanted}",
        hint="Correct it, or leave the option out.",
    )


def _by_task(
    reward: Reward, examples: Sequence[EncodedExample], reserved: float
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Indices of the examples of each task: those for episodes, and those that are reserved for the finals.

    The finals get the last ones, at most half; where a task has too few to share, both have them all.

    Args:
        reserved: for how many episodes' windows the finals want examples.

    Raises:
        DataError: the reward needs some and there are none, or fewer than it asks for.
    """
    if "accuracy" not in reward.needs:
        return {}, {}
    found: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        found.setdefault(example.task, []).append(index)
    if not found:
        raise DataError(
            f"reward {reward.name!r} needs accuracy, and the environment was given no task examples",
            hint="Give PruningEnv examples, or use a reward that does not need accuracy.",
        )
    asked = -(-reward.examples // len(found))
    short = [task for task, owned in found.items() if len(owned) < asked]
    if short:
        raise DataError(
            f"reward {reward.name!r} asks for {reward.examples} examples an episode from {len(found)} tasks, and "
            f"{short[0]} has {len(found[short[0]])}",
            hint="Ask for fewer examples.",
        )
    episodes, finals = {}, {}
    for task, owned in found.items():
        kept_back = min(math.ceil(asked * reserved), len(owned) // 2, len(owned) - asked)
        episodes[task] = owned[: len(owned) - kept_back]
        finals[task] = owned[len(owned) - kept_back :] or owned
    return episodes, finals
