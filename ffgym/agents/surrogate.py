"""A Gaussian-process surrogate of rewards that are comparable within an update only, and expected improvement on it.

R = f(a) + b_u + noise: f ~ GP(0, Matern 5/2) of the importances a, b_u ~ N(0, shared) a level for each update's token
subset. Both are Gaussian, so f given all rewards is exact: the level is one more term of the kernel, which is the same
for all episodes of an update (a mixed model). Points measured in several updates tie their levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Kernel, Matern, WhiteKernel

# A grid instead of an optimiser: cheap, and with no start to depend on.
LENGTHS = (0.15, 0.4, 1.0, 2.5)  # times the square root of the dimensions: distances grow with it
# Variances, as a share of the variance of the rewards within an update. A search that gets somewhere gains more from
# update to update than its episodes differ within one.
SIGNALS = (1.0, 10.0)
SHARED = (0.1, 1.0, 10.0, 100.0)
NOISES = (0.001, 0.01, 0.1)


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
        self._updates = len(rewards)
        updates = np.repeat(np.eye(self._updates), rewards.shape[1], axis=0)
        inputs = np.hstack([updates, points])
        likeliest = max(_likelihoods(points, updates, target), key=itemgetter(1))[0]
        self._process = GaussianProcessRegressor(self._kernel(*likeliest), optimizer=None).fit(inputs, target)
        kernel = self._process.kernel_
        self.length = float(kernel.k1.k1.k2.kernel.length_scale)
        self.noise = float(kernel.k2.noise_level)
        self.means: np.ndarray = self._process.predict(self._of_no_update(points))

    def _kernel(self, signal: float, length: float, shared: float, noise: float) -> Kernel:
        f = ConstantKernel(signal) * OfColumns(Matern(length_scale=length, nu=2.5), self._updates, None)
        level = ConstantKernel(shared) * OfColumns(DotProduct(sigma_0=0.0), 0, self._updates)
        return f + level + WhiteKernel(noise)

    def _of_no_update(self, points: np.ndarray) -> np.ndarray:
        """Inputs for f alone, without the level of any update."""
        return np.hstack([np.zeros((len(points), self._updates)), points])

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
        means, covariance = self._process.predict(self._of_no_update(candidates), return_cov=True)
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


def _likelihoods(
    points: np.ndarray, updates: np.ndarray, target: np.ndarray
) -> Iterator[tuple[tuple[float, float, float, float], float]]:
    """Signal, length, shared and noise of every kernel of the grid, with the log-likelihood but for a constant."""
    levels, identity = updates @ updates.T, np.eye(len(points))
    for length in np.multiply(LENGTHS, math.sqrt(points.shape[1])).tolist():
        near = Matern(length_scale=length, nu=2.5)(points)
        for signal, shared, noise in itertools.product(SIGNALS, SHARED, NOISES):
            factor = cholesky(signal * near + shared * levels + noise * identity, lower=True, check_finite=False)
            whitened = solve_triangular(factor, target, lower=True, check_finite=False)
            yield (signal, length, shared, noise), float(-0.5 * whitened @ whitened - np.log(np.diag(factor)).sum())


class OfColumns(Kernel):  # type: ignore[misc]  # scikit-learn has no types
    """A kernel of some columns of its inputs.

    Args:
        kernel: of those columns.
        start: the first of them.
        stop: one past the last of them; ``None`` for all to the end.
    """

    def __init__(self, kernel: Kernel, start: int, stop: int | None) -> None:
        self.kernel, self.start, self.stop = kernel, start, stop

    def __call__(self, X: np.ndarray, Y: np.ndarray | None = None, eval_gradient: bool = False) -> Any:
        """The kernel's matrix; there is no gradient, because nothing here is optimised."""
        here = slice(self.start, self.stop)
        return self.kernel(X[:, here], None if Y is None else Y[:, here])

    def diag(self, X: np.ndarray) -> Any:
        """The diagonal of that matrix."""
        return self.kernel.diag(X[:, self.start : self.stop])

    def is_stationary(self) -> bool:
        """Whether the kernel depends on differences only."""
        return bool(self.kernel.is_stationary())


def expected_improvement(gain: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """E[max(0, g)] for g ~ N(gain, deviation^2), shapes (n,): deviation (z Phi(z) + phi(z)), z = gain / deviation."""
    z = gain / deviation
    below = 0.5 * (1.0 + np.array([math.erf(value / math.sqrt(2.0)) for value in z]))
    return np.asarray(deviation * (z * below + np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)))
