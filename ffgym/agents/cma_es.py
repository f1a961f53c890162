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

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from cmaes import CMA
from pydantic import Field

from ffgym.agents.averaging import tail_mean
from ffgym.agents.exploration import depth_covariance
from ffgym.plugins.bases import BatchAgent, PluginConfig

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


class CMAES(BatchAgent):
    """CMA-ES around the prior (or 0)."""

    name = "cma-es"
    Config: ClassVar[type[PluginConfig]] = CMAESConfig
    least_episodes = 4

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self._start: np.ndarray | None = None
        self._optimizer: Any = None
        self._drawn: list[np.ndarray] = []
        self._means: list[np.ndarray] = []

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Start from the prior, or from the mean of the state that was loaded, with the first step size."""
        prior = np.zeros(dimensions) if self.prior_mean is None else self.prior_mean
        self._start = prior if self._start is None else self._start
        self._means = []
        self._seed = seed
        self._batch = batch
        covariance = None
        if self.config.smooth:
            shared = depth_covariance(dimensions, smooth=self.config.smooth)
            covariance = shared + SMALLEST_VARIANCE * np.eye(dimensions)  # which has to have an inverse
        start = np.clip(self._start, -1.0, 1.0).astype(np.float64)
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
        self._means.append(self._optimizer.mean.copy())
        return {"policy/mean": float(self._optimizer.mean.mean()), "policy/spread": float(actions.std(axis=0).mean())}

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The mean, or the mean of the last ones."""
        return [] if (mean := self._settled()) is None else [np.clip(mean, -1.0, 1.0).astype(np.float32)]

    def state(self) -> dict[str, Any]:
        """The mean that a new search starts from."""
        return {} if (mean := self._settled()) is None else {"mean": mean.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a mean."""
        self._start = np.array(state["mean"], dtype=np.float64)

    def _settled(self) -> np.ndarray | None:
        """The recommended mean before it is clipped, shape (2L,), float64; ``None`` before there is any."""
        return tail_mean(self._means, self.config.average) if self._means else self._start
