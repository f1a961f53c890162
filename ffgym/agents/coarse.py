"""Whether units of coarse sublayers can go: while slopes are followed, they are tried, and slopes on both sides tell.

A derivative says little of a step as large as a third of a sublayer: while the unit is there, it promises too much of
removing it, and once it is gone, too little. The mean of both is the trapezoid rule, exact to second order. So every
episode keeps the last unit of each sublayer that is tried, or does without it, and its slope tells of one side. What
the loss falls by as the unit goes is estimated by the mean of both sides. In the next episode the unit is away with the
probability that this is above 0: what is in doubt is tried on, and the other sublayers meanwhile learn to do without
what will probably go.

Sources: the trapezoid rule for the gradient of a discrete choice, ReinMax (Liu et al. 2023, arXiv 2304.08612); choosing
with the probability of being better, Thompson 1933.
"""

from __future__ import annotations

import numpy as np

TRIED_SHARE = 1 / 3  # of the coarse sublayers, at a time; of these, those where the loss seems to fall as the unit goes
LEAST_VARIANCE = 1e-30  # so that what never varies is clear
INSIDE = 0.25  # units by which an importance is inside the unit that is tried, so that its slope tells of that one


class SampledUnits:
    """The policy for coarse sublayers, of which some may lose their last unit.

    Attributes:
        tried: sublayers whose last unit may go, shape (2L,), bool.

    Args:
        coarse: shape (2L,), bool.
        levels: units that coarse sublayers keep, shape (2L,).
        units: of each sublayer, shape (2L,).
        may_go: coarse sublayers whose last unit may be tried, shape (2L,), bool.
        slopes: measured so far with all of these units, in nats by importance, shape (episodes, 2L); above 0, the loss
            falls as the unit goes.
    """

    def __init__(
        self, coarse: np.ndarray, levels: np.ndarray, units: np.ndarray, may_go: np.ndarray, slopes: np.ndarray
    ) -> None:
        self._coarse, self._levels, self._units = coarse, levels, units
        gains = np.where(may_go, slopes.mean(axis=0) * 2 / units, 0.0)
        count = max(1, round(TRIED_SHARE * int(coarse.sum())))
        self.tried = (gains > 0) & (gains >= np.sort(gains)[-count])
        # Of the slopes of both sides, with the unit and without it: numbers, sums, sums of squares; shape (3, 2, 2L).
        self._sums = np.zeros((3, 2, len(units)))
        for slope in slopes:
            self.add(slope, levels)

    def draw(self, mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Importances for an episode, shape (2L,): the mean, with or without each unit that is tried."""
        goes: np.ndarray = rng.standard_normal(len(mean)) < self.clearness
        return self._placed(mean, goes & self.tried, INSIDE)

    def settled(self, mean: np.ndarray, errors: float = 0.0) -> np.ndarray:
        """Importances without the units that the evidence is against by more than so many standard errors, (2L,)."""
        return self._placed(mean, self.gone(errors), 0.0)

    def gone(self, errors: float = 0.0) -> np.ndarray:
        """Sublayers without their last unit then, shape (2L,), bool."""
        return np.asarray(self.tried & (self.clearness > errors))

    def add(self, slope: np.ndarray, kept: np.ndarray) -> None:
        """Take the slopes of an episode that kept these units, both of shape (2L,)."""
        sides = np.stack([kept >= self._levels, kept < self._levels]) & (slope != 0)
        self._sums += sides * np.stack([np.ones(len(slope)), slope, slope**2])[:, None]

    @property
    def clearness(self) -> np.ndarray:
        """How clear it is that the loss falls as a unit goes, in standard errors, shape (2L,); 0 for lack of slopes."""
        counts, sums, squares = self._sums
        enough = (counts > 1).all(axis=0)
        counts = np.where(enough, counts, 2.0)
        means = sums / counts
        variance = ((squares / counts - means**2).clip(0) / (counts - 1)).sum(axis=0)  # of the sum of both means
        return np.asarray(np.where(enough, means.sum(axis=0) / np.sqrt(variance + LEAST_VARIANCE), 0.0))

    def _placed(self, mean: np.ndarray, goes: np.ndarray, inside: float) -> np.ndarray:
        at = self._levels - goes + np.where(self.tried, inside * np.where(goes, 1, -1), 0.0)
        return np.asarray(np.where(self._coarse, 2 * at / self._units - 1, mean))


def projection_shift(importance: np.ndarray, kept: np.ndarray, units: np.ndarray) -> np.ndarray:
    """How much more of every sublayer a projection keeps than its importance says, as a share of its units; 0-dim.

    All are of shape (2L,): the importances that were projected, the units kept, and all units.
    """
    inside = (kept > 0) & (kept < units)
    return np.asarray(np.mean((kept / units - (importance + 1) / 2)[inside]) if inside.any() else 0.0)
