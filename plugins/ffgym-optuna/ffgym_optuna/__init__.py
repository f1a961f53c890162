"""An agent for ffgym that searches with any sampler of Optuna."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

import ffgym
from ffgym.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler


class Optuna(ffgym.BatchAgent):
    """Any sampler of Optuna: TPE, CMA-ES, Gaussian processes, quasi-random numbers, ...

    Trials of all updates are compared as they are: a reward is relative to the dense model on the same text.
    """

    name = "optuna"

    class Config(ffgym.PluginConfig):
        """Options of the table ``[agent]``."""

        sampler: str = Field(default="TPESampler", description="class of optuna.samplers that takes a seed")
        arguments: dict[str, Any] = Field(default={}, description="other arguments of the sampler")

    def __init__(self, config: ffgym.PluginConfig | None = None) -> None:
        super().__init__(config)
        self._sampler(seed=0)  # what cannot be made is refused before a model is loaded

    def _sampler(self, seed: int) -> BaseSampler:
        from optuna import samplers

        known: dict[str, Any] = {
            name: cls
            for name, cls in vars(samplers).items()
            if inspect.isclass(cls) and "seed" in inspect.signature(cls).parameters
        }
        name = self.config.sampler
        if name not in known:
            raise UnknownNameError("sampler of Optuna", name, known)
        try:
            sampler: BaseSampler = known[name](seed=seed, **self.config.arguments)
        except (TypeError, ValueError) as error:
            hint = f"It takes {', '.join(inspect.signature(known[name]).parameters)}."
            raise ConfigError(f"agent.arguments do not make a {name}: {error}", hint=hint) from error
        return sampler

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Open a study; the prior is its first trial."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.batch = batch
        between = optuna.distributions.FloatDistribution(-1, 1)
        self.space: dict[str, BaseDistribution] = {f"sublayer {i:03}": between for i in range(dimensions)}
        self.study = optuna.create_study(sampler=self._sampler(seed), direction="maximize")
        if self.prior_mean is not None:
            self.study.enqueue_trial(dict(zip(self.space, map(float, self.prior_mean), strict=True)))

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """A trial for every episode."""
        self.trials = [self.study.ask(self.space) for _ in range(self.batch)]
        return np.array([self._importances(trial.params) for trial in self.trials])

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """Close the trials."""
        for trial, reward in zip(self.trials, rewards, strict=True):
            self.study.tell(trial, float(reward))
        return {"study/best": self.study.best_value}

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The best trial."""
        return [self._importances(self.study.best_params)]

    def _importances(self, params: dict[str, float]) -> np.ndarray:
        return np.array([params[name] for name in self.space], dtype=np.float32)


@ffgym.hookimpl
def ffgym_agents() -> list[type[ffgym.Agent]]:
    """Offer the agent."""
    return [Optuna]
