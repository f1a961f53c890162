"""Bayesian optimisation: a Gaussian-process surrogate and expected improvement (Jones et al. 1998; scikit-learn's GP).

The problem: maximise R over importances, each episode being too dear to waste. A surrogate f ~ GP(0, k), k a Matern 5/2
kernel of the distance between importances, is fitted to all episodes so far; the next ones are the candidates with the
highest expected improvement EI(a) = E[max(0, f(a) - f*)], f* the surrogate's best among what was measured.

* Rewards of different updates are not comparable: R = f(a) + b_u + noise, with a level b_u for each update's subset.
  It is taken as the mean over the update of R - f(a), in turn with f, from f = 0 (backfitting, Hastie and Tibshirani
  1990). The incumbent is measured again in every update, which ties the levels together.
* The length scale has the highest likelihood of a short grid: cheap, and no optimiser to start anywhere.
* Candidates are the incumbent and the prior plus perturbations of all sizes, of all importances or of a few
  (Regis and Shoemaker 2013): far from them, in 60 dimensions, a surrogate of 200 points knows nothing.
* A batch is chosen one after another, each as if the ones before had come out as expected (kriging believer, Ginsbourger
  et al. 2010).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel

from ffgym.errors import ConfigError
from ffgym.plugins.bases import BatchAgent, PluginConfig

LENGTHS = (0.15, 0.4, 1.0, 2.5)  # times the square root of the dimensions: distances grow with it
NOISES = (0.001, 0.01, 0.1)  # variance of the noise within an update, as a share of the variance of the rewards
BACKFITS = 3


class BayesianConfig(PluginConfig):
    """Options of the agent.

    Attributes:
        spread: largest standard deviation of perturbations, in importance units (2 spans all keep ratios).
        candidates: how many candidates expected improvement chooses among.
    """

    spread: float = Field(0.2, gt=0)
    candidates: int = Field(512, ge=16)


class Bayesian(BatchAgent):
    """Gaussian process with expected improvement."""

    name = "bayesian"
    Config: ClassVar[type[PluginConfig]] = BayesianConfig

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self._points: np.ndarray | None = None  # (episodes, 2L), float64
        self._incumbent: np.ndarray | None = None

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Start around the prior (or 0), or around the incumbent of a state that was loaded."""
        if batch < 2:
            raise ConfigError(
                f"bayesian measures its incumbent beside new candidates, and search.episodes_per_update is {batch}",
                hint="Set search.episodes_per_update to 2 or more.",
            )
        prior = np.zeros(dimensions) if self.prior_mean is None else self.prior_mean.astype(np.float64)
        self._centre = self._incumbent = prior if self._incumbent is None else self._incumbent
        self._points, self._rewards = np.empty((0, dimensions)), np.empty(0)
        self._batch = batch
        self._rng = np.random.default_rng(seed)

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """The incumbent, then what promises most, shape (batch, 2L), float32."""
        assert self._points is not None, "begin comes first"
        assert self._incumbent is not None, "begin comes first"
        if len(self._points) == 0:
            chosen = self._perturbed(self._centre, self._batch - 1)
        else:
            chosen = self._most_promising(self._batch - 1)
        return np.clip(np.vstack([self._incumbent, chosen]), -1.0, 1.0).astype(np.float32)

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """Remember, refit, choose the incumbent among all that was measured."""
        self._points = np.vstack([self._points, actions.astype(np.float64)])
        self._rewards = np.append(self._rewards, rewards)
        surrogate, scale = self._fit()
        means = surrogate.predict(self._points)
        self._incumbent = self._points[int(np.argmax(means))]
        return {"surrogate/length": float(surrogate.kernel_.k1.length_scale), "surrogate/scale": scale}

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The incumbent."""
        return [] if self._incumbent is None else [self._incumbent.astype(np.float32)]

    def state(self) -> dict[str, Any]:
        """All episodes and the generator; a new search takes the incumbent only."""
        if self._points is None or self._incumbent is None:
            return {}
        return {
            "points": self._points.tolist(),
            "rewards": self._rewards.tolist(),
            "batch": self._batch,
            "centre": self._centre.tolist(),
            "incumbent": self._incumbent.tolist(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a state."""
        self._points, self._rewards = np.array(state["points"]), np.array(state["rewards"])
        self._centre, self._incumbent = np.array(state["centre"]), np.array(state["incumbent"])
        self._batch = int(state["batch"])
        self._rng = np.random.default_rng()
        self._rng.bit_generator.state = state["rng"]

    def _fit(self) -> tuple[GaussianProcessRegressor, float]:
        """The surrogate of standardised rewards, and what they were divided by."""
        assert self._points is not None, "something was measured"
        updates = self._rewards.reshape(-1, self._batch)
        centred = (updates - updates.mean(axis=1, keepdims=True)).ravel()
        scale = float(centred.std()) or 1.0
        root = np.sqrt(self._points.shape[1])
        fits = [_fitted(self._points, centred / scale, length * root, noise) for length in LENGTHS for noise in NOISES]
        best = max(fits, key=lambda fit: fit.log_marginal_likelihood_value_)
        for _ in range(BACKFITS):
            rest = updates - scale * best.predict(self._points).reshape(updates.shape)
            levels = rest.mean(axis=1, keepdims=True)
            target = (updates - levels).ravel() / scale
            best = _fitted(self._points, target, best.kernel_.k1.length_scale, best.kernel_.k2.noise_level)
        return best, scale

    def _most_promising(self, count: int) -> np.ndarray:
        assert self._points is not None, "something was measured"
        assert self._incumbent is not None, "something was measured"
        surrogate, _ = self._fit()
        half = self.config.candidates // 2
        pool = np.vstack([self._perturbed(self._incumbent, half), self._perturbed(self._centre, half)])
        means, covariance = surrogate.predict(pool, return_cov=True)
        best = float(surrogate.predict(self._points).max())
        return pool[_believed(means, covariance, best, count, float(surrogate.kernel_.k2.noise_level))]

    def _perturbed(self, centre: np.ndarray, count: int) -> np.ndarray:
        """Perturbations of all sizes up to ``spread``, half of them of all importances, half of about a fifth."""
        shape = (count, len(centre))
        size = self.config.spread * 2.0 ** self._rng.uniform(-3.0, 0.0, (count, 1))
        share = np.where(np.arange(count) % 2 == 0, 1.0, 0.2)[:, None]
        step = size * self._rng.standard_normal(shape) * (self._rng.random(shape) < share)
        return np.clip(centre + step, -1.0, 1.0)


def _fitted(points: np.ndarray, target: np.ndarray, length: float, noise: float) -> GaussianProcessRegressor:
    kernel = Matern(length_scale=length, nu=2.5) + WhiteKernel(noise)
    return GaussianProcessRegressor(kernel, optimizer=None).fit(points, target)


def _believed(means: np.ndarray, covariance: np.ndarray, best: float, count: int, noise: float) -> list[int]:
    """Indices of ``count`` candidates with the highest expected improvement, each given the ones before.

    Args:
        means: shape (candidates,).
        covariance: shape (candidates, candidates), without noise on the diagonal taken out.
        best: what is to be improved on.
        count: how many, at most as many as there are candidates.
        noise: variance of a measurement.
    """
    covariance = covariance - noise * np.eye(len(means))  # scikit-learn counts the white kernel into it
    chosen: list[int] = []
    for _ in range(count):
        deviation = np.sqrt(np.diag(covariance).clip(min=1e-12))
        z = (means - best) / deviation
        improvement = deviation * (z * norm.cdf(z) + norm.pdf(z))
        improvement[chosen] = -np.inf
        pick = int(np.argmax(improvement))
        chosen.append(pick)
        column = covariance[:, pick]
        covariance = covariance - np.outer(column, column) / (column[pick] + noise)
        best = max(best, float(means[pick]))
    return chosen
