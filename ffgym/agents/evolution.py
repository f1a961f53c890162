"""Evolution: the search of "Search for Efficient Large Language Models" (Shen et al. 2024, arXiv 2409.17372).

The problem: maximise R over importances, with a population instead of a distribution. Each generation is one update:
the survivors, measured again, beside children by mutation (each importance changes with a probability), crossover (each
importance from one of two parents) and immigration (random). The best of all of them survive.

What differs from the paper's code, and why:

* It draws architectures until one lies within a parameter range. Here the projection puts every child on the budget.
* It keeps rewards for ever. Here every update has its own token subset, so the survivors are measured again with their
  children, and those tokens count.
* It evaluates 500 architectures a generation and keeps 300. The shares of mutation, crossover and random children (70,
  20 and 10 %) are the same here, the numbers shrink to the episodes of an update. A quarter of them survives: survivors
  are measured again, and what they take is not left for children.
* It draws a mutated gene anew; a few hundred episodes gain more from steps around the parent's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ffgym.agents.exploration import depth_covariance, square_root
from ffgym.plugins.bases import BatchAgent, PluginConfig

SURVIVORS = 0.25  # share of an update's episodes that survive, are measured again and have children
MUTATED, CROSSED = 0.7, 0.2  # shares of children by mutation and by crossover; what is left of 1 are random ones
MOST_TRIES = 50  # for a child that is none of the others
MUTATION_PROBABILITY = 0.2  # that a mutation changes an importance
# Standard deviations, in importance units: of that change, and of random ones around the prior.
MUTATION_SPREAD = 0.2
RANDOM_SPREAD = 0.3


class EvolutionConfig(PluginConfig):
    """Options of the agent."""

    smooth: float = Field(
        0.0, ge=0, le=1, description="share of a change's variance that is shared by neighbouring layers of one kind"
    )


class Evolution(BatchAgent):
    """Mutation, crossover, immigration, survival."""

    name = "evolution"
    Config: ClassVar[type[PluginConfig]] = EvolutionConfig
    recommendations: ClassVar[int] = 3
    least_episodes = 2
    _parents: np.ndarray | None = None  # best first, shape (survivors, 2L)

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Seed the generator; survivors of a state that was loaded are the first generation's parents."""
        self._batch, self._dimensions = batch, dimensions
        self._survivors = min(batch - 1, max(1, round(SURVIVORS * batch)))
        self._rng = np.random.default_rng(seed)
        covariance = depth_covariance(dimensions, smooth=self.config.smooth)
        self._root = square_root(covariance) if self.config.smooth else np.eye(dimensions)

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """Survivors first, then their children, shape (batch, 2L), float32."""
        if self._parents is None:
            first = [] if self.prior_mean is None else [self.prior_mean.astype(np.float64)]
            rows = [*first, *(_inside(self._random()) for _ in range(self._batch - len(first)))]
        else:
            rows = list(self._parents[: self._survivors])
            while len(rows) < self._batch:
                rows.append(self._new_child(rows))
        return np.asarray(np.stack(rows), dtype=np.float32)

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """Let the best survive, best first."""
        best = np.argsort(-rewards, kind="stable")[: self._survivors]
        self._parents = actions[best].astype(np.float64)
        return {"population/spread": float(actions.std(axis=0).mean())}

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The best survivors of the last generation, best first."""
        return [] if self._parents is None else list(self._parents[: self.recommendations].astype(np.float32))

    def state(self) -> dict[str, Any]:
        """The survivors, best first."""
        return {} if self._parents is None else {"parents": self._parents.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up survivors."""
        self._parents = np.array(state["parents"], dtype=np.float64)

    def _random(self) -> np.ndarray:
        """Around the prior, or anywhere where there is none, as in the paper."""
        if self.prior_mean is None:
            return np.asarray(self._rng.uniform(-1.0, 1.0, self._dimensions))
        step = RANDOM_SPREAD * self._rng.standard_normal(self._dimensions) @ self._root
        return np.asarray(self.prior_mean + step)

    def _new_child(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """A child that equals none of the rows: a copy would cost tokens and earn the same reward."""
        for _ in range(MOST_TRIES):
            child = _inside(self._child())
            if not any(np.array_equal(child, row) for row in rows):
                break
        return child

    def _child(self) -> np.ndarray:
        assert self._parents is not None, "there is a first generation"
        way = self._rng.random()
        couple = self._rng.permutation(len(self._parents))[:2]
        one, other = self._parents[couple[0]], self._parents[couple[-1]]
        changed = self._rng.random(self._dimensions)
        if way < MUTATED:
            step = MUTATION_SPREAD * self._rng.standard_normal(self._dimensions) @ self._root
            return np.asarray(one + step * (changed < MUTATION_PROBABILITY))
        if way < MUTATED + CROSSED:
            return np.asarray(np.where(changed < 0.5, one, other))
        return self._random()


def _inside(importances: np.ndarray) -> np.ndarray:
    """Clip to [-1, 1] and round to float32, as the environment does, so that copies are equal."""
    return np.asarray(np.clip(importances, -1.0, 1.0), dtype=np.float32).astype(np.float64)
