"""One decision, one episode: importances in, reward out (DESIGN 3.4, 3.5).

``step`` projects the importances onto the budget, cuts the model, measures it on the subset that ``reset`` chose, puts
the dense model back and ends the episode. Nothing in here changes over time: what is ramped or redrawn comes in
through ``reset(options=...)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from ffgym.errors import DataError
from ffgym.evaluation.perplexity import evaluate
from ffgym.models.surgery import PrunableModel
from ffgym.plugins.bases import Reward
from ffgym.plugins.contracts import check_reward
from ffgym.pruning.budget import Budget
from ffgym.types import Allocation, Evaluation

Info = dict[str, Any]


class PruningEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A model, a pruning path, a budget and a reward as a one-step task.

    Action: importances, ``Box(-1, 1, (2L,), float32)``, order layer 0 attention, layer 0 mlp, layer 1 attention, ...
    Observation: (target sparsity, fidelity), ``Box(0, 1, (2,), float32)``.

    ``reset(options={"sparsity": p, "subset": indices})`` sets the task: target sparsity, and the search windows that
    the episode is measured on. Without options the sparsity is the constructor's and the subset is drawn.
    With ``"hopeless": x`` the windows are measured one by one, and no more of them once the mean loss so far lies more
    than x nats per token above the dense model's on the same windows; the reward is that of the windows measured.

    The step's info holds ``kept`` (int64, (2L,)), ``sparsity``, ``loss`` and ``dense_loss`` (nats per token),
    ``tokens`` (evaluated in this step), ``failed`` (0 or 1: the loss was not finite) and ``stopped_early`` (0 or 1).

    Args:
        prunable: the prepared model.
        reward: judges an episode.
        windows: search split, token ids, shape (windows, length), int64.
        budget: what an allocation may cost.
        sparsity: default target.
        episode_windows: windows of an episode at full fidelity.
        calibrated: whether episodes see refitted consumers ("calibration inside the reward").
        tokens_per_batch: tokens of one forward pass.
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
    ) -> None:
        budget.check(sparsity)
        if not 1 <= episode_windows <= len(windows):
            raise DataError(
                f"an episode of {episode_windows} windows does not fit the search split of {len(windows)}",
                hint="Lower search.episode_tokens, or raise data.search_tokens.",
            )
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
        self._target = sparsity
        self._subset: tuple[int, ...] = ()
        self._hopeless: float | None = None

    @property
    def window_tokens(self) -> int:
        """Tokens in one window: what the search is charged for evaluating it."""
        return int(self.windows.shape[1])

    def draw(self, rng: np.random.Generator, windows: int) -> tuple[int, ...]:
        """Indices of ``windows`` different search windows."""
        return tuple(int(i) for i in np.sort(rng.choice(len(self.windows), windows, replace=False)))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Info]:
        """Set the task; evaluates nothing.

        Raises:
            BudgetError: a sparsity out of reach.
            DataError: a subset that is empty, or names windows that are not there.
        """
        super().reset(seed=seed)
        options = options or {}
        self._target = float(options.get("sparsity", self.sparsity))
        self.budget.check(self._target)
        subset: Sequence[int] | None = options.get("subset")
        self._subset = self.draw(self.np_random, self.episode_windows) if subset is None else self._checked(subset)
        self._hopeless = options.get("hopeless")
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

    def observation(self) -> np.ndarray:
        """(target sparsity, fidelity), shape (2,), float32."""
        fidelity = min(1.0, len(self._subset) / self.episode_windows)
        return np.array([self._target, fidelity], dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, Info]:
        """Prune as the action says, measure, put the dense model back."""
        allocation = self.budget.project(action, self._target)
        dense = self.dense(self._subset)
        if self._hopeless is None:
            pruned = self.measure(allocation, self._subset)
        else:
            pruned = self._measure_while_hopeful(allocation, dense, self._hopeless)
            dense = Evaluation(dense.losses[: len(pruned.losses)], dense.tokens_per_window)
        windows = len(pruned.losses)
        failed = not math.isfinite(pruned.loss)
        reward = self.reward.worst if failed else check_reward(self.reward, pruned, dense)
        info: Info = {
            "kept": np.array(allocation.kept, dtype=np.int64),
            "sparsity": allocation.sparsity,
            "loss": pruned.loss,
            "dense_loss": dense.loss,
            "tokens": windows * self.window_tokens,
            "failed": int(failed),
            "stopped_early": int(windows < len(self._subset)),
        }
        return self.observation(), float(reward), True, False, info

    def measure(self, allocation: Allocation, subset: Sequence[int]) -> Evaluation:
        """Losses of the model cut to this allocation on these search windows."""
        try:
            self.prunable.cut(allocation.kept, calibrated=self.calibrated)
            return evaluate(self.prunable.model, self.windows[list(subset)], tokens_per_batch=self.tokens_per_batch)
        finally:
            self.prunable.restore()

    def _measure_while_hopeful(self, allocation: Allocation, dense: Evaluation, hopeless: float) -> Evaluation:
        """Losses on the subset's windows one by one, until they lie too far above the dense model's."""
        losses: list[float] = []
        try:
            self.prunable.cut(allocation.kept, calibrated=self.calibrated)
            for window in self._subset:
                one = evaluate(self.prunable.model, self.windows[[window]], tokens_per_batch=self.window_tokens)
                losses.extend(one.losses)
                above = np.mean(losses) - np.mean(dense.losses[: len(losses)])
                if not above <= hopeless:  # a loss that is not a number is hopeless too
                    break
        finally:
            self.prunable.restore()
        return Evaluation(tuple(losses), dense.tokens_per_window)

    def dense(self, subset: Sequence[int]) -> Evaluation:
        """The dense model's losses on these search windows; each window is evaluated once in the env's life."""
        missing = [i for i in subset if i not in self._dense]
        if missing:
            self.prunable.restore()
            # One window a pass: kernels round by batch size, and what is missing depends on what came before.
            found = evaluate(self.prunable.model, self.windows[missing], tokens_per_batch=self.window_tokens)
            self._dense.update(zip(missing, found.losses, strict=True))
        return Evaluation(tuple(self._dense[i] for i in subset), self.window_tokens - 1)
