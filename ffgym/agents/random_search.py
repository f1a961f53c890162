"""Random search: what every other agent has to beat at equal tokens (Bergstra and Bengio 2012, JMLR 13)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ffgym.plugins.bases import BatchAgent


class RandomSearch(BatchAgent):
    """Importances drawn uniformly from [-1, 1], every episode on its own."""

    name = "random"

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Seed the generator."""
        self._shape = (batch, dimensions)
        self._rng = np.random.default_rng(seed)

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """Draw a batch."""
        return self._rng.uniform(-1.0, 1.0, self._shape).astype(np.float32)

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """Learn nothing."""
        return {}

    def state(self) -> dict[str, Any]:
        """The generator's state."""
        return {"rng": self._rng.bit_generator.state}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the generator's state."""
        self._rng = np.random.default_rng()
        self._rng.bit_generator.state = state["rng"]
