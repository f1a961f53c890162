"""The progressive schedule: from an easy start to the full task (arXiv 2511.18977, "Progressive Scheduling").

Two ramps in the share of the token budget that is spent, or, as published, in episodes: sparsity rises from a gentle
start to the target as p = target + (start - target) (1 - t)^3, fidelity from one window to all of an episode's windows
as t^3. So mistakes at the start are cheap, and the policy meets the full task with a sensible mean.

A range of budgets has no single target to rise to: every update gets a place in the range instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ffgym.types import Ramp

STAIRS = 4
RAMP_SHARE = 0.5  # of the token budget, after which both ramps have reached their ends
GOLDEN = (math.sqrt(5) - 1) / 2


def stratified(first: float, index: int) -> float:
    """Number ``index`` of a sequence whose every beginning covers [0, 1) evenly: frac(first + index * golden ratio).

    The additive recurrence of least discrepancy (Knuth, The Art of Computer Programming 3, 6.4, theorem S): each number
    falls into one of the largest gaps that the earlier ones leave, so their count need not be known beforehand.
    ``first`` is in [0, 1), ``index`` counts from 0.
    """
    return (first + index * GOLDEN) % 1.0


@dataclass(frozen=True)
class Stage:
    """What one update is measured at."""

    sparsity: float  # target share of the resource to remove
    windows: int  # search windows per episode, >= 1
    fidelity: float  # windows over an episode's full number of windows


@dataclass(frozen=True)
class Schedule:
    """The ramps of one search."""

    target: float  # final sparsity, or the upper end of a range of budgets
    windows: int  # windows of an episode at full fidelity
    start: float = 0.05  # sparsity at the very beginning, where the sparsity ramp is on (at most the target)
    sparsity: Ramp = "none"  # form of the sparsity ramp
    fidelity: Ramp = "none"  # form of the fidelity ramp
    # number of episodes after which both ramps have reached their ends; None for half of the token budget
    ramp_episodes: int | None = None
    low: float | None = None  # lower end of a range of budgets; None for a single target

    def stage(self, spent: float, place: float = 1.0, episodes: int = 0) -> Stage:
        """What an update is measured at.

        Args:
            spent: share of the token budget that is gone, in [0, 1].
            place: under a range, the update's place in it: 0 is the lower end, 1 the upper.
            episodes: measured so far.
        """
        t = min(1.0, spent / RAMP_SHARE if self.ramp_episodes is None else episodes / self.ramp_episodes)
        start = min(self.start, self.target)
        sparsity = start + (self.target - start) * _rise(self.sparsity, t, lambda x: 1 - (1 - x) ** 3)
        if self.low is not None:
            sparsity = self.low + (self.target - self.low) * place
        wanted = self.windows * _rise(self.fidelity, t, lambda x: x**3)
        windows = min(self.windows, max(1, math.ceil(wanted - 1e-9)))
        return Stage(sparsity=sparsity, windows=windows, fidelity=windows / self.windows)


def _rise(ramp: Ramp, t: float, cubic: Callable[[float], float]) -> float:
    if ramp == "none" or t >= 1.0:
        return 1.0
    if ramp == "staircase":
        return math.floor(t * STAIRS) / STAIRS
    return cubic(t)
