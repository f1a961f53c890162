"""Slopes as a control variate of the score function: what a backward pass knows need not be found out by sampling.

The problem: the score-function gradient E[R(a) (a - mu)] is right for any R, and noisy, because one number tells of 2L
directions. The slope h of the loss at mu tells of all of them at once, but only to first order. With p = <h, a - mu>,

    E[R (a - mu)] = E[(R - beta p) (a - mu)] + beta s^2 C h        for a - mu ~ N(0, s^2 C), and any beta:

sampling is left with what slopes do not explain. The variance is least where beta is the regression coefficient of R on
p, which is fitted over all updates so far: where slopes mislead it tends to 0, and plain REINFORCE is left.

Sources: control variates of the score function from a first-order expansion, Gu et al. 2017 (Q-Prop, arXiv 1611.02247)
and Grathwohl et al. 2018 (arXiv 1711.00123).
"""

from __future__ import annotations

import numpy as np


class Pathwise:
    """The regression of rewards on what slopes predict, and the gradient that it leaves to make."""

    def __init__(self) -> None:
        self._cross = 0.0
        self._predicted = 0.0
        self._rewards = 0.0
        self._episodes = 0

    @property
    def beta(self) -> float:
        """Reward for one nat per token more; never above 0, for no reward asks for more loss."""
        return min(0.0, self._cross / self._predicted) if self._predicted > 0 else 0.0

    @property
    def explained(self) -> float:
        """Correlation of rewards with what slopes predict within their update, over all updates; in [0, 1]."""
        both = np.sqrt(self._predicted * self._rewards)
        return float(max(0.0, -self._cross / both)) if both > 0 else 0.0

    def gradient(self, rewards: np.ndarray, steps: np.ndarray, slope: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """Natural gradient of the expected reward, in standard deviations of the rewards within an update.

        Args:
            rewards: of episodes that explored around the mean, shape (episodes,), all on one subset.
            steps: how they did: a - mu, shape (episodes, 2L).
            slope: derivative of the loss by importance at the mean, on the same subset, shape (2L,).
            covariance: of the steps, s^2 C, shape (2L, 2L).

        Returns:
            shape (2L,), float64; 0 while no two rewards have differed.
        """
        centred = rewards - rewards.mean()
        predicted = steps @ slope
        predicted = predicted - predicted.mean()
        self._cross += float(centred @ predicted)
        self._predicted += float(predicted @ predicted)
        self._rewards += float(centred @ centred)
        self._episodes += len(rewards)
        if self._rewards == 0:
            return np.zeros_like(slope)
        left = centred - self.beta * predicted
        found = left @ steps / len(rewards) + self.beta * covariance @ slope
        return np.asarray(found / np.sqrt(self._rewards / self._episodes))
