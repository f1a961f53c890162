"""Episodes as a search hands them on, and an agent that says what it believes in: no model is measured for them."""

from __future__ import annotations

import numpy as np

from ffgym.agents.random_search import RandomSearch
from ffgym.types import Episode


class Opinionated(RandomSearch):
    """Draws at random, and believes in what the test says."""

    name = "opinionated"

    def __init__(self, *believed):
        super().__init__()
        self.believed = believed

    def recommend(self, observation):
        self.asked = observation
        return [np.asarray(action, np.float32) for action in self.believed]


def episode(index, update, reward, *, sparsity=0.3, fidelity=1.0, action=None):
    return Episode(
        index=index,
        update=update,
        action=np.linspace(-1, 1, 6).astype(np.float32) if action is None else np.asarray(action, np.float32),
        kept=(1,) * 6,
        reward=reward,
        loss=1.0,
        dense_loss=0.5,
        target_sparsity=sparsity,
        sparsity=sparsity,
        fidelity=fidelity,
        tokens=64,
    )
