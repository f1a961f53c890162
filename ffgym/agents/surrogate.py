"""A Gaussian-process surrogate of rewards that are comparable within an update only, and expected improvement on it.

R = f(a) + b_u + noise: f ~ GP(0, Matern 5/2) of the importances a, b_u ~ N(0, shared) a level for each update's token
subset. Both are Gaussian, so f given all rewards is exact: the level is one more term of the kernel, which is the same
for all episodes of an update (a mixed model). Points measured in several updates tie their levels. What is known of f
follows from one factorisation (Rasmussen and Williams 2006, algorithm 2.1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from operator import itemgetter

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from sklearn.gaussian_process.kernels import Matern

# A grid instead of an optimiser: cheap, and with no start to depend on.
LENGTHS = (0.15, 0.4, 1.0, 2.5)  # times the square root of the dimensions: distances grow with it
# Variances, as a share of the variance of the rewards within an update. A search that gets somewhere gains more from
# update to update than its episodes differ within one.
SIGNALS = (1.0, 10.0)
SHARED = (0.1, 1.0, 10.0, 100.0)
NOISES = (0.001, 0.01, 0.1)
JITTER = 1e-10


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
        within = rewards - rewards.mean(axis=1, keepdims=True)
        within[np.ptp(rewards, axis=1) == 0] = 0  # the mean of equal numbers may be another one in the last bit
        scale = float(within.std()) or 1.0
        target = ((rewards - rewards.mean()) / scale).ravel()
        updates = np.repeat(np.eye(len(rewards)), rewards.shape[1], axis=0)
        levels, identity = updates @ updates.T, np.eye(len(points))
        likeliest = max(_likelihoods(points, levels, target), key=itemgetter(1))[0]
        self._signal, self.length, shared, self.noise = likeliest
        self._points = points
        covariance = self._signal * self._near(points) + shared * levels + self.noise * identity
        self._factor = cholesky(covariance + JITTER * identity, lower=True, check_finite=False)
        self._weights = cho_solve((self._factor, True), target, check_finite=False)
        self.means: np.ndarray = self._signal * self._near(points, points) @ self._weights

    def _near(self, points: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
        """The correlation of f at points with f at others, or at the same."""
        return np.asarray(Matern(length_scale=self.length, nu=2.5)(points, others))

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
        known = self._signal * self._near(candidates, self._points)
        means = known @ self._weights
        whitened = solve_triangular(self._factor, known.T, lower=True, check_finite=False)
        covariance = self._signal * self._near(candidates) - whitened.T @ whitened
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


def _likelihoods(
    points: np.ndarray, levels: np.ndarray, target: np.ndarray
) -> Iterator[tuple[tuple[float, float, float, float], float]]:
    """Signal, length, shared and noise of every kernel of the grid, with the log-likelihood but for a constant."""
    identity = np.eye(len(points))
    for length in np.multiply(LENGTHS, math.sqrt(points.shape[1])).tolist():
        near = Matern(length_scale=length, nu=2.5)(points)
        for signal, shared, noise in itertools.product(SIGNALS, SHARED, NOISES):
            factor = cholesky(signal * near + shared * levels + noise * identity, lower=True, check_finite=False)
            whitened = solve_triangular(factor, target, lower=True, check_finite=False)
            yield (signal, length, shared, noise), float(-0.5 * whitened @ whitened - np.log(np.diag(factor)).sum())


def expected_improvement(gain: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """E[max(0, g)] for g ~ N(gain, deviation^2), shapes (n,): deviation (z Phi(z) + phi(z)), z = gain / deviation."""
    z = gain / deviation
    below = 0.5 * (1.0 + np.array([math.erf(value / math.sqrt(2.0)) for value in z]))
    return np.asarray(deviation * (z * below + np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)))
