"""A heuristic as an agent: its importances are measured once, and nothing is learnt (``--agent flap``)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ffgym.plugins.bases import Agent, OnUpdate
from ffgym.types import Update


class OneShot(Agent):
    """One update whose episodes are all the prior's importances."""

    name = "one-shot"
    needs_prior: ClassVar[bool] = True
    searches: ClassVar[bool] = False

    def learn(self, env: Any, *, seed: int, on_update: OnUpdate) -> None:
        """Measure the prior once."""
        observations, _ = env.reset(seed=seed)
        (action,) = self.recommend(observations[0])
        _, rewards, _, _, _ = env.step(np.tile(action, (env.num_envs, 1)))
        on_update(Update(index=0, rewards=rewards))

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The prior."""
        assert self.prior_mean is not None, "it needs one"
        return [self.prior_mean.astype(np.float32)]
