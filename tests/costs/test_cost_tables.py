"""A budget whose costs are measured tables: the promises of the projection hold with jumps and flat parts too."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression

from ffgym.costs.latency_fit import cost_table, grid
from ffgym.errors import BudgetError
from ffgym.pruning.budget import Budget, service_order
from ffgym.types import Sublayer

ATTENTION = Sublayer(0, "attention", units=4, channels_per_unit=8, unit_params=70, unit_macs=64, head_dim=8)
MLP = Sublayer(0, "mlp", units=16, channels_per_unit=1, unit_params=9, unit_macs=9)

seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0, 1)
# Half of all steps up cost nothing, as in the flat parts of an isotonic fit; some are jumps.
steps = st.one_of(st.just(0), st.integers(0, 5), st.sampled_from([0, 1, 10**6]))


@st.composite
def priced(draw):
    """Up to 4 layers, and a cost table of whole numbers for each half; layer 0's attention costs something."""
    sublayers, tables = [], []
    for layer in range(draw(st.integers(1, 4))):
        for half in (ATTENTION, MLP):
            units = draw(st.integers(1, 12))
            rises = draw(st.lists(steps, min_size=units, max_size=units))
            if not sublayers:
                rises[0] = 1
            sublayers.append(replace(half, layer=layer, units=units))
            tables.append(np.concatenate([[0], np.cumsum(rises)]))
    return sublayers, tables


def budget_of(model, least=1):
    sublayers, tables = model
    return Budget(sublayers, tables, resource="latency", min_units=least)


def reached(budget, share):
    """A sparsity within reach; the ends come out of the same arithmetic as the budget's own."""
    return share * budget.reachable[1]


def importances(model, seed):
    return np.random.default_rng(seed).uniform(-1, 1, len(model[0]))


def slowly_projected(model, importance, sparsity, least):
    """Raise nu from one event to the next; whoever's wanted ratio passes its next level gets it, if it fits."""
    sublayers, tables = model
    ratio = [(Fraction(a) + 1) / 2 for a in importance]
    whole = [int(table[-1]) == 0 for table in tables]
    lowest = [max(least, int((s.layer, s.kind) == (0, "attention"))) for s in sublayers]
    kept = [s.units if w else min(low, s.units) for s, w, low in zip(sublayers, whole, lowest, strict=True)]
    room = (1 - Fraction(sparsity)) * sum(int(table[-1]) for table in tables)
    room -= sum(int(table[k]) for table, k in zip(tables, kept, strict=True))
    rank = service_order(1 + max(s.layer for s in sublayers))
    in_turn = sorted(range(len(kept)), key=lambda i: (rank[sublayers[i].layer], sublayers[i].kind == "mlp"))
    open_ = set(in_turn)
    for nu in sorted(
        {Fraction(u, s.units) - r for s, r in zip(sublayers, ratio, strict=True) for u in range(s.units + 1)}
    ):
        for i in in_turn:
            units = sublayers[i].units
            while i in open_ and kept[i] < units and ratio[i] + nu >= Fraction(kept[i] + 1, units):
                step = int(tables[i][kept[i] + 1] - tables[i][kept[i]])
                if step <= room:
                    kept[i] += 1
                    room -= step
                else:
                    open_.discard(i)
    return tuple(kept)


class TestPromises:
    @given(priced(), seeds, shares, st.integers(0, 2))
    def test_feasible_and_nothing_left_that_fits(self, model, seed, share, least):
        budget = budget_of(model, least)
        sparsity = reached(budget, share)
        got = budget.project(importances(model, seed), sparsity)
        limit = (1 - sparsity) * budget.dense_cost * (1 + 1e-12)
        assert got.cost == sum(int(table[k]) for k, table in zip(got.kept, model[1], strict=True))
        assert got.cost <= limit
        following = [
            int(table[k + 1]) - int(table[k]) for k, s, table in zip(got.kept, *model, strict=True) if k < s.units
        ]
        assert all(got.cost + step > limit for step in following), "a level that still fits was left out"
        assert 0 not in following, "a level that costs nothing was left out"

    @given(priced(), st.data(), shares, st.integers(0, 2))
    def test_equals_the_slow_reference(self, model, data, share, least):
        wanted = st.integers(-8, 8).map(lambda i: i / 8)
        importance = data.draw(st.lists(wanted, min_size=len(model[0]), max_size=len(model[0])))
        budget = budget_of(model, least)
        sparsity = int(reached(budget, share) * 1024) / 1024
        got = budget.project(np.array(importance), sparsity)
        assert got.kept == slowly_projected(model, importance, sparsity, least)

    @given(priced(), seeds, shares, st.integers(0, 2))
    def test_a_second_projection_changes_nothing(self, model, seed, share, least):
        budget = budget_of(model, least)
        sparsity = reached(budget, share)
        kept = budget.project(importances(model, seed), sparsity).kept
        ratios = np.array([k / s.units for k, s in zip(kept, model[0], strict=True)])
        for dtype in (np.float64, np.float32):
            assert budget.project((2 * ratios - 1).astype(dtype), sparsity).kept == kept

    @given(priced(), seeds, shares, st.data(), st.floats(0, 2), st.booleans())
    def test_more_importance_never_costs_a_sublayer_units(self, model, seed, share, data, raise_by, tied):
        budget = budget_of(model)
        importance = importances(model, seed)
        importance = np.round(importance * 2) / 2 if tied else importance
        which = data.draw(st.integers(0, len(model[0]) - 1))
        raised = importance.copy()
        raised[which] = min(1.0, raised[which] + raise_by)
        sparsity = reached(budget, share)
        assert budget.project(raised, sparsity).kept[which] >= budget.project(importance, sparsity).kept[which]

    @given(priced(), seeds, shares)
    def test_the_order_of_the_list_does_not_matter(self, model, seed, share):
        sublayers, tables = model
        budget, importance = budget_of(model), importances(model, seed)
        order = np.random.default_rng(seed).permutation(len(sublayers))
        shuffled = budget_of(([sublayers[i] for i in order], [tables[i] for i in order]))
        sparsity = reached(budget, share)
        kept = budget.project(importance, sparsity).kept
        assert shuffled.project(importance[order], sparsity).kept == tuple(kept[i] for i in order)


class TestTables:
    def test_prices_per_unit_are_the_linear_case(self):
        sublayers = [replace(half, layer=layer) for layer in range(3) for half in (ATTENTION, MLP)]
        plain = Budget(sublayers)
        priced = Budget(sublayers, cost_tables=[np.arange(s.units + 1) * s.unit_params for s in sublayers])
        importance = np.linspace(-1, 1, 6)
        for sparsity in (0.0, 0.1, 0.5, plain.reachable[1]):
            assert priced.project(importance, sparsity) == plain.project(importance, sparsity)

    def test_a_sublayer_that_cannot_get_cheaper_stays_whole(self):
        """All sizes of the MLP take equally long: to cut it would cost quality for nothing."""
        flat = np.array([0.0, *[100.0] * 16])
        budget = budget_of(([ATTENTION, MLP], [np.array([0.0, 10, 20, 30, 40]), flat]))
        got = budget.project(np.array([1.0, -1.0]), 20 / 140)
        assert got.kept == (2, 16)
        assert got.sparsity == pytest.approx(20 / 140)

    def test_a_jump_is_paid_once(self):
        """9 to 16 channels cost the same: with the ninth come all others."""
        table = np.array([0.0, *[10.0] * 8, *[20.0] * 8])
        budget = budget_of(([ATTENTION, MLP], [np.array([0.0, 1, 2, 3, 4]), table]))
        assert budget.project(np.array([-1.0, 0.1]), 0.1).kept == (1, 16)
        assert budget.project(np.array([1.0, -1.0]), 0.1).kept == (4, 8)

    def test_sparsity_out_of_reach_names_the_range(self):
        budget = budget_of(([ATTENTION, MLP], [np.array([0.0, 30, 30, 30, 40]), np.arange(17.0)]))
        assert budget.reachable[1] == pytest.approx(1 - 31 / 56)
        with pytest.raises(BudgetError, match=r"0\.9 of latency is out of reach.* 0 to 0\.4464"):
            budget.check(0.9)

    @pytest.mark.parametrize(
        ("tables", "complaint"),
        [
            ([np.arange(5.0)], "1 cost tables for 2 sublayers"),
            ([np.arange(5.0), np.arange(16.0)], "layer 0 mlp must be 17 finite numbers"),
            ([np.array([0, 1, np.nan, 3, 4]), np.arange(17.0)], "layer 0 attention must be 5 finite numbers"),
            ([np.array([0.0, 2, 1, 3, 4]), np.arange(17.0)], "layer 0 attention is negative or falls"),
            ([np.arange(5.0) - 1, np.arange(17.0)], "layer 0 attention is negative or falls"),
        ],
    )
    def test_what_is_no_cost_table_is_refused(self, tables, complaint):
        with pytest.raises(BudgetError, match=complaint):
            budget_of(([ATTENTION, MLP], tables))


class TestFromTimes:
    @given(st.integers(1, 5000))
    def test_the_grid_ends_at_all_units(self, units):
        sizes = grid(units)
        assert sizes[0] == 1
        assert sizes[-1] == units
        assert len(sizes) == min(units, len(sizes)) <= 17
        assert sizes == sorted(set(sizes))

    def test_few_units_are_all_timed_and_many_by_sixteenths(self):
        assert grid(3) == [1, 2, 3]
        assert grid(17) == list(range(1, 18))
        assert grid(1536) == [1, *range(96, 1537, 96)]

    @given(st.integers(1, 60), seeds)
    def test_costs_are_whole_and_never_fall(self, units, seed):
        rng = np.random.default_rng(seed)
        seconds = rng.uniform(1e-6, 1, len(grid(units)))
        table = cost_table(grid(units), seconds)
        assert table.shape == (units + 1,)
        assert table[0] == 0
        assert (np.diff(table) >= 0).all()
        assert (table == np.round(table)).all()
        assert seconds.min() * 1e12 - 1 <= table[1]
        assert table[-1] <= seconds.max() * 1e12 + 1

    def test_times_that_rise_are_kept_and_joined_by_straight_lines(self):
        table = cost_table([1, 4, 8], [1e-3, 4e-3, 6e-3])
        assert table.tolist() == [0, 1e9, 2e9, 3e9, 4e9, 4.5e9, 5e9, 5.5e9, 6e9]

    def test_times_that_fall_are_pooled_as_the_isotonic_regression_does(self):
        seconds = np.array([3.0, 1.0, 2.0, 5.0, 4.0])
        table = cost_table([1, 2, 3, 4, 5], seconds)
        assert table[1:] == pytest.approx(isotonic_regression(seconds) * 1e12)
        assert table.tolist() == [0, 2e12, 2e12, 2e12, 4.5e12, 4.5e12]
