"""The mean of the last iterates: steadier than the last one, which holds the noise of single steps.

Source: Polyak and Juditsky 1992.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ffgym.plugins.bases import BatchAgent


def tail_mean(iterates: Sequence[np.ndarray], share: float) -> np.ndarray:
    """Mean of the last ``share`` of the iterates, in [0, 1], always of at least the last one; of their shape."""
    return np.asarray(np.mean(iterates[-max(1, round(share * len(iterates))) :], axis=0))


class MeanAgent(BatchAgent):
    """An agent that moves one vector of importances, and recommends the mean of its last values.

    Attributes:
        average: share of the values that are averaged.
    """

    average: float = 0.5
    _mean: np.ndarray | None = None  # where it starts, and then what is recommended; shape (2L,), float64

    def start(self, dimensions: int) -> np.ndarray:
        """Where a search begins: at a state that was loaded, else at the prior, else at 0; shape (2L,), float64."""
        if self._mean is None:
            self._mean = np.zeros(dimensions) if self.prior_mean is None else self.prior_mean.astype(np.float64)
        self._values: list[np.ndarray] = []
        return self._mean

    def moved(self, value: np.ndarray) -> None:
        """Take note of the importances after an update, shape (2L,)."""
        self._values.append(value.copy())
        self._mean = tail_mean(self._values, self.average)

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The mean of the last values."""
        return [] if self._mean is None else [np.clip(self._mean, -1.0, 1.0).astype(np.float32)]

    def state(self) -> dict[str, Any]:
        """The mean that a new search starts from."""
        return {} if self._mean is None else {"mean": self._mean.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a mean."""
        self._mean = np.array(state["mean"], dtype=np.float64)
