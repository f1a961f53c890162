"""Which levels a rising shift nu grants within a budget, not visiting every level (docs/mathematics.md, The budget).

The problem: level s of ladder i is reached at the time t_i(s) = (ratio_i(s) + ratio_i(s - 1)) / 2 - r_i. Levels are
granted in the order of these times while the budget lasts. A level that does not fit closes its ladder, and the others
go on.

How many levels of a ladder nu has reached has a closed form, and so has their cost. So nu is found by bisection, down
to a margin of a few hundred levels around the first one that does not fit. Only the margin is sorted and swept. Then
the same starts again from there, with the ladders that are still open. Every round closes at least one ladder, and all
whose next levels cost as much: with a price per unit there are two or three rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Times are rounded to nine decimals, so that ties in exact arithmetic stay ties when floats differ in the last bit.
TICK = 1e9
MARGIN = 512  # levels that are cheaper to sort than to bisect further


@dataclass(frozen=True)
class Ladder:
    """The levels that some sublayers keep together, lowest first, and what each costs."""

    members: tuple[int, ...]  # indices of the sublayers, which all have as many units; one, unless layers are tied
    units: np.ndarray  # units that each of them keeps at each level, shape (levels,), strictly increasing, last = all
    cost: np.ndarray  # cost of all of them at each level, shape (levels,), non-decreasing


class Sweep:
    """Grants levels to ladders as nu rises. Exact where all costs are whole numbers.

    Args:
        ties: which ladder comes first where times are equal, shape (ladders,), int64; then the order of the ladders.
        margin: at most this many levels are sorted at once; levels of equal times always are, however many.
    """

    def __init__(self, ladders: Sequence[Ladder], ties: np.ndarray, *, margin: int = MARGIN) -> None:
        self._ladders = tuple(ladders)
        self._ties = ties
        self._most = margin
        self._tops = np.array([len(ladder.units) - 1 for ladder in ladders])
        self._spans = np.array([2 * int(ladder.units[-1]) for ladder in ladders])
        # Ladders with the same levels and costs share a stretch of the flat tables.
        places: dict[bytes, tuple[int, int]] = {}
        thresholds: list[np.ndarray] = []
        costs: list[np.ndarray] = []
        dearest: list[np.ndarray] = []
        reached: list[np.ndarray] = []
        offsets = []
        levels = sums = 0
        for ladder, span in zip(ladders, self._spans.tolist(), strict=True):
            key = ladder.units.tobytes() + ladder.cost.tobytes()
            if key not in places:
                places[key] = levels, sums
                middles = ladder.units[1:] + ladder.units[:-1]
                thresholds.append(np.concatenate([[-np.inf], middles / span, [np.inf]]))
                costs.append(np.append(ladder.cost, np.inf))
                rises = np.append(np.diff(ladder.cost), [0.0, 0.0])
                dearest.append(np.maximum.accumulate(rises[::-1])[::-1])
                reached.append(np.searchsorted(middles, np.arange(span + 1), side="right").astype(np.int32))
                levels += len(thresholds[-1])
                sums += len(reached[-1])
            offsets.append(places[key])
        self._threshold = np.concatenate(thresholds)  # keep ratio from which a level is the nearest one
        self._cost = np.concatenate(costs)
        self._dearest = np.concatenate(dearest)  # the greatest rise in cost from a level on
        self._reached = np.concatenate(reached)  # levels for which twice the wanted units, rounded down, are enough
        self._at, self._reached_at = np.array(offsets).T

    def levels(self, ratio: np.ndarray, limit: float) -> np.ndarray:
        """The level that each ladder is granted.

        Args:
            ratio: wanted keep ratio of each ladder, shape (ladders,), float64, in [0, 1].
            limit: what all may cost together, at least the cost of the lowest levels.

        Returns:
            shape (ladders,), int64.
        """
        levels, tops = np.zeros_like(self._tops), self._tops
        tick, last = -int(TICK) - 1, int(TICK)  # every time is in (-1, 1]
        while True:
            tops = self._open(levels, tops, limit - self._total(levels))
            if self._total(tops) <= limit or (tops == levels).all():
                return tops
            low, high, tick = self._margin(ratio, levels, tops, limit, tick, last)
            owner, rises = self._in_turn(ratio, low, high)
            granted, closed = _grant(owner, rises, limit - self._total(low), len(levels))
            levels = low + granted
            tops = np.where(closed, levels, tops)

    def _total(self, levels: np.ndarray) -> float:
        return float(self._cost[self._at + levels].sum())

    def _open(self, levels: np.ndarray, tops: np.ndarray, room: float) -> np.ndarray:
        """How high each ladder can still go: below its next level that costs more than the room, which only shrinks."""
        here = self._at + levels
        tops = np.where(self._cost[here + 1] - self._cost[here] > room, levels, tops)
        for i in np.flatnonzero((tops > levels) & (self._dearest[here] > room)).tolist():
            refused = np.diff(self._ladders[i].cost[levels[i] : tops[i] + 1]) > room
            if refused.any():
                tops[i] = levels[i] + int(refused.argmax())
        return tops

    def _margin(
        self, ratio: np.ndarray, levels: np.ndarray, tops: np.ndarray, limit: float, before: int, behind: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Levels that fit, levels that do not, few or one tick's between them, and the tick of the latter.

        Args:
            levels: granted so far, at the tick ``before``.
            tops: how high each can still go.
            limit: what all may cost together; ``tops`` cost more.
            before: everything up to this tick has been decided.
            behind: a tick at which all levels are reached.
        """
        low, high = levels, tops
        while behind - before > 1 and int((high - low).sum()) > self._most:
            tick = (before + behind) // 2
            middle = np.clip(self._levels_at(ratio, tick), low, high)
            if self._total(middle) <= limit:
                before, low = tick, middle
            else:
                behind, high = tick, middle
        return low, high, behind

    def _levels_at(self, ratio: np.ndarray, tick: int) -> np.ndarray:
        """How many levels of each ladder have a rounded time of at most ``tick``."""
        wanted = self._spans * (ratio + tick / TICK)
        place = self._reached_at + np.clip(wanted, 0, self._spans).astype(np.int64)
        level: np.ndarray = self._reached[place].astype(np.int64)
        # The closed form does not round times; the levels on either side tell.
        level -= self._ticks(ratio, self._at + level) > tick
        level += self._ticks(ratio, self._at + level + 1) <= tick
        return level

    def _ticks(self, ratio: np.ndarray, at: np.ndarray) -> np.ndarray:
        return np.asarray(np.rint((self._threshold[at] - ratio) * TICK))

    def _in_turn(self, ratio: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ladder and rise in cost of every level above ``low`` up to ``high``, in the order of their times."""
        counts = high - low
        owner = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        at = self._at[owner] + (low - first)[owner] + np.arange(len(owner)) + 1
        order = np.lexsort((self._ties[owner], self._ticks(ratio[owner], at)))
        return owner[order], (self._cost[at] - self._cost[at - 1])[order]


def _grant(owner: np.ndarray, rises: np.ndarray, room: float, ladders: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels granted to each ladder, in the given order, while they fit, and which ladders were refused one.

    Returns:
        both shape (ladders,), int64 and bool.
    """
    granted, closed = [0] * ladders, [False] * ladders
    for i, rise in zip(owner.tolist(), rises.tolist(), strict=True):
        if closed[i]:
            continue
        if rise <= room:
            granted[i] += 1
            room -= rise
        else:
            closed[i] = True
    return np.array(granted), np.array(closed)
