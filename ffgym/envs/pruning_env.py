"""One decision, one episode: importances in, reward out (docs/design.md, The environment).

``step`` projects the importances onto the budget, cuts the model, measures it on the subset that ``reset`` chose, puts
the dense model back and ends the episode. Nothing in here changes over time: what is ramped or redrawn comes in
through ``reset(options=...)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from ffgym.data.examples import EncodedExample
from ffgym.errors import DataError, ModelError
from ffgym.evaluation.divergence import evaluate_against, remember
from ffgym.evaluation.multiple_choice import answered_right, task_accuracy
from ffgym.evaluation.perplexity import evaluate
from ffgym.models.slopes import unit_slopes
from ffgym.models.surgery import PrunableModel
from ffgym.plugins.bases import SLOPE_PASSES, Reward
from ffgym.plugins.contracts import check_objectives, check_reward
from ffgym.pruning.budget import Budget
from ffgym.types import Allocation, Evaluation

Info = dict[str, Any]

DIVERGENCES = frozenset({"kl", "reverse_kl"})
OBJECTIVE = "objective/"  # prefix of the info's keys


@dataclass(frozen=True)
class Judgement:
    """What came of measuring one allocation.

    Attributes:
        pruned: the cut model.
        dense: the dense model on the same windows and examples.
        reward: what the reward says, or its ``worst``.
        failed: the cut model's losses are not finite.
        objectives: what the reward weighs, by name, higher = better.
    """

    pruned: Evaluation
    dense: Evaluation
    reward: float
    failed: bool
    objectives: dict[str, float]


class PruningEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A model, a pruning path, a budget and a reward as a one-step task.

    Action: importances, ``Box(-1, 1, (2L,), float32)``, order layer 0 attention, layer 0 mlp, layer 1 attention, ...
    Observation: (target sparsity, fidelity), ``Box(0, 1, (2,), float32)``.

    ``reset(options={"sparsity": p, "subset": indices, "examples": indices})`` sets the task: target sparsity, and the
    search windows and task examples that the episode is measured on. Without options the sparsity is the constructor's
    and the subsets are drawn.
    With ``"slopes": True`` the step's info also holds ``slopes`` (float64, (2L,)), the derivative of the loss by
    importance on the windows that were measured, and their passes count in ``tokens``: ``slope_tokens`` of them.

    The step's info holds ``kept`` (int64, (2L,)), ``sparsity``, ``loss`` and ``dense_loss`` (nats per token),
    ``tokens`` (evaluated in this step), ``failed`` (0 or 1: the loss was not finite) and, where the reward weighs
    objectives and the episode did not fail, ``objective/NAME`` for each.

    Args:
        prunable: the prepared model.
        reward: judges an episode.
        windows: search split, token ids, shape (windows, length), int64.
        budget: what an allocation may cost.
        sparsity: default target.
        episode_windows: windows of an episode at full fidelity.
        calibrated: whether episodes see refitted consumers ("calibration inside the reward").
        tokens_per_batch: tokens of one forward pass.
        examples: multiple-choice examples, for a reward that needs ``accuracy``; an episode at full fidelity is
            measured on ``reward.examples`` of them.
        prices: budgets by resource, for a reward that needs ``cost``; only their prices are used.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        prunable: PrunableModel,
        reward: Reward,
        windows: torch.Tensor,
        budget: Budget,
        *,
        sparsity: float = 0.2,
        episode_windows: int = 2,
        calibrated: bool = True,
        tokens_per_batch: int = 4096,
        examples: Sequence[EncodedExample] = (),
        prices: Mapping[str, Budget] | None = None,
    ) -> None:
        budget.check(sparsity)
        if not 1 <= episode_windows <= len(windows):
            raise DataError(
                f"an episode of {episode_windows} windows does not fit the search split of {len(windows)}",
                hint="Lower search.episode_tokens, or raise data.search_tokens.",
            )
        self._tasks = _by_task(reward, examples)
        self.examples = tuple(examples)
        self.prices = dict(prices or {})
        self.prunable = prunable
        self.reward = reward
        self.windows = windows
        self.budget = budget
        self.sparsity = sparsity
        self.episode_windows = episode_windows
        self.calibrated = calibrated
        self.tokens_per_batch = tokens_per_batch
        self.action_space = spaces.Box(-1.0, 1.0, (len(prunable.sublayers),), np.float32)
        self.observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self._dense: dict[int, float] = {}
        self._dense_hidden: dict[int, torch.Tensor] = {}
        self._dense_right: dict[int, bool] = {}
        self._target = sparsity
        self._subset: tuple[int, ...] = ()
        self._examples: tuple[int, ...] = ()
        self._slopes = False
        self._objectives: tuple[str, ...] | None = None

    @property
    def window_tokens(self) -> int:
        """Tokens in one window: what the search is charged for evaluating it."""
        return int(self.windows.shape[1])

    def draw(self, rng: np.random.Generator, windows: int) -> tuple[int, ...]:
        """Indices of ``windows`` different search windows."""
        return tuple(int(i) for i in np.sort(rng.choice(len(self.windows), windows, replace=False)))

    def draw_examples(self, rng: np.random.Generator, windows: int) -> tuple[int, ...]:
        """Indices of different examples to go with ``windows`` windows, as many of every task, as far as it has them.

        Nothing is drawn where the reward needs no accuracy.
        """
        drawn: list[int] = []
        for owned in self._tasks.values():
            wanted = -(-self.reward.examples * windows // (self.episode_windows * len(self._tasks)))
            drawn.extend(rng.choice(owned, min(len(owned), wanted), replace=False).tolist())
        return tuple(sorted(drawn))

    def tokens(self, subset: Sequence[int], examples: Sequence[int] = ()) -> int:
        """What the search is charged for measuring one allocation on these windows and examples."""
        return len(subset) * self.window_tokens + sum(self.examples[i].tokens for i in examples)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Info]:
        """Set the task; evaluates nothing.

        Raises:
            BudgetError: a sparsity out of reach.
            DataError: a subset that is empty, or names windows that are not there; examples that are not there.
        """
        super().reset(seed=seed)
        options = options or {}
        self._target = float(options.get("sparsity", self.sparsity))
        self.budget.check(self._target)
        subset: Sequence[int] | None = options.get("subset")
        self._subset = self.draw(self.np_random, self.episode_windows) if subset is None else self._checked(subset)
        examples: Sequence[int] | None = options.get("examples")
        self._examples = (
            self.draw_examples(self.np_random, len(self._subset))
            if examples is None
            else self._checked_examples(examples)
        )
        self._slopes = bool(options.get("slopes", False))
        return self.observation(), {}

    def _checked(self, subset: Sequence[int]) -> tuple[int, ...]:
        indices = tuple(int(i) for i in subset)
        if not indices or min(indices) < 0 or max(indices) >= len(self.windows):
            raise DataError(
                f"the subset {list(indices)} is not one to measure an episode on: it needs at least one of the search"
                f" windows 0 to {len(self.windows) - 1}",
                hint="Give indices of search windows, or leave the option out to have them drawn.",
            )
        return indices

    def _checked_examples(self, examples: Sequence[int]) -> tuple[int, ...]:
        indices = tuple(int(i) for i in examples)
        if indices and (min(indices) < 0 or max(indices) >= len(self.examples)):
            there = f"0 to {len(self.examples) - 1}" if self.examples else "none, for its reward asks for none"
            raise DataError(
                f"the examples {list(indices)} are not ones to measure an episode on: this environment has {there}",
                hint="Give indices of task examples, or leave the option out to have them drawn.",
            )
        return indices

    def observation(self) -> np.ndarray:
        """(target sparsity, fidelity), shape (2,), float32."""
        fidelity = min(1.0, len(self._subset) / self.episode_windows)
        return np.array([self._target, fidelity], dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, Info]:
        """Prune as the action says, measure, put the dense model back."""
        allocation = self.budget.project(action, self._target)
        judged = self.judge(allocation, self._subset, self._examples)
        info: Info = {
            "kept": np.array(allocation.kept, dtype=np.int64),
            "sparsity": allocation.sparsity,
            "loss": judged.pruned.loss,
            "dense_loss": judged.dense.loss,
            "tokens": self.tokens(self._subset, self._examples),
            "failed": int(judged.failed),
            **{OBJECTIVE + name: value for name, value in judged.objectives.items()},
        }
        if self._slopes:
            info["slopes"] = self.slopes(action, allocation, self._subset)
            info["slope_tokens"] = SLOPE_PASSES * len(self._subset) * self.window_tokens
            info["tokens"] += info["slope_tokens"]
        return self.observation(), judged.reward, True, False, info

    def slopes(self, action: np.ndarray, allocation: Allocation, subset: Sequence[int]) -> np.ndarray:
        """Derivative of the loss by importance where ``action`` came to ``allocation``, on these search windows.

        Returns:
            shape (2L,), float64, nats per token and importance; all 0 where the cut model's loss is not finite.
        """
        units = unit_slopes(self.prunable, self.windows[list(subset)], allocation.kept, calibrated=self.calibrated)
        found = self.budget.importance_slopes(action, allocation.kept, [slopes.numpy() for slopes in units])
        return found if np.isfinite(found).all() else np.zeros_like(found)

    def judge(self, allocation: Allocation, subset: Sequence[int], examples: Sequence[int] = ()) -> Judgement:
        """Reward and objectives of an allocation on these search windows and examples."""
        dense = self.dense(subset, examples)
        return self._judged(self.measure(allocation, subset, examples), dense)

    def _judged(self, pruned: Evaluation, dense: Evaluation) -> Judgement:
        if not pruned.finite:
            return Judgement(pruned, dense, float(self.reward.worst), failed=True, objectives={})
        reward = check_reward(self.reward, pruned, dense)
        objectives = check_objectives(self.reward, pruned, dense, names=self._objectives)
        self._objectives = tuple(objectives)
        return Judgement(pruned, dense, reward, failed=False, objectives=objectives)

    def measure(self, allocation: Allocation, subset: Sequence[int], examples: Sequence[int] = ()) -> Evaluation:
        """The model cut to this allocation, on these search windows and, for ``accuracy``, examples."""
        model, windows, batch = self.prunable.model, self.windows[list(subset)], self.tokens_per_batch
        divergences = self.reward.needs & DIVERGENCES
        if divergences:
            self._remember_dense(subset)
        try:
            self.prunable.cut(allocation.kept, calibrated=self.calibrated)
            if divergences:
                hidden = [self._dense_hidden[i] for i in subset]
                result = evaluate_against(model, windows, hidden, needs=divergences, tokens_per_batch=batch)
            else:
                result = evaluate(model, windows, tokens_per_batch=batch)
            if examples:
                asked = [self.examples[i] for i in examples]
                right = answered_right(model, asked, tokens_per_batch=batch)
                result = replace(result, accuracy=task_accuracy(asked, right))
        finally:
            self.prunable.restore()
        return replace(result, costs=self._costs(allocation.kept))

    def dense(self, subset: Sequence[int], examples: Sequence[int] = ()) -> Evaluation:
        """The dense model on these search windows and examples; each is evaluated once in the env's life."""
        self._remember_dense(subset)
        none = (0.0,) * len(subset)
        accuracy = None
        if examples:
            self._answer_dense(examples)
            asked = [self.examples[i] for i in examples]
            accuracy = task_accuracy(asked, [self._dense_right[i] for i in examples])
        return Evaluation(
            tuple(self._dense[i] for i in subset),
            self.window_tokens - 1,
            kls=none if "kl" in self.reward.needs else None,
            reverse_kls=none if "reverse_kl" in self.reward.needs else None,
            accuracy=accuracy,
            costs=self._costs(self.prunable.dense_units),
        )

    def _remember_dense(self, subset: Sequence[int]) -> None:
        missing = [i for i in subset if i not in self._dense]
        if not missing:
            return
        self.prunable.restore()
        # One window a pass: kernels round by batch size, and what is missing depends on what came before.
        if self.reward.needs & DIVERGENCES:
            for i in missing:
                loss, self._dense_hidden[i] = remember(self.prunable.model, self.windows[i])
                self._dense[i] = loss
        else:
            found = evaluate(self.prunable.model, self.windows[missing], tokens_per_batch=self.window_tokens)
            self._dense.update(zip(missing, found.losses, strict=True))
        if broken := [i for i in missing if not math.isfinite(self._dense[i])]:
            raise ModelError(
                f"the loss of the dense model is not finite on {len(broken)} of {len(missing)} search windows",
                hint="It overflows, for which --set model.dtype=float32 or bfloat16 helps, or its weights are damaged.",
            )

    def _answer_dense(self, examples: Sequence[int]) -> None:
        self.prunable.restore()
        for i in examples:
            if i not in self._dense_right:  # one a pass, as for windows
                self._dense_right[i] = bool(answered_right(self.prunable.model, [self.examples[i]])[0])

    def _costs(self, kept: Sequence[int]) -> dict[str, float] | None:
        if "cost" not in self.reward.needs:
            return None
        return {resource: prices.allocation(kept).cost for resource, prices in self.prices.items()}


def _by_task(reward: Reward, examples: Sequence[EncodedExample]) -> dict[str, list[int]]:
    """Indices of the examples of each task; raises ``DataError`` where the reward needs some and there are none."""
    if "accuracy" not in reward.needs:
        return {}
    found: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        found.setdefault(example.task, []).append(index)
    if not found:
        raise DataError(
            f"reward {reward.name!r} needs accuracy, and the environment was given no task examples",
            hint="Give PruningEnv examples, or use a reward that does not need accuracy.",
        )
    short = [task for task, owned in found.items() if len(owned) < -(-reward.examples // len(found))]
    if short:
        raise DataError(
            f"reward {reward.name!r} asks for {reward.examples} examples an episode from {len(found)} tasks, and "
            f"{short[0]} has {len(found[short[0]])}",
            hint="Ask for fewer examples.",
        )
    return found
