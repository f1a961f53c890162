"""A Gaussian-process surrogate of rewards that are comparable within an update only, and expected improvement on it.

R = f(a) + b_u + noise: f ~ GP(0, Matern 5/2) of the importances a, b_u a level for each update's token subset. Given f,
b_u is the mean over the update of R - f(a); given b_u, f is a Gaussian process of R - b_u. The two take turns, from
b_u = the update's mean (backfitting, Hastie and Tibshirani 1990). Points measured in several updates tie their levels.
"""

from __future__ import annotations

import math

import numpy as np
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel

# A grid instead of an optimiser: cheap, and with no start to depend on.
LENGTHS = (0.15, 0.4, 1.0, 2.5)  # times the square root of the dimensions: distances grow with it
NOISES = (0.001, 0.01, 0.1)  # variance of the noise within an update, as a share of the variance of the rewards
BACKFITS = 3


class Surrogate:
    """What is known about f, in units of the rewards' standard deviation within updates.

    Args:
        points: importances, shape (updates * batch, 2L), update by update.
        rewards: shape (updates, batch).

    Attributes:
        length: length scale of the likeliest kernel, in importance units.
        noise: its noise variance.
        means: f at ``points``, shape (updates * batch,).
    """

    def __init__(self, points: np.ndarray, rewards: np.ndarray) -> None:
        centred = rewards - rewards.mean(axis=1, keepdims=True)
        scale = float(centred.std()) or 1.0
        rewards, target = rewards / scale, centred / scale
        root = math.sqrt(points.shape[1])
        fits = [_process(points, target, length * root, noise) for length in LENGTHS for noise in NOISES]
        best = max(fits, key=lambda fit: float(fit.log_marginal_likelihood_value_))
        self.length, self.noise = float(best.kernel_.k1.length_scale), float(best.kernel_.k2.noise_level)
        for _ in range(BACKFITS):
            levels = (rewards - best.predict(points).reshape(rewards.shape)).mean(axis=1, keepdims=True)
            best = _process(points, rewards - levels, self.length, self.noise)
        self._process = best
        self.means: np.ndarray = best.predict(points)

    def most_promising(self, candidates: np.ndarray, count: int) -> np.ndarray:
        """Candidates with the highest expected improvement on the best point measured, E[max(0, f - f*)].

        They are chosen one after another, each as if the ones before had come out as expected (kriging believer,
        Ginsbourger et al. 2010; expected improvement: Jones et al. 1998).

        Args:
            candidates: shape (candidates, 2L).
            count: how many, at most as many as there are candidates.

        Returns:
            shape (count, 2L).
        """
        means, covariance = self._process.predict(candidates, return_cov=True)
        covariance = covariance - self.noise * np.eye(len(means))  # scikit-learn counts the white kernel into it
        best = float(self.means.max())
        chosen: list[int] = []
        for _ in range(count):
            improvement = expected_improvement(means - best, np.sqrt(np.diag(covariance).clip(min=1e-12)))
            improvement[chosen] = -np.inf
            pick = int(np.argmax(improvement))
            chosen.append(pick)
            column = covariance[:, pick]
            covariance = covariance - np.outer(column, column) / (column[pick] + self.noise)
            best = max(best, float(means[pick]))
        return candidates[chosen]


def expected_improvement(gain: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """E[max(0, g)] for g ~ N(gain, deviation^2), shapes (n,): deviation (z Phi(z) + phi(z)), z = gain / deviation."""
    z = gain / deviation
    below = 0.5 * (1.0 + np.array([math.erf(value / math.sqrt(2.0)) for value in z]))
    return np.asarray(deviation * (z * below + np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)))


def _process(points: np.ndarray, target: np.ndarray, length: float, noise: float) -> GaussianProcessRegressor:
    kernel = Matern(length_scale=length, nu=2.5) + WhiteKernel(noise)
    return GaussianProcessRegressor(kernel, optimizer=None).fit(points, target.ravel())
