"""Bayesian optimisation: a Gaussian-process surrogate and expected improvement (Jones et al. 1998).

The problem: maximise R over importances when episodes are too expensive to waste. A surrogate is fitted to all episodes
so far (see :mod:`ffgym.agents.surrogate`: it has a level for each update, so that rewards of different updates can be
compared). The next episodes are the candidates with the highest expected improvement.

* Every update measures the incumbent again, the best of the surrogate's means among the points measured. That costs an
  episode, and it ties the levels of the updates together.
* Candidates are the incumbent and the prior plus perturbations of all sizes, of all importances or of a few
  (Regis and Shoemaker 2013): far from them, in 60 dimensions, a surrogate of 200 points knows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ffgym.agents.surrogate import Surrogate
from ffgym.plugins.bases import BatchAgent, PluginConfig

SPREAD = 0.2  # largest standard deviation of perturbations, in importance units (2 spans all keep ratios)
CANDIDATES = 512  # that expected improvement chooses among


class Bayesian(BatchAgent):
    """Gaussian process with expected improvement."""

    name = "bayesian"
    least_episodes = 2

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self._incumbent: np.ndarray | None = None

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Start around the prior (or 0), or around the incumbent of a state that was loaded."""
        prior = np.zeros(dimensions) if self.prior_mean is None else self.prior_mean.astype(np.float64)
        self._centre = self._incumbent = prior if self._incumbent is None else self._incumbent
        self._points, self._rewards = np.empty((0, dimensions)), np.empty((0, batch))
        self._surrogate: Surrogate | None = None
        self._rng = np.random.default_rng(seed)

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """The incumbent, then the most promising candidates, shape (batch, 2L), float32."""
        assert self._incumbent is not None, "begin comes first"
        others = self._rewards.shape[1] - 1
        if self._surrogate is None:
            chosen = self._perturbed(self._centre, others)
        else:
            half = max(others, CANDIDATES // 2)
            pool = np.vstack([self._perturbed(self._incumbent, half), self._perturbed(self._centre, half)])
            chosen = self._surrogate.most_promising(pool, others)
        return np.vstack([self._incumbent[None], chosen]).astype(np.float32)

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """Remember, refit, choose the incumbent among all that was measured."""
        self._points = np.vstack([self._points, actions.astype(np.float64)])
        self._rewards = np.vstack([self._rewards, rewards])
        self._surrogate = Surrogate(self._points, self._rewards)
        self._incumbent = self._points[int(np.argmax(self._surrogate.means))]
        return {"surrogate/length": self._surrogate.length, "surrogate/noise": self._surrogate.noise}

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The incumbent."""
        return [] if self._incumbent is None else [self._incumbent.astype(np.float32)]

    def state(self) -> dict[str, Any]:
        """The incumbent."""
        return {} if self._incumbent is None else {"incumbent": self._incumbent.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up an incumbent."""
        self._incumbent = np.array(state["incumbent"])

    def _perturbed(self, centre: np.ndarray, count: int) -> np.ndarray:
        """Perturbations of all sizes up to ``SPREAD``, half of them of all importances, half of about a fifth."""
        shape = (count, len(centre))
        size = SPREAD * 2.0 ** self._rng.uniform(-3.0, 0.0, (count, 1))
        share = np.where(np.arange(count) % 2 == 0, 1.0, 0.2)[:, None]
        step = size * self._rng.standard_normal(shape) * (self._rng.random(shape) < share)
        return np.asarray(np.clip(centre + step, -1.0, 1.0))
