"""One-step REINFORCE over importances: our own, and what ffgym exists for (arXiv 2511.18977; docs/mathematics.md).

The problem: maximise J = E_{a ~ N(mu(p), s^2 C)}[R(a)] over mu and s, where an episode is one action a (2L importances)
and one reward, p is the target sparsity, and C says how noise is shared over depth. No discount, no bootstrapping.

With a = mu + s S z, z ~ N(0, I), C = S S, the score-function gradient with respect to mu, taken in the Gaussian's own
metric (natural gradient), is E[A (a - mu)]: no inverse, no Adam, steps in units of the policy's spread. For log s it is
E[A (|z|^2 / d - 1)] / 2. A is the advantage among the episodes of one update, which share tokens and sparsity:

    antithetic pairs mu +- s S z cancel what is even in the noise; each pair's own difference is its advantage.

Over a range of budgets mu is a line in p. It starts from the prior's allocations at the two ends; every update is
measured at one p and moves the line so that mu(p) makes the whole step. How much of it the other budgets get depends on
the scale of p: here the range is [-1, 1], so that a step at one end leaves the other where it is.

Sources: REINFORCE with a baseline, Williams 1992; natural gradients, Amari 1998, and for Gaussian search distributions,
with rank-shaped rewards, natural evolution strategies (Wierstra et al. 2014, arXiv 1106.4487); antithetic pairs,
Salimans et al. 2017 (arXiv 1703.03864); leave-one-out baselines, Kool et al. 2019; averaging, Polyak and Juditsky 1992.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ffgym.agents.averaging import tail_mean
from ffgym.agents.exploration import depth_covariance, square_root
from ffgym.errors import ConfigError
from ffgym.plugins.bases import BatchAgent, PluginConfig

# The mean is w_0 + w_1 (p - 0.2) / 0.2, in a saved policy too: of order 1 over the usual budgets.
REFERENCE_SPARSITY = 0.2
SLOPE_UNIT = 0.2


class ReinforceConfig(PluginConfig):
    """Options of the agent."""

    learning_rate: float = Field(
        2.0, gt=0, description="step of the mean, in units of the policy's spread times the standardised advantage"
    )
    spread: float = Field(
        0.15,
        gt=0,
        description="standard deviation of the exploration at the start, in importance units (2 spans all keep ratios)",
    )
    spread_rate: float = Field(0.0, ge=0, description="step of the log spread; 0 keeps it")
    smooth: float = Field(
        0.95,
        ge=0,
        le=1,
        description="share of the exploration's variance that is shared by neighbouring layers of one kind",
    )
    length: float = Field(0.15, gt=0, description="over which share of the depth it is shared, above 0")
    antithetic: bool = Field(True, description="explore in mirrored pairs")
    # R: the rewards of one update. Mean, standard deviation and ranks are its own; leave-one-out does not divide.
    advantage: Literal["standard", "rank", "leave-one-out"] = Field(
        "standard",
        description="standard ((R - mean) / deviation) | rank (centred ranks) | leave-one-out (R - mean of the others)",
    )
    average: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the last updates whose means are averaged into the recommended policy; 0 takes the last",
    )


class Reinforce(BatchAgent):
    """Policy gradient over a Gaussian of importances whose mean is a function of the target sparsity."""

    name = "reinforce"
    Config: ClassVar[type[PluginConfig]] = ReinforceConfig
    least_episodes = 2
    budget_conditioned: ClassVar[bool] = True

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self._weights: np.ndarray | None = None  # (2, 2L): mean = features(sparsity) @ weights
        self._log_spread = float(np.log(self.config.spread))
        self._means: list[np.ndarray] = []
        self._measured_at: float | None = None  # the sparsity of the last update

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Start from the prior (or zeros), unless a policy has been loaded."""
        if self._weights is None:
            self._weights = self._prior(dimensions)
        elif self._weights.shape[1] != dimensions:
            raise ConfigError(
                f"the loaded policy is for {self._weights.shape[1]} sublayers, this model has {dimensions}",
                hint="Start from a run of the same model, or leave --init-from out.",
            )
        self._start_slope = self._weights[1]
        self._measured_at = None
        self._means = []
        self._batch = batch
        self._rng = np.random.default_rng(seed)
        self._root = square_root(depth_covariance(dimensions, smooth=self.config.smooth, length=self.config.length))

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """Mean plus noise, shape (batch, 2L), float32, clipped to [-1, 1]."""
        noise = self._noise(self._batch)
        means = np.stack([self._mean(float(o[0])) for o in observations])
        asked = means + np.exp(self._log_spread) * noise @ self._root
        self._noise_asked = noise
        actions: np.ndarray = np.clip(asked, -1.0, 1.0).astype(np.float32)
        return actions

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """One natural-gradient step on the mean, and on the log spread where it is learnt."""
        assert self._weights is not None, "begin comes first"
        advantages = advantage(rewards, self.config.advantage)
        spread = float(np.exp(self._log_spread))
        steps = spread * self._noise_asked @ self._root
        shares = np.stack([self._shares(float(o[0])) for o in observations])
        gradient = shares.T @ (advantages[:, None] * steps) / len(rewards)
        self._weights = self._weights + self.config.learning_rate * gradient
        if self.config.spread_rate:
            surprise = (self._noise_asked**2).mean(axis=1) - 1.0
            step = self.config.spread_rate * float((advantages * surprise).mean()) / 2
            self._log_spread += float(np.clip(step, -0.2, 0.2))
        sparsity = float(observations[-1][0])
        mean = self._mean(sparsity)
        back = np.clip(mean, -1.0, 1.0) - mean
        self._weights = self._weights + np.outer([1.0, 0.0] if self.budgets is None else self._shares(sparsity), back)
        self._means.append(self._weights.copy())
        self._measured_at = sparsity
        return {
            "policy/mean": float(self._mean(sparsity).mean()),
            "policy/spread": float(np.exp(self._log_spread)),
            "policy/step": float(np.linalg.norm(self.config.learning_rate * gradient[0])),
        }

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The mean averaged over the last updates: steadier than the last one, which finals cannot tell from luck."""
        if self._weights is None:
            return []
        mean = np.clip(_features(float(observation[0])) @ self._settled(), -1.0, 1.0)
        return [mean.astype(np.float32)]

    def state(self) -> dict[str, Any]:
        """Mean and spread of the policy (averaged as recommended, so that a run that starts from it starts well).

        A search at one sparsity learns nothing of the slope: all sparsities get what was learnt there.
        """
        if self._weights is None:
            return {}
        weights = self._settled()
        if self.budgets is None and self._measured_at is not None:
            features, slope = _features(self._measured_at), self._start_slope
            weights = np.stack([features @ weights - features[1] * slope, slope])
        return {"weights": weights.tolist(), "log_spread": self._log_spread}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Start from the mean of a policy that ``state`` returned; from its spread too where the spread is learnt."""
        self._weights = np.array(state["weights"], dtype=np.float64)
        if self.config.spread_rate:
            self._log_spread = float(state["log_spread"])

    def _settled(self) -> np.ndarray:
        """Weights averaged over the last updates, shape (2, 2L)."""
        assert self._weights is not None, "begin comes first"
        return tail_mean(self._means, self.config.average) if self._means else self._weights

    def _prior(self, dimensions: int) -> np.ndarray:
        """Weights of the line through the prior at the ends of a range, or of the prior at every sparsity."""
        if self.budgets is not None and self.prior_ends is not None:
            ends = np.stack([_features(sparsity) for sparsity in self.budgets])
            return np.linalg.solve(ends, np.stack(self.prior_ends).astype(np.float64))
        start = np.zeros(dimensions) if self.prior_mean is None else self.prior_mean.astype(np.float64)
        return np.stack([start, np.zeros(dimensions)])

    def _shares(self, sparsity: float) -> np.ndarray:
        """What of a step of mu(sparsity) either weight makes, shape (2,); together they make all of it."""
        low, high = self.budgets or (REFERENCE_SPARSITY - SLOPE_UNIT, REFERENCE_SPARSITY + SLOPE_UNIT)
        centre, unit = (low + high) / 2, (high - low) / 2
        x = (sparsity - centre) / unit
        level, slope = np.array([1.0, x]) / (1.0 + x**2)
        # Of a line around the centre, in the units of the weights.
        return np.array([level + slope * (REFERENCE_SPARSITY - centre) / unit, slope * (SLOPE_UNIT / unit)])

    def _mean(self, sparsity: float) -> np.ndarray:
        assert self._weights is not None, "begin comes first"
        return np.asarray(_features(sparsity) @ self._weights)

    def _noise(self, batch: int) -> np.ndarray:
        assert self._weights is not None, "begin comes first"
        dimensions = self._weights.shape[1]
        if not self.config.antithetic:
            return self._rng.standard_normal((batch, dimensions))
        half = self._rng.standard_normal(((batch + 1) // 2, dimensions))
        return np.concatenate([half, -half])[:batch]


def advantage(rewards: np.ndarray, kind: str) -> np.ndarray:
    """How much better each episode was than the others of its update.

    Args:
        rewards: shape (batch,), of one subset and sparsity.
        kind: ``standard``, ``rank`` or ``leave-one-out``.

    Returns:
        shape (batch,), float64, sums to 0; all 0 where the rewards do not differ.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if np.ptp(rewards) == 0:  # the mean of equal numbers may be another one in the last bit
        return np.zeros_like(rewards)
    centred: np.ndarray = rewards - rewards.mean()
    if kind == "rank":
        ordered = np.sort(rewards)  # equal rewards share the mean of their ranks
        first, behind = (np.searchsorted(ordered, rewards, side=side) for side in ("left", "right"))
        return np.asarray((first + behind - len(rewards)) / (len(rewards) - 1))
    if kind == "leave-one-out":
        centred *= len(rewards) / max(1, len(rewards) - 1)
        return centred
    centred /= rewards.std()
    return centred


def _features(sparsity: float) -> np.ndarray:
    return np.array([1.0, (sparsity - REFERENCE_SPARSITY) / SLOPE_UNIT])
