"""Follow slopes along the pruning paths: a deterministic policy gradient of the one-step task.

The problem: minimise the loss over one vector of importances mu. A reward tells a policy gradient one number of 2L
directions. The slope h, the derivative of the loss by each importance, tells of all of them at once, from one backward
pass of the model cut as mu says. Each update is measured on tokens of its own, so h is noisy:

    mu_(t+1) = mu_t - step / sqrt(t) * C (h_t / v_t),    v_t^2 = mean of h^2 over updates so far and the layers beside

Every sublayer has a scale v of its own: the slopes of the first and last layers change several times more with the text
than those in the middle, and on a common scale their noise would be most of every step. C shares half of
a step among neighbouring layers of one kind. What is recommended is the mean of the last half of the mu.
A sublayer without slopes, its units too coarse for a derivative, stays where the prior has it.

It follows what the reward falls with. Where that is nothing that has slopes, it follows the loss, and only the
comparison of the finalists looks at the reward.

Sources: deterministic policy gradients, Silver et al. 2014; a scale for each coordinate, Duchi et al. 2011 (AdaGrad);
averaging, Polyak and Juditsky 1992.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ffgym.agents.averaging import tail_mean
from ffgym.agents.exploration import depth_covariance
from ffgym.errors import ConfigError
from ffgym.plugins.bases import BatchAgent, PluginConfig

STEP = 0.1  # how far the first update moves a sublayer by its own slope, in importance units
SMOOTH = 0.5  # share of a step that neighbouring layers of one kind have in common
AVERAGE = 0.5  # share of the last updates whose importances are averaged for recommending


class Pathwise(BatchAgent):
    """Descends the loss along its slopes, one episode an update."""

    name = "pathwise"
    slope_episodes = 1
    update_episodes = 1

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self._start: np.ndarray | None = None
        self._means: list[np.ndarray] = []

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Start from the prior (or zeros), unless a state has been loaded; nothing here is random."""
        if self._start is None:
            self._start = np.zeros(dimensions) if self.prior_mean is None else self.prior_mean.astype(np.float64)
        self._mean = self._start.copy()
        self._means = []
        self._slope: np.ndarray | None = None
        self._descent = SlopeDescent(dimensions, self.coarse)

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """The importances reached, for every episode, float32."""
        return np.tile(self._mean, (len(observations), 1)).astype(np.float32)

    def take_slopes(self, slopes: np.ndarray) -> None:
        """Keep the slope for the step that follows."""
        (self._slope,) = slopes

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """One step down the slope."""
        if self._slope is None:
            raise ConfigError("pathwise follows slopes, and this environment measures none", hint="Use reinforce.")
        step = self._descent.step(self._slope)
        self._mean = np.clip(self._mean - step, -1.0, 1.0)
        self._means.append(self._mean.copy())
        return {"policy/mean": float(self._mean.mean()), "policy/step": float(np.linalg.norm(step))}

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The average of the last updates."""
        return [] if self._start is None else [self._settled().astype(np.float32)]

    def state(self) -> dict[str, Any]:
        """The importances that are recommended."""
        return {} if self._start is None else {"mean": self._settled().tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Start from what ``state`` returned."""
        self._start = np.array(state["mean"], dtype=np.float64)

    def _settled(self) -> np.ndarray:
        assert self._start is not None, "begin comes first"
        return tail_mean(self._means, AVERAGE) if self._means else self._start


class SlopeDescent:
    """Turns slopes into steps: each on its own scale, smaller from update to update, shared over depth.

    Args:
        dimensions: 2L.
        coarse: sublayers that are not moved, because their slope is but an estimate for one unit, shape (2L,), bool;
            ``None`` for none.
    """

    def __init__(self, dimensions: int, coarse: np.ndarray | None = None) -> None:
        self._updates = 0
        self._squares = np.zeros(dimensions)
        self._is_followed = np.ones(dimensions, bool) if coarse is None else ~coarse
        self._covariance = depth_covariance(dimensions, smooth=SMOOTH)

    def step(self, slope: np.ndarray) -> np.ndarray:
        """How far up the slope the next step goes, shape (2L,); 0 where there is no slope."""
        self._updates += 1
        slope = np.where(self._is_followed, slope, 0.0)
        self._squares += slope**2
        scale = np.sqrt(smoothed_over_neighbours(self._squares) / self._updates)
        scaled = np.divide(slope, scale, out=np.zeros_like(scale), where=slope != 0)
        step = STEP / np.sqrt(self._updates) * (self._covariance @ scaled)
        return np.asarray(np.where(slope != 0, step, 0.0))


def smoothed_over_neighbours(squares: np.ndarray) -> np.ndarray:
    """Mean over each layer and its two neighbours of one kind; beyond the ends the end counts again. Shape (2L,)."""
    layers = np.pad(squares.reshape(-1, 2), ((1, 1), (0, 0)), mode="edge")
    return np.asarray((layers[:-2] + layers[1:-1] + layers[2:]) / 3).reshape(-1)
