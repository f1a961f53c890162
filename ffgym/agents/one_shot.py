"""A heuristic as an agent: its importances are measured once, and nothing is learnt (``--agent flap``)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ffgym.errors import ConfigError
from ffgym.plugins.bases import Agent, OnUpdate
from ffgym.types import Update


class OneShot(Agent):
    """One update whose episodes are all the prior's importances."""

    name = "one-shot"
    needs_prior: ClassVar[bool] = True
    searches: ClassVar[bool] = False

    def learn(self, env: Any, *, seed: int, on_update: OnUpdate) -> None:
        """Measure the prior once."""
        action = self._prior()
        env.reset(seed=seed)
        _, rewards, _, _, _ = env.step(np.tile(action, (env.num_envs, 1)))
        on_update(Update(index=0, rewards=rewards))

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The prior."""
        return [self._prior()]

    def _prior(self) -> np.ndarray:
        if self.prior_mean is None:
            raise ConfigError("agent 'one-shot' runs a heuristic, and none is named", hint="Give --prior uniform.")
        return self.prior_mean.astype(np.float32)
