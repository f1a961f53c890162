"""From importances to an exact budget (docs/mathematics.md, The budget).

Importance a maps to the wanted keep ratio r = (a + 1) / 2. As one shift nu rises, sublayer i reaches its level s as
soon as r_i + nu is nearer to that level's keep ratio than to the one below, that is at time t_i(s) = (ratio_i(s) +
ratio_i(s - 1)) / 2 - r_i. Levels are granted in the order of these times while the budget lasts; a level that does not
fit closes its sublayer, and the others go on (``sweep.py``). That is what makes the promises hold exactly: feasible,
nothing left that fits, monotone in a sublayer's own importance, a fixed point of itself. They hold for any levels:
single units, multiples of ``align`` channels, or levels that all layers share.

Rounding is to the nearest level, not down: otherwise an attention of 3 KV groups would lose one to the smallest change,
while an MLP of 1,536 channels hardly notices it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from ffgym.errors import BudgetError
from ffgym.pruning.sweep import Ladder, Sweep
from ffgym.types import Allocation, Kind, Sublayer

LEAST_LEVELS = 48  # that an MLP has to choose from when its widths are aligned for fast kernels
REACH = 1 / 12  # share of a sublayer's units on either side of its level over which slopes are averaged, at least one
AT_LEVEL = 0.1  # units by which an importance may exceed a level and still be at it
FEWEST = 6  # units of a sublayer that slopes can lead; 3 were too few (docs/experiments.md), 9 were not


def service_order(depth: int) -> np.ndarray:
    """Rank of each layer, shape (depth,), int64, in an order spread over depth (bit reversal): ties favour no end."""
    bits = max(depth - 1, 1).bit_length()
    reverse = [int(format(layer, f"0{bits}b")[::-1], 2) for layer in range(depth)]
    rank = np.empty(depth, dtype=np.int64)
    rank[np.argsort(reverse, kind="stable")] = np.arange(depth)
    return rank


def kernel_width(channels: int) -> int:
    """The largest power of two, 64 at most, of which an MLP of so many channels can keep ``LEAST_LEVELS`` multiples.

    Kernels multiply in tiles: a width between two of their multiples takes as long as the next one, or longer.
    """
    return next(width for width in (64, 32, 16, 8, 4, 2, 1) if width == 1 or channels >= LEAST_LEVELS * width)


def width_step(sublayer: Sublayer, align: int | Literal["auto"]) -> int:
    """The channels that a sublayer's sizes are multiples of; see `Budget` for ``align``."""
    if sublayer.kind == "experts":
        return 1
    if align != "auto":
        return align
    return kernel_width(sublayer.channels) if sublayer.kind == "mlp" else 1


def aligned_levels(sublayer: Sublayer, levels: Iterable[int], *, least: int, align: int) -> np.ndarray:
    """The levels at which a sublayer keeps a multiple of ``align`` channels, and the dense one whatever it is.

    Args:
        sublayer: whose levels; ``align`` counts its consumer's channels, of which a unit owns ``channels_per_unit``.
        levels: units that may be kept.
        least: units that have to be kept, where the sublayer has as many.
        align: channels, >= 1.

    Returns:
        units, shape (levels,), int64, strictly increasing, last = all.
    """
    step = align // math.gcd(align, sublayer.channels_per_unit)
    fitting = {k for k in levels if least <= k < sublayer.units and k % step == 0}
    return np.array([*sorted(fitting), sublayer.units], dtype=np.int64)


def within_reach(units: int, level: int) -> range:
    """The units whose slopes tell how good a level is: those within ``REACH`` of it, of a few those beside it."""
    reach = max(1, int(units * REACH))
    return range(max(0, level - reach), min(units, level + reach))


class Budget:
    """Projects importances onto allocations that meet a sparsity exactly.

    Args:
        sublayers: the 2L sublayers.
        cost_tables: what keeping k = 0 .. units units of each sublayer costs, each shape (units + 1,), non-decreasing
            from 0 or more; the parameters of the units where left out. Whole numbers keep sums exact.
        resource: name of the costs, for messages and allocations.
        min_units: least units a sublayer keeps (the attention of layer 0 always keeps one, and as many experts stay as
            a token is sent to).
        align: an attention or MLP keeps a multiple of this many channels, or all of them. ``min_units`` is rounded up
            to such a multiple; a sublayer that has no smaller one stays whole. ``"auto"``: MLPs keep what
            `kernel_width` says, attention any number of units.
        shapes: ties all layers to one shape: for each kind the numbers of units that they may keep, e.g.
            ``{"attention": (1, 2, 4), "mlp": range(1, 1537)}``. The importance of a kind is then the mean over its
            sublayers. ``None`` lets every sublayer have a size of its own.

    Raises:
        BudgetError: invalid cost tables, or layers with MLPs and layers with experts that should share one shape.
    """

    def __init__(
        self,
        sublayers: Sequence[Sublayer],
        cost_tables: Sequence[np.ndarray] | None = None,
        *,
        resource: str = "params",
        min_units: int = 1,
        align: int | Literal["auto"] = 1,
        shapes: Mapping[Kind, Sequence[int]] | None = None,
    ) -> None:
        self.sublayers = tuple(sublayers)
        self.resource = resource
        self.tied = shapes is not None
        self._align, self._min_units = align, min_units
        if cost_tables is None:
            cost_tables = [np.arange(s.units + 1) * s.unit_params for s in self.sublayers]
        self._tables = check_tables(self.sublayers, cost_tables)
        groups = [(i,) for i in range(len(self.sublayers))] if shapes is None else _kinds(self.sublayers)
        if self.tied and len(groups) > 2:
            raise BudgetError(
                "some layers have an MLP and others experts, so they cannot share one shape",
                hint="Leave prune.uniform out.",
            )
        self._ladders = tuple(self._ladder(members, min_units, shapes) for members in groups)
        rank = service_order(1 + max(sublayer.layer for sublayer in self.sublayers))
        self.dense_cost = float(sum(ladder.cost[-1] for ladder in self._ladders))
        ties = [
            rank[s.layer] * 2 + (s.kind != "attention") for s in (self.sublayers[x.members[0]] for x in self._ladders)
        ]
        self._sweep = Sweep(self._ladders, np.array(ties))

    @property
    def greatest_sparsity(self) -> float:
        """What the levels allow."""
        return 1.0 - float(sum(ladder.cost[0] for ladder in self._ladders)) / self.dense_cost

    def check(self, sparsity: float) -> None:
        """Raise ``BudgetError`` where the sparsity lies outside [0, 1) or out of reach."""
        most = self.greatest_sparsity
        if not 0.0 <= sparsity < 1.0:
            raise BudgetError(f"sparsity {sparsity:g} is outside [0, 1)", hint="Give the share to remove, e.g. 0.2.")
        if sparsity > most + 1e-12:
            asked = math.floor(most * 1e4) / 1e4  # not rounded up: that would be refused too
            raise BudgetError(
                f"sparsity {sparsity:g} of {self.resource} is out of reach: every sublayer keeps its least units, "
                f"so the reachable range is 0 to {asked:.4f}",
                hint=self._what_would_help(asked),
            )

    def allocation(self, kept: Sequence[int]) -> Allocation:
        """Price an allocation given as units kept per sublayer."""
        cost = sum(float(table[k]) for k, table in zip(kept, self._tables, strict=True))
        return Allocation(tuple(int(k) for k in kept), cost, self.dense_cost, self.resource)

    def importance(self, kept: Sequence[int]) -> np.ndarray:
        """The importances that stand for exactly these units, shape (2L,), float32; they project to the same units."""
        units = np.array([sublayer.units for sublayer in self.sublayers])
        result: np.ndarray = (2 * np.array(kept) / units - 1).astype(np.float32)
        return result

    def shapes(self, sparsity: float) -> list[Allocation]:
        """Every allocation that a projection can give at this sparsity where layers are tied; else an empty list.

        One shape of all layers is a pair of levels. At most one pair for each level of the attention meets the budget
        with no further level that fits, so all of them can be measured.
        """
        self.check(sparsity)
        if not self.tied:
            return []
        attention, mlp = self._ladders
        limit = self._limit(sparsity)
        found = []
        for level, cost in enumerate(attention.cost):
            widest = int(np.searchsorted(mlp.cost, limit - cost, side="right")) - 1
            is_last = level + 1 == len(attention.cost)
            if widest >= 0 and (is_last or attention.cost[level + 1] + mlp.cost[widest] > limit):
                found.append(self.allocation(self._spread([level, widest])))
        return found

    def project(self, importance: np.ndarray, sparsity: float) -> Allocation:
        """The allocation that these importances give at this sparsity.

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
            got = f"shape {wanted.shape}" if wanted.shape != (len(self.sublayers),) else "NaN or infinity among them"
            raise BudgetError(
                f"importances must be {len(self.sublayers)} finite numbers, got {got}",
                hint="One number per sublayer: layer 0 attention, layer 0 mlp, layer 1 attention, ...",
            )
        clipped = np.clip(wanted, -1.0, 1.0)
        if self.tied:
            clipped = np.array([clipped[list(ladder.members)].mean() for ladder in self._ladders])
        return self.allocation(self._spread(self._sweep.levels((clipped + 1.0) / 2.0, self._limit(sparsity))))

    @property
    def coarse(self) -> np.ndarray:
        """Which sublayers have fewer than ``FEWEST`` units, shape (2L,), bool."""
        return np.array([sublayer.units < FEWEST for sublayer in self.sublayers])

    @property
    def has_slopes(self) -> bool:
        """Whether importances have slopes: where each layer has its own size, no experts, and something fine to cut."""
        fine = (table[-1] > 0 and not coarse for table, coarse in zip(self._tables, self.coarse, strict=True))
        return not self.tied and all(sublayer.kind != "experts" for sublayer in self.sublayers) and any(fine)

    def importance_slopes(
        self, importance: np.ndarray, kept: Sequence[int], unit_slopes: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Derivative by importance of what unit slopes are of, the loss or a divergence, through the projection.

        A sublayer's slope g_i along its path is the mean over the units within ``REACH`` of its level, since a single
        unit says little. If one keep ratio r_i changes, the projection shifts all ratios that can move, so that the
        cost c stays: d loss / d a_i = (g_i - c_i sum_j g_j / sum_j c_j) / 2, g and c by keep ratio, a = 2 r - 1. A
        sublayer that is whole or gone moves only if its ratio lies within ``REACH`` of that end.

        Where a sublayer has but a few units (`coarse`), a derivative says little of so large a step. What is returned
        for it is the first-order estimate for one unit, by importance: above 0, the loss falls when that unit goes, or
        stays away, and the others share what it costs. It is the unit that the importance lies in: with an importance
        of 2.3 or 2.7 units the third one, with 2 the second.

        Args:
            importance: what was projected, shape (2L,).
            kept: the units that it gave, length 2L.
            unit_slopes: first-order change of the loss, or of the divergence, as each unit joins, shape (units,) for
                every sublayer; those `within_reach` of its level count.

        Returns:
            shape (2L,), float64, nats per token and importance; 0 where the sublayer costs nothing, or is coarse and
            has to keep that unit, or is not near it.

        Raises:
            BudgetError: there are no slopes; see `has_slopes`.
        """
        if self.tied:
            raise BudgetError(
                "slopes need layers that each have a size of their own, and here all share one shape",
                hint="Leave prune.uniform out, or take an agent that needs no slopes, such as reinforce.",
            )
        if not self.has_slopes:
            raise BudgetError(
                f"everything that costs {self.resource} comes in a few large units, which have no slopes",
                hint="Take an agent that needs none, such as reinforce, or another resource.",
            )
        units = np.array([sublayer.units for sublayer in self.sublayers])
        levels, coarse = np.asarray(kept), self.coarse
        ratio = (np.clip(np.asarray(importance, dtype=np.float64), -1.0, 1.0) + 1.0) / 2.0
        value, cost = np.zeros(len(units)), np.zeros(len(units))
        own = np.clip(np.ceil(ratio * units - AT_LEVEL) - 1, 0, None).astype(int)  # the unit that an importance lies in
        for i, (slopes, table) in enumerate(zip(unit_slopes, self._tables, strict=True)):
            near = within_reach(units[i], levels[i])
            if coarse[i]:
                near = range(own[i], own[i] + 1) if own[i] in near else range(0)
            if near:
                value[i] = units[i] * float(np.mean(slopes[near.start : near.stop]))
                cost[i] = units[i] * float(table[near.stop] - table[near.start]) / len(near)
        inside = ~coarse & (cost > 0) & (levels > 0) & (levels < units)
        shift = float(np.mean((levels / units - ratio)[inside])) if inside.any() else 0.0
        moves = ~coarse & (cost > 0) & (ratio + shift > -REACH) & (ratio + shift < 1 + REACH)
        if not moves.any():
            return np.zeros(len(units))
        price = value[moves].sum() / cost[moves].sum()
        may_go = coarse & (cost > 0) & (own >= [ladder.units[0] for ladder in self._ladders])
        return np.asarray(np.where(moves | may_go, (value - cost * price) / 2.0, 0.0))

    def _limit(self, sparsity: float) -> float:
        """What an allocation may cost."""
        return (1.0 - sparsity) * self.dense_cost * (1 + 1e-12)

    def _spread(self, levels: Sequence[int] | np.ndarray) -> list[int]:
        """Units of every sublayer, length 2L, from the level of every ladder."""
        kept = [0] * len(self.sublayers)
        for ladder, level in zip(self._ladders, levels, strict=True):
            for member in ladder.members:
                kept[member] = int(ladder.units[level])
        return kept

    def _ladder(self, members: tuple[int, ...], min_units: int, shapes: Mapping[Kind, Sequence[int]] | None) -> Ladder:
        sublayers = [self.sublayers[i] for i in members]
        first = sublayers[0]
        units = np.array([first.units])
        # A sublayer that costs nothing stays whole, because cutting it gains nothing. Levels that cost nothing more
        # (flat parts of a measured table) need no rule: they always fit, so they are granted in their turn.
        if any(self._tables[i][-1] > 0 for i in members):
            holds_cache_length = any((s.kind, s.layer) == ("attention", 0) for s in sublayers)
            least = max(min_units, first.experts_per_token, 1 if holds_cache_length else 0)
            levels = range(first.units) if shapes is None else shapes[first.kind]
            align = width_step(first, self._align)
            units = aligned_levels(first, levels, least=least, align=align)
        return Ladder(members, units, np.sum([self._tables[i][units] for i in members], axis=0))

    def _what_would_help(self, most: float) -> str:
        changes = [f"ask for at most {most:.4f}"] if most > 0 else []
        if self._min_units:
            changes.append("lower prune.min_units")
        if self._align == "auto" or self._align > 1:
            changes.append("lower prune.align")
        if self.tied:
            changes.append("leave prune.uniform out")
        if self.resource == "latency":
            changes.append("look for a wrong time in the latency table")
        text = ", or ".join(changes or ["count another resource"])
        return f"{text[0].upper()}{text[1:]}."


def check_tables(sublayers: Sequence[Sublayer], tables: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The tables as float64, one per sublayer; raises ``BudgetError`` where one is invalid."""
    checked = tuple(np.asarray(table, dtype=np.float64) for table in tables)
    if len(checked) != len(sublayers):
        raise BudgetError(f"{len(checked)} cost tables for {len(sublayers)} sublayers", hint="Give one per sublayer.")
    for sublayer, table in zip(sublayers, checked, strict=True):
        if table.shape != (sublayer.units + 1,):
            raise BudgetError(
                f"the cost table of {sublayer.name} has shape {table.shape}, not ({sublayer.units + 1},)",
                hint=f"One number per level, 0 to {sublayer.units} units.",
            )
        if not np.isfinite(table).all():
            raise BudgetError(f"the cost table of {sublayer.name} holds NaN or infinity", hint="Give finite numbers.")
        if table[0] < 0 or (np.diff(table) < 0).any():
            raise BudgetError(f"the cost table of {sublayer.name} is negative or falls", hint="More must cost no less.")
    return checked


def _kinds(sublayers: Sequence[Sublayer]) -> list[tuple[int, ...]]:
    """Indices of all attention sublayers, of all MLPs, and of all that hold experts, where there are any."""
    kinds: tuple[Kind, ...] = ("attention", "mlp", "experts")
    groups = (tuple(i for i, s in enumerate(sublayers) if s.kind == kind) for kind in kinds)
    return [group for group in groups if group]
