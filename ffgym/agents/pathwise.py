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

import numpy as np

from ffgym.agents.averaging import MeanAgent
from ffgym.agents.exploration import depth_covariance
from ffgym.errors import ConfigError

STEP = 0.1  # how far the first update moves a sublayer by its own slope, in importance units
SMOOTH = 0.5  # share of a step that neighbouring layers of one kind have in common


class Pathwise(MeanAgent):
    """Descends the loss along its slopes, one episode an update."""

    name = "pathwise"
    slope_episodes = 1
    update_episodes = 1

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Start from the prior (or zeros), unless a state has been loaded; nothing here is random."""
        self._importances = self.start(dimensions)
        self._slope: np.ndarray | None = None
        self._descent = SlopeDescent(dimensions, self.coarse)

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """The importances reached, for every episode, float32."""
        return np.tile(self._importances, (len(observations), 1)).astype(np.float32)

    def take_slopes(self, slopes: np.ndarray) -> None:
        """Keep the slope for the step that follows."""
        (self._slope,) = slopes

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """One step down the slope."""
        if self._slope is None:
            raise ConfigError("pathwise follows slopes, and this environment measures none", hint="Use reinforce.")
        step = self._descent.step(self._slope)
        self._importances = np.clip(self._importances - step, -1.0, 1.0)
        self.moved(self._importances)
        return {"policy/mean": float(self._importances.mean()), "policy/step": float(np.linalg.norm(step))}


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
