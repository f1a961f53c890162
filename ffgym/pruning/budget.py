"""From importances to an exact budget (DESIGN 3.3), decoupled from whatever proposes the importances.

Importance a maps to the wanted keep ratio r = (a + 1) / 2. As one shift nu rises, sublayer i reaches its level s as
soon as r_i + nu passes that level's keep ratio, that is at time t_i(s) = ratio_i(s) - r_i. Levels are granted in the
order of these times while the budget lasts; a level that does not fit closes its sublayer, and the others go on. This
is the bisection for nu, the rounding down and the handing out of the rest in one sweep, and it is what makes the
promises hold exactly: feasible, nothing left that fits, monotone in a sublayer's own importance, a fixed point of
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ffgym.errors import BudgetError
from ffgym.types import Allocation, Resource, Sublayer


def unit_cost(sublayer: Sublayer, resource: Resource, *, context: int, kv_bytes: int) -> float:
    """What one unit costs.

    Args:
        sublayer: whose unit.
        resource: ``params`` (parameters), ``macs`` (multiply-accumulates for one token that attends to ``context``
            tokens), ``kv`` (cache bytes per token).
        context: tokens attended to.
        kv_bytes: bytes of one cached number.
    """
    if resource == "params":
        return sublayer.unit_params
    if resource == "macs":
        scores = 2 * sublayer.query_heads_per_unit * sublayer.head_dim * context
        return sublayer.unit_macs + scores
    if resource == "kv":
        return 2 * sublayer.head_dim * kv_bytes
    if resource == "latency":
        raise BudgetError("latency has no price per unit", hint="Give Budget the cost_tables of a latency table.")
    raise BudgetError(f"unknown resource {resource!r}", hint="Known: params, macs, kv, latency.")


def service_order(depth: int) -> np.ndarray:
    """Rank of each layer in an order that is spread over depth (bit reversal), so that ties favour no end.

    Returns:
        shape (depth,), int64: rank[layer].
    """
    bits = max(depth - 1, 1).bit_length()
    reverse = [int(format(layer, f"0{bits}b")[::-1], 2) for layer in range(depth)]
    rank = np.empty(depth, dtype=np.int64)
    rank[np.argsort(reverse, kind="stable")] = np.arange(depth)
    return rank


@dataclass(frozen=True)
class Ladder:
    """The levels that one sublayer may keep, lowest first, and what each costs.

    Attributes:
        units: units kept at each level, shape (levels,), strictly increasing, last = all.
        cost: cost of each level, shape (levels,), non-decreasing.
    """

    units: np.ndarray
    cost: np.ndarray


class Budget:
    """Projects importances onto allocations that meet a sparsity exactly.

    Args:
        sublayers: the 2L sublayers.
        resource: what is counted.
        min_units: least units a sublayer keeps (the attention of layer 0 always keeps one).
        context: tokens attended to, for ``macs``.
        kv_bytes: bytes of one cached number, for ``kv``.
        cost_tables: what keeping k = 0 .. units units of each sublayer costs, each shape (units + 1,), non-decreasing
            from 0 or more; instead of a price per unit, and what ``latency`` needs. Whole numbers keep sums exact.

    Raises:
        BudgetError: an unknown resource, a negative ``min_units``, or cost tables that are missing or are none.
    """

    def __init__(
        self,
        sublayers: Sequence[Sublayer],
        *,
        resource: Resource = "params",
        min_units: int = 1,
        context: int = 1024,
        kv_bytes: int = 2,
        cost_tables: Sequence[np.ndarray] | None = None,
    ) -> None:
        if min_units < 0:
            raise BudgetError(f"min_units is {min_units}", hint="Use 0 or more.")
        self.sublayers = tuple(sublayers)
        self.resource = resource
        if cost_tables is None:
            prices = [unit_cost(s, resource, context=context, kv_bytes=kv_bytes) for s in self.sublayers]
            cost_tables = [np.arange(s.units + 1) * float(p) for s, p in zip(self.sublayers, prices, strict=True)]
        self._tables = _checked(self.sublayers, cost_tables)
        self._ladders = tuple(
            _ladder(
                table,
                max(min_units, 1) if (sublayer.kind, sublayer.layer) == ("attention", 0) else min_units,
            )
            for sublayer, table in zip(self.sublayers, self._tables, strict=True)
        )
        rank = service_order(1 + max(sublayer.layer for sublayer in self.sublayers))
        self.dense_cost = float(sum(ladder.cost[-1] for ladder in self._ladders))
        self.least_cost = float(sum(ladder.cost[0] for ladder in self._ladders))
        # One flat table of all levels above each sublayer's lowest: owner, keep ratio, increment, tie-break.
        self._owner = np.concatenate([np.full(len(x.units) - 1, i) for i, x in enumerate(self._ladders)])
        self._ratio = np.concatenate([x.units[1:] / x.units[-1] for x in self._ladders])
        self._increment = np.concatenate([np.diff(x.cost) for x in self._ladders])
        self._tie = np.array([rank[s.layer] * 2 + (s.kind == "mlp") for s in self.sublayers])[self._owner]

    @property
    def reachable(self) -> tuple[float, float]:
        """Least and greatest sparsity that the levels allow."""
        return 0.0, 1.0 - self.least_cost / self.dense_cost

    def check(self, sparsity: float) -> None:
        """Raise ``BudgetError`` where the sparsity lies outside (0, 1) or out of reach."""
        most = self.reachable[1]
        if not 0.0 <= sparsity < 1.0:
            raise BudgetError(f"sparsity {sparsity:g} is outside (0, 1)", hint="Give the share to remove, e.g. 0.2.")
        if sparsity > most + 1e-12:
            raise BudgetError(
                f"sparsity {sparsity:g} of {self.resource} is out of reach: every sublayer keeps its least units, "
                f"so the reachable range is 0 to {most:.4f}",
                hint=f"Ask for at most {most:.4f}, or lower prune.min_units.",
            )

    def allocation(self, kept: Sequence[int]) -> Allocation:
        """Price an allocation given as units kept per sublayer."""
        cost = sum(float(table[k]) for k, table in zip(kept, self._tables, strict=True))
        return Allocation(tuple(int(k) for k in kept), cost, self.dense_cost, self.resource)

    def project(self, importance: np.ndarray, sparsity: float) -> Allocation:
        """The allocation that these importances want at this sparsity.

        Args:
            importance: shape (2L,), in [-1, 1] (values outside are clipped).
            sparsity: share of the resource to remove, in [0, 1).

        Returns:
            cost at most (1 - sparsity) of the dense cost, and no further level fits.

        Raises:
            BudgetError: out of reach, or importances of the wrong shape or not finite.
        """
        self.check(sparsity)
        wanted = np.asarray(importance, dtype=np.float64)
        if wanted.shape != (len(self.sublayers),) or not np.isfinite(wanted).all():
            raise BudgetError(
                f"importances must be {len(self.sublayers)} finite numbers, got shape {wanted.shape}",
                hint="One number per sublayer: layer 0 attention, layer 0 mlp, layer 1 attention, ...",
            )
        ratio = (np.clip(wanted, -1.0, 1.0) + 1.0) / 2.0
        # Rounding keeps ties ties, and so served over depth, where floats differ in the last place.
        times = np.round(self._ratio - ratio[self._owner], 9)
        order = np.lexsort((self._tie, times))
        room = (1.0 - sparsity) * self.dense_cost * (1 + 1e-12) - self.least_cost
        granted = _grant(self._owner[order], self._increment[order], room, len(self.sublayers))
        kept = [int(ladder.units[level]) for ladder, level in zip(self._ladders, granted, strict=True)]
        return self.allocation(kept)


def _checked(sublayers: Sequence[Sublayer], tables: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The tables as float64, one per sublayer; raises ``BudgetError`` where one is no cost table."""
    checked = tuple(np.asarray(table, dtype=np.float64) for table in tables)
    if len(checked) != len(sublayers):
        raise BudgetError(f"{len(checked)} cost tables for {len(sublayers)} sublayers", hint="Give one per sublayer.")
    for sublayer, table in zip(sublayers, checked, strict=True):
        if table.shape != (sublayer.units + 1,) or not np.isfinite(table).all():
            raise BudgetError(
                f"the cost table of {sublayer.name} must be {sublayer.units + 1} finite numbers, got {table.shape}",
                hint=f"One number per level, 0 to {sublayer.units} units.",
            )
        if table[0] < 0 or (np.diff(table) < 0).any():
            raise BudgetError(f"the cost table of {sublayer.name} is negative or falls", hint="More must cost no less.")
    return checked


def _ladder(table: np.ndarray, least: int) -> Ladder:
    units = len(table) - 1
    # A sublayer that costs nothing stays whole: there is nothing to gain from cutting it. Levels that cost nothing
    # more (flat parts of a measured table) need no rule: they always fit, so they are granted when their time comes.
    lowest = units if table[-1] == 0 else min(least, units)
    kept = np.arange(lowest, units + 1)
    return Ladder(kept, table[kept])


def _grant(owner: np.ndarray, increment: np.ndarray, room: float, sublayers: int) -> np.ndarray:
    """Levels granted to each sublayer, in the given order, while they fit; shape (sublayers,), int64."""
    spent = np.cumsum(increment)
    first = int(np.searchsorted(spent, room, side="right"))
    granted = np.bincount(owner[:first], minlength=sublayers)
    room -= float(spent[first - 1]) if first else 0.0
    closed = np.zeros(sublayers, dtype=bool)
    for i, cost in zip(owner[first:].tolist(), increment[first:].tolist(), strict=True):
        if closed[i]:
            continue
        if cost <= room:
            granted[i] += 1
            room -= cost
        else:
            closed[i] = True
            if closed.all():
                break
    return granted
