"""A budget whose costs are measured tables, and what measured times come to as such tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffgym.costs.latency_fit import cost_table, seconds_without, timed_sizes
from ffgym.errors import BudgetError
from ffgym.pruning.budget import Budget
from ffgym.types import Sublayer

ATTENTION = Sublayer(0, "attention", units=4, channels_per_unit=8, unit_params=70, unit_macs=64, head_dim=8)
MLP = Sublayer(0, "mlp", units=16, channels_per_unit=1, unit_params=9, unit_macs=9)

seeds = st.integers(0, 2**32 - 1)


def budget_of(sublayers, tables):
    return Budget(sublayers, tables, resource="latency")


class TestTables:
    def test_a_sublayer_that_cannot_get_cheaper_stays_whole(self):
        """All sizes of the MLP take equally long: to cut it would cost quality for nothing."""
        flat = np.array([0.0, *[100.0] * 16])
        budget = budget_of([ATTENTION, MLP], [np.array([0.0, 10, 20, 30, 40]), flat])
        got = budget.project(np.array([1.0, -1.0]), 20 / 140)
        assert got.kept == (2, 16)
        assert got.sparsity == pytest.approx(20 / 140)

    def test_a_jump_is_paid_once(self):
        """9 to 16 channels cost the same: with the ninth come all others."""
        table = np.array([0.0, *[10.0] * 8, *[20.0] * 8])
        budget = budget_of([ATTENTION, MLP], [np.array([0.0, 1, 2, 3, 4]), table])
        assert budget.project(np.array([-1.0, 0.1]), 0.1).kept == (1, 16)
        assert budget.project(np.array([1.0, -1.0]), 0.1).kept == (4, 8)

    @pytest.mark.parametrize(
        ("tables", "complaint"),
        [
            ([np.arange(5.0)], "1 cost tables for 2 sublayers"),
            ([np.arange(5.0), np.arange(16.0)], r"layer 0 mlp has shape \(16,\), not \(17,\)"),
            ([np.array([0, 1, np.nan, 3, 4]), np.arange(17.0)], "layer 0 attention holds NaN"),
            ([np.array([0.0, 2, 1, 3, 4]), np.arange(17.0)], "layer 0 attention is negative or falls"),
            ([np.arange(5.0) - 1, np.arange(17.0)], "layer 0 attention is negative or falls"),
        ],
    )
    def test_what_is_no_cost_table_is_refused(self, tables, complaint):
        with pytest.raises(BudgetError, match=complaint):
            budget_of([ATTENTION, MLP], tables)


class TestFromTimes:
    def test_few_units_are_all_timed_and_many_by_sixteenths(self):
        assert timed_sizes(3) == [1, 2, 3]
        assert timed_sizes(17) == list(range(1, 18))
        assert timed_sizes(1536) == [1, *range(96, 1537, 96)]

    @given(st.integers(1, 60), seeds)
    def test_costs_are_whole_and_never_fall(self, units, seed):
        rng = np.random.default_rng(seed)
        seconds = rng.uniform(1e-6, 1, len(timed_sizes(units)))
        table = cost_table(timed_sizes(units), seconds)
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
        table = cost_table([1, 2, 3, 4, 5], [3.0, 1.0, 2.0, 5.0, 4.0])
        assert table.tolist() == [0, 2e12, 2e12, 2e12, 4.5e12, 4.5e12]

    @given(st.integers(2, 6), st.floats(0, 9), st.floats(0, 3))
    def test_the_time_without_units_is_where_the_line_through_the_others_meets_none(self, count, rest, each):
        sizes = [2**power for power in range(count)]
        assert seconds_without(sizes, [rest + each * size for size in sizes]) == pytest.approx(rest, abs=1e-9)

    def test_no_sublayer_takes_less_than_nothing(self):
        assert seconds_without([1, 2, 3], [3.0, 2.0, 1.0]) == 1.0
        assert seconds_without([4], [3.0]) == 3.0
