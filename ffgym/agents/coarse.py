"""Whether units of coarse sublayers can go: a third of the sublayers is tried at once, by pairs of episodes.

A derivative says little of a unit that is a third of its sublayer, but it ranks: of the sublayers whose last unit seems
to be worth the least, some can give it up. Every episode keeps the last unit of each sublayer that is tried, or not, as
a coin says, and its twin does the opposite. So the advantage of a pair, times the sign that a sublayer had in it, is
the score-function estimate of what that unit is worth (REINFORCE for a policy of two levels, each with probability
1/2), and all units are estimated from the same episodes. A unit whose estimate is clear is no longer tried: both
episodes of a pair keep it, or drop it, which takes its noise away from the others. In the end the finals choose
between all units that the evidence is against, those that it is clearer against, and none: the estimates are noisy, and
units that go together cost more than each alone.
"""

from __future__ import annotations

import numpy as np

TRIED_SHARE = 1 / 3  # of the coarse sublayers that can lose a unit; of these, those where the loss seems to fall by it
CLEAR = 3.0  # standard errors


class UnitTrial:
    """The policy while units are tried.

    Attributes:
        start: the mean importances at first, shape (2L,): of what is tried, between its two levels.
        steps: from there to either level, shape (2L,); 0 where nothing is tried.

    Args:
        worth: first-order estimate of what the loss falls by as the last unit goes, in nats by importance, shape
            (2L,); 0 for sublayers that are not coarse.
        mean: importances that say which units are kept, shape (2L,).
        units: of each sublayer, shape (2L,).
    """

    def __init__(self, worth: np.ndarray, mean: np.ndarray, units: np.ndarray) -> None:
        tried = most_promising(worth * 2 / units, int((worth != 0).sum()))
        level = np.rint((mean + 1) / 2 * units)
        self.steps = np.where(tried, 1 / units, 0.0)
        self.start = np.where(tried, 2 * level / units - 1 - self.steps, mean)
        self._sums, self._pairs = np.zeros(len(mean)), np.zeros(len(mean))

    def noise(self, pairs: int, rng: np.random.Generator) -> np.ndarray:
        """A coin for each sublayer that is tried, shape (pairs, 2L): one step up or down."""
        return np.asarray(self.steps * rng.choice([-1.0, 1.0], (pairs, len(self.steps))))

    def on_levels(self, noise: np.ndarray | float = 0.0, *, errors: float = 0.0) -> np.ndarray:
        """Importances with everything that is tried on one of its two levels, as the evidence and the noise say.

        Args:
            noise: shape (..., 2L), 0 where nothing is tried.
            errors: standard errors by which a unit's estimate has to be on the side of going.
        """
        goes = self._place() + noise < -errors / CLEAR * self.steps
        return np.asarray(self.start + np.where(goes, -self.steps, self.steps))

    def step(self, advantages: np.ndarray, noise: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """How far the mean goes, shape (2L,): it stands as far from its start as the evidence is clear.

        Args:
            advantages: of each pair, shape (pairs,).
            noise: of each pair's first episode, shape (pairs, 2L).
            moved: whether the episodes of the pair kept different units, shape (pairs, 2L).
        """
        before = self._place()
        self._sums += (advantages[:, None] * np.sign(noise) * moved).sum(axis=0)
        self._pairs += moved.sum(axis=0)
        return np.asarray(self._place() - before)

    def _place(self) -> np.ndarray:
        return np.asarray(self.steps * self._sums / np.sqrt(np.maximum(self._pairs, 1)) / CLEAR)


def most_promising(gains: np.ndarray, candidates: int) -> np.ndarray:
    """The sublayers to try, of so many that could be: the third with the highest gains above 0, shape (2L,), bool."""
    count = max(1, round(TRIED_SHARE * candidates))
    return np.asarray((gains > 0) & (gains >= np.sort(gains)[-count]))


def projection_shift(importance: np.ndarray, kept: np.ndarray, units: np.ndarray) -> np.ndarray:
    """How much more of every sublayer a projection keeps than its importance says, as a share of its units; 0-dim.

    All are of shape (2L,): the importances that were projected, the units kept, and all units.
    """
    inside = (kept > 0) & (kept < units)
    return np.asarray(np.mean((kept / units - (importance + 1) / 2)[inside]) if inside.any() else 0.0)
