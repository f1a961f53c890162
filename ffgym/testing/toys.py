"""Toy problems: vector environments whose optimum is known, and sublayers to try criteria and heuristics on.

The environments look to an agent exactly like the pruning one: one-step episodes, importances in [-1, 1], a token
budget. Their best reward is 1, at ``optimum``. Their slopes are the derivative of the negative reward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ffgym.envs.schedule import stratified
from ffgym.envs.vector import first_seed
from ffgym.plugins.contracts import check_actions
from ffgym.types import LayerStats, Sublayer, SublayerView

# How far the optimum of a range moves from its middle to an end, root mean square over importances.
DRIFT = 0.3
UNITS = 1000  # of a sublayer: no slope is but an estimate


class ToyEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray], ABC):
    """``num_envs`` one-step episodes an update, SAME_STEP autoreset; subclasses say what a point is worth.

    The same seed and the same actions give the same rewards.

    Args:
        num_envs: episodes per update.
        dimensions: importances per action (2L).
        tokens: token budget of the search; an episode costs one.
        noise: standard deviation of the noise on rewards, shared by all episodes of an update as a common token subset
            would share it.

    Attributes:
        optimum: the best action, shape (dimensions,), inside (-0.7, 0.7).
        slope_episodes: of how many episodes of an update, the first ones, slopes are given too; ``final_info`` then
            holds ``slopes``, shape (batch, dimensions), 0 for the others. They cost nothing here.
        has_slopes: slopes can be asked for.
        units: of each sublayer, shape (dimensions,), int64.
        coarse: which sublayers have so few units that a slope is but an estimate, shape (dimensions,), bool: none.
    """

    has_slopes = True
    slope_episodes = 0

    def __init__(self, num_envs: int, dimensions: int, tokens: int, *, noise: float = 0.0) -> None:
        self.num_envs = num_envs
        self.tokens = tokens
        self.tokens_spent = self._update = 0
        self.noise = noise
        self.optimum = np.random.default_rng(7).uniform(-0.7, 0.7, dimensions)
        self.units = np.full(dimensions, UNITS)
        self.coarse = np.zeros(dimensions, dtype=bool)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.single_action_space = Box(-1, 1, (dimensions,), np.float32)
        self.single_observation_space = Box(0, 1, (2,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    @abstractmethod
    def value(self, offsets: np.ndarray) -> np.ndarray:
        """Say what points at ``offsets`` from the optimum are worth, 1 at 0 and less elsewhere.

        Args:
            offsets: shape (batch, dimensions).

        Returns:
            shape (batch,).
        """

    def kept(self, actions: np.ndarray) -> np.ndarray:
        """Units that actions of shape (batch, dimensions) keep, int64; there is no budget to meet."""
        return np.asarray(np.rint((actions + 1) / 2 * self.units), dtype=np.int64)

    @property
    def tokens_left(self) -> int:
        """Tokens that the search may still spend."""
        return max(0, self.tokens - self.tokens_spent)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin; the seed fixes the noise that follows."""
        super().reset(seed=first_seed(seed))
        self._update = 0
        self._begin()
        return self._observations(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Reward one update of ``num_envs`` episodes, or fewer.

        Raises:
            ValueError: actions of another shape, not finite, or outside [-1, 1].
            RuntimeError: the token budget is spent.
        """
        if self.tokens_left == 0:
            raise RuntimeError("the token budget is spent: stop when tokens_left is 0")
        actions = check_actions(actions, (self.num_envs, self.optimum.size))
        self.tokens_spent += len(actions)
        offsets = actions.astype(np.float64) - self.optimum
        rewards = self.value(offsets) + self.noise * self.np_random.normal()
        done = np.ones(len(actions), dtype=bool)
        infos: dict[str, Any] = {
            "final_obs": self._observations()[: len(actions)],
            "_final_obs": done,
            "final_info": {"kept": self.kept(actions), "reward": rewards.copy()},
            "_final_info": done,
        }
        if self.slope_episodes:
            slopes = self._slopes(offsets)
            slopes[self.slope_episodes :] = 0.0
            infos["final_info"]["slopes"] = slopes
        self._update += 1
        self._begin()
        return self._observations(), rewards, done, np.zeros(len(actions), dtype=bool), infos

    def _begin(self) -> None:
        """Get ready for the next update."""

    def _slopes(self, offsets: np.ndarray) -> np.ndarray:
        """Derivative of the negative reward by every importance, by central differences, shape (batch, dimensions)."""
        nudges = 1e-5 * np.eye(offsets.shape[1])
        above, below = (
            self.value((offsets[:, None] + side * nudges).reshape(-1, offsets.shape[1])) for side in (1, -1)
        )
        return np.asarray((below - above).reshape(offsets.shape) / 2e-5)

    def _observations(self) -> np.ndarray:
        return np.tile(np.array([0.2, 1.0], dtype=np.float32), (self.num_envs, 1))


class SeparableEnv(ToyEnv):
    """A round bowl: every importance can be found on its own."""

    def value(self, offsets: np.ndarray) -> np.ndarray:
        """1 - mean square of the offset."""
        return np.asarray(1 - np.mean(offsets**2, axis=1))


class QuadraticEnv(ToyEnv):
    """A turned, long valley (condition number 30): importances have to be moved together."""

    def value(self, offsets: np.ndarray) -> np.ndarray:
        """1 - mean over the turned axes of stretch * offset^2."""
        dimensions = offsets.shape[1]
        turn, _ = np.linalg.qr(np.random.default_rng(11).normal(size=(dimensions, dimensions)))
        stretch = np.geomspace(0.1, 3.0, dimensions)
        return np.asarray(1 - np.mean(stretch * (offsets @ turn) ** 2, axis=1))


class RuggedEnv(ToyEnv):
    """A bowl with ripples: many local optima, the best one at ``optimum``."""

    def value(self, offsets: np.ndarray) -> np.ndarray:
        """1 - mean of offset^2 plus ripples of height 0.1 and period 1/3."""
        return np.asarray(1 - np.mean(offsets**2 + 0.05 * (1 - np.cos(6 * np.pi * offsets)), axis=1))


class BudgetRangeEnv(ToyEnv):
    """A bowl that moves with the target sparsity, which every update has of its own: a range of budgets.

    The optimum is a line in the sparsity, and its mean is 0: a projection would undo what moves all importances alike.
    The bowl is steeper the more is removed, as losses are.

    Attributes:
        budgets: ends of the range, lower first.
    """

    budgets = (0.1, 0.5)

    def __init__(self, num_envs: int, dimensions: int, tokens: int, *, noise: float = 0.0) -> None:
        super().__init__(num_envs, dimensions, tokens, noise=noise)
        rng = np.random.default_rng(13)
        middle, direction = rng.uniform(-0.4, 0.4, dimensions), rng.uniform(-1.0, 1.0, dimensions)
        self._middle, direction = middle - middle.mean(), direction - direction.mean()
        self._drift = DRIFT * direction / np.sqrt(np.mean(direction**2))
        self.sparsity = sum(self.budgets) / 2
        self.optimum = self.optimum_at(self.sparsity)

    def optimum_at(self, sparsity: float) -> np.ndarray:
        """The best action at a target sparsity, shape (dimensions,)."""
        low, high = self.budgets
        place = 2 * (sparsity - low) / (high - low) - 1
        return np.asarray(self._middle + place * self._drift)

    def value(self, offsets: np.ndarray) -> np.ndarray:
        """1 - mean square of the offset, times 1 + 4 sparsity."""
        return np.asarray(1 - (1 + 4 * self.sparsity) * np.mean(offsets**2, axis=1))

    def _begin(self) -> None:
        if not self._update:
            self._first_place = float(self.np_random.random())
        self.sparsity = self._drawn()
        self.optimum = self.optimum_at(self.sparsity)

    def _drawn(self) -> float:
        low, high = self.budgets
        return low + (high - low) * stratified(self._first_place, self._update)

    def _observations(self) -> np.ndarray:
        return np.tile(np.array([self.sparsity, 1.0], dtype=np.float32), (self.num_envs, 1))


def toy_stats(channels: int, outputs: int, needs: frozenset[str], *, seed: int = 0) -> LayerStats:
    """Statistics of random correlated inputs, only those in ``needs``.

    Args:
        channels: n, inputs of the consumer.
        outputs: m, its outputs, for the shapes of ``gradient`` and ``output_gradient``.
        needs: any of ``mean``, ``square``, ``second_moment``, ``gradient``, ``output_gradient``.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = 4 * channels
    x = torch.randn(tokens, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)
    x = x / channels**0.5 + 0.3
    everything = {
        "mean": x.double().mean(dim=0),  # as in a run; a criterion that mixes dtypes shall fail here, too
        "square": x.double().square().mean(dim=0),
        "second_moment": x.T @ x / tokens,
        "gradient": torch.randn(outputs, channels, generator=generator),
    }
    output_gradients = torch.randn(tokens, outputs, generator=generator)
    everything["output_gradient"] = output_gradients.T @ output_gradients / tokens
    return LayerStats(tokens=tokens, **{name: value for name, value in everything.items() if name in needs})


def toy_views(layers: int, needs: frozenset[str]) -> Sequence[SublayerView]:
    """Make the 2L sublayers of a small model, in the order layer 0 attention, layer 0 mlp, layer 1 attention, ...

    Attention has 4 KV groups of 8 channels, an MLP 48 channels; both have 16 outputs.

    Args:
        layers: decoder layers L.
        needs: statistics to give along.
    """
    attention = Sublayer(
        0, "attention", 4, 8, unit_params=768, unit_macs=768, query_heads_per_unit=1, head_dim=8, depth=layers
    )
    mlp = Sublayer(0, "mlp", 48, 1, unit_params=48, unit_macs=48, depth=layers)
    sublayers = [replace(half, layer=layer) for layer in range(layers) for half in (attention, mlp)]
    return [_view(sublayer, needs, seed=index) for index, sublayer in enumerate(sublayers)]


def _view(sublayer: Sublayer, needs: frozenset[str], *, seed: int) -> SublayerView:
    """Later units have smaller weights; leaving units out costs their energy, as if inputs were independent."""
    outputs = 16
    fading = torch.linspace(2.0, 0.2, sublayer.units).repeat_interleave(sublayer.channels_per_unit)
    weight = torch.randn(outputs, sublayer.channels, generator=torch.Generator().manual_seed(seed)) * fading
    stats = toy_stats(sublayer.channels, outputs, needs | {"square"}, seed=seed)
    assert stats.square is not None, "asked for above"
    fisher = stats.output_gradient
    loss = None if fisher is None else 0.5 * ((fisher @ weight) * weight).sum(dim=0) * stats.square
    energy = weight.square().sum(dim=0) * stats.square
    return SublayerView(
        sublayer=sublayer,
        weight=weight,
        stats=stats if "square" in needs else replace(stats, square=None),
        unit_scores=torch.arange(sublayer.units, 0, -1).float(),
        removal_error=_left_out(energy, sublayer),
        output_energy=float(energy.double().sum()),
        loss_increase=None if loss is None else _left_out(loss, sublayer),
    )


def _left_out(channels: torch.Tensor, sublayer: Sublayer) -> np.ndarray:
    """The sum over all units from the k-th on, for k = 0 .. units; shape (channels,) -> (units + 1,)."""
    units = channels.double().reshape(sublayer.units, -1).sum(dim=1)
    return np.append(units.flip(0).cumsum(0).flip(0).numpy(), 0.0)
