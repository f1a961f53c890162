"""Random search: what every other agent has to beat at equal tokens (Bergstra and Bengio 2012, JMLR 13).

By default it draws from all importances, the classical comparison. With ``spread`` it draws around the prior, as
``reinforce`` does before its first step: what is left of that agent when it does not learn.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from ffgym.agents.exploration import depth_covariance, square_root
from ffgym.plugins.bases import BatchAgent, PluginConfig

SMOOTH = 0.95  # share of the variance around the prior that neighbouring layers of one kind share, as in reinforce


class RandomSearchConfig(PluginConfig):
    """Options of the agent."""

    spread: float | None = Field(
        None,
        gt=0,
        description="standard deviation around the prior (or 0), in importance units; uniform in [-1, 1] if left out",
    )


class RandomSearch(BatchAgent):
    """Importances drawn at random, every episode on its own: uniformly from [-1, 1], or around the prior."""

    name = "random"
    pair_text = True
    recommendations: ClassVar[int] = 0
    Config: ClassVar[type[PluginConfig]] = RandomSearchConfig

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Seed the generator."""
        self._shape = (batch, dimensions)
        self._rng = np.random.default_rng(seed)
        if self.config.spread is not None:
            self._root = square_root(depth_covariance(dimensions, smooth=SMOOTH))

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """Draw a batch, shape (batch, 2L), float32."""
        if self.config.spread is None:
            return self._rng.uniform(-1.0, 1.0, self._shape).astype(np.float32)
        centre = 0.0 if self.prior_mean is None else self.prior_mean
        noise = self._rng.standard_normal(self._shape) @ self._root
        drawn: np.ndarray = np.clip(centre + self.config.spread * noise, -1.0, 1.0).astype(np.float32)
        return drawn

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """Learn nothing."""
        return {}
