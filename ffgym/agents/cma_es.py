"""CMA-ES: covariance matrix adaptation (Hansen 2016, arXiv 1604.00772), by the ``cmaes`` package (arXiv 2402.01373).

The problem: maximise E_{a ~ N(m, s^2 C)}[R(a)] over the mean m, the step size s and the covariance C; only the order of
the rewards within an update counts, so it does not mind that every update has its own token subset. One update is one
generation: the population is all the episodes of an update. Nothing is carried over but the distribution.

What is sampled outside [-1, 1] is measured at the edge and not drawn again: in 60 dimensions with a prior on
the edge no sample would ever be inside. The update sees the sample as it was drawn; told of the clipped ones, the mean
would leave the edge whatever the rewards say.

Two things are not the textbook's, and were found for ``reinforce``: ``smooth`` shares noise over depth, in the
covariance to start from, and ``average`` recommends the average of the last means. With 0 for both it is as published.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from cmaes import CMA
from pydantic import Field

from ffgym.agents.averaging import MeanAgent
from ffgym.agents.exploration import depth_covariance
from ffgym.plugins.bases import PluginConfig

SIGMA = 0.15  # step size at the start, in importance units
SMALLEST_VARIANCE = 1e-6


class CMAESConfig(PluginConfig):
    """Options of the agent."""

    smooth: float = Field(
        0.95, ge=0, le=1, description="share of the starting covariance shared by neighbouring layers of one kind"
    )
    average: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the last means that are averaged into the recommended one; 0 takes the last",
    )


class CMAES(MeanAgent):
    """CMA-ES around the prior (or 0)."""

    name = "cma-es"
    Config: ClassVar[type[PluginConfig]] = CMAESConfig
    least_episodes = 4

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self.average = self.config.average

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Start from the prior, or from the mean of the state that was loaded, with the first step size."""
        self._seed = seed
        self._batch = batch
        covariance = None
        if self.config.smooth:
            shared = depth_covariance(dimensions, smooth=self.config.smooth)
            covariance = shared + SMALLEST_VARIANCE * np.eye(dimensions)  # which has to have an inverse
        start = np.clip(self.start(dimensions), -1.0, 1.0)
        self._optimizer = CMA(mean=start, sigma=SIGMA, population_size=batch, cov=covariance)

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """Sample a generation, shape (batch, 2L), float32."""
        # Seeded anew for every generation, as it was when the committed results were drawn.
        generation = np.random.SeedSequence([self._seed, self._optimizer.generation])
        self._optimizer.reseed_rng(int(generation.generate_state(1)[0]))
        self._drawn = [self._optimizer.ask() for _ in range(self._batch)]
        return np.asarray(np.clip(np.stack(self._drawn), -1.0, 1.0), dtype=np.float32)

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """Move mean, step size and covariance."""
        self._optimizer.tell([(drawn, -float(reward)) for drawn, reward in zip(self._drawn, rewards, strict=True)])
        self.moved(self._optimizer.mean)
        return {"policy/mean": float(self._optimizer.mean.mean()), "policy/spread": float(actions.std(axis=0).mean())}
