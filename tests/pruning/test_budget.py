"""The promises of the budget projection (DESIGN 3.3), against a slow reference and against numbers counted by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffgym.errors import BudgetError
from ffgym.pruning.budget import Budget, service_order, unit_cost
from ffgym.types import Sublayer

ATTENTION = Sublayer(
    0, "attention", units=4, channels_per_unit=8, unit_params=70, unit_macs=64, query_heads_per_unit=2, head_dim=8
)
MLP = Sublayer(0, "mlp", units=16, channels_per_unit=1, unit_params=9, unit_macs=9)

seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0, 1)


def model_of(depth, attention=ATTENTION, mlp=MLP):
    return [replace(half, layer=layer) for layer in range(depth) for half in (attention, mlp)]


@st.composite
def models(draw, smallest=1):
    """Up to 5 layers whose halves all differ in size and price."""
    sizes = st.integers(smallest, 24)
    prices = st.integers(1, 60)
    return [
        replace(half, layer=layer, units=draw(sizes), unit_params=draw(prices))
        for layer in range(draw(st.integers(1, 5)))
        for half in (ATTENTION, MLP)
    ]


def spread_importances(sublayers, seed):
    """Importances without ties."""
    return np.random.default_rng(seed).uniform(-1, 1, len(sublayers))


def slowly_projected(budget, sublayers, importance, sparsity, least):
    """Raise nu from one event to the next; whoever's wanted ratio rounds to its next level gets it, if it fits."""
    ratio = [(Fraction(a) + 1) / 2 for a in importance]
    kept = [min(least, s.units) for s in sublayers]
    room = (1 - Fraction(sparsity)) * sum(s.units * s.unit_params for s in sublayers)
    room -= sum(k * s.unit_params for k, s in zip(kept, sublayers, strict=True))
    rank = service_order(1 + max(s.layer for s in sublayers))
    in_turn = sorted(range(len(kept)), key=lambda i: (rank[sublayers[i].layer], sublayers[i].kind == "mlp"))
    open_ = set(in_turn)
    for nu in sorted(
        {Fraction(2 * u - 1, 2 * s.units) - r for s, r in zip(sublayers, ratio, strict=True) for u in range(s.units + 1)}
    ):
        for i in in_turn:
            while (
                i in open_
                and kept[i] < sublayers[i].units
                and ratio[i] + nu >= Fraction(2 * kept[i] + 1, 2 * sublayers[i].units)
            ):
                if sublayers[i].unit_params <= room:
                    kept[i] += 1
                    room -= sublayers[i].unit_params
                else:
                    open_.discard(i)
    return tuple(kept)


class TestPromises:
    @given(models(), seeds, shares, st.integers(0, 3))
    def test_feasible_and_nothing_left_that_fits(self, sublayers, seed, share, least):
        budget = Budget(sublayers, min_units=least)
        sparsity = share * budget.reachable[1]
        got = budget.project(spread_importances(sublayers, seed), sparsity)
        limit = (1 - sparsity) * budget.dense_cost
        assert got.cost == sum(k * s.unit_params for k, s in zip(got.kept, sublayers, strict=True))
        assert got.cost <= limit * (1 + 1e-9)
        assert got.sparsity >= sparsity - 1e-9
        more = [s.unit_params for k, s in zip(got.kept, sublayers, strict=True) if k < s.units]
        assert all(got.cost + one > limit for one in more), "a unit that still fits was left out"
        assert not more or limit - got.cost < min(more), "within one smallest unit of the budget"

    @given(models(), st.data(), shares, st.integers(1, 3))
    def test_equals_the_slow_reference(self, sublayers, data, share, least):
        """Importances on a grid, so that there are many ties, and exact fractions in the reference."""
        grid = st.integers(-8, 8).map(lambda i: i / 8)
        importance = data.draw(st.lists(grid, min_size=len(sublayers), max_size=len(sublayers)))
        budget = Budget(sublayers, min_units=least)
        sparsity = int(share * budget.reachable[1] * 1024) / 1024  # exact in floating point, and so is 1 - sparsity
        got = budget.project(np.array(importance), sparsity)
        assert got.kept == slowly_projected(budget, sublayers, importance, sparsity, least)

    @given(models(), seeds, shares)
    def test_the_order_of_the_list_does_not_matter(self, sublayers, seed, share):
        budget = Budget(sublayers)
        importance = spread_importances(sublayers, seed)
        order = np.random.default_rng(seed).permutation(len(sublayers))
        shuffled = Budget([sublayers[i] for i in order])
        sparsity = share * budget.reachable[1]
        kept = budget.project(importance, sparsity).kept
        assert shuffled.project(importance[order], sparsity).kept == tuple(kept[i] for i in order)

    @given(models(), seeds, shares)
    def test_where_in_the_model_a_sublayer_stands_does_not_matter(self, sublayers, seed, share):
        """Whole layers change places; no place is favoured where there are no ties."""
        depth = len(sublayers) // 2
        order = np.random.default_rng(seed).permutation(depth)
        halves = [2 * layer + half for layer in order for half in (0, 1)]
        moved = [replace(sublayers[i], layer=place // 2) for place, i in enumerate(halves)]
        importance = spread_importances(sublayers, seed)
        budget = Budget(sublayers)
        sparsity = share * budget.reachable[1]
        kept = budget.project(importance, sparsity).kept
        assert Budget(moved).project(importance[halves], sparsity).kept == tuple(kept[i] for i in halves)

    @given(models(), seeds, shares, st.data(), st.floats(0, 2), st.booleans())
    def test_more_importance_never_costs_a_sublayer_units(self, sublayers, seed, share, data, raise_by, tied):
        budget = Budget(sublayers)
        importance = spread_importances(sublayers, seed)
        importance = np.round(importance * 2) / 2 if tied else importance
        which = data.draw(st.integers(0, len(sublayers) - 1))
        raised = importance.copy()
        raised[which] = min(1.0, raised[which] + raise_by)
        sparsity = share * budget.reachable[1]
        assert budget.project(raised, sparsity).kept[which] >= budget.project(importance, sparsity).kept[which]

    @given(models(), seeds, shares, st.integers(0, 3))
    def test_a_second_projection_changes_nothing(self, sublayers, seed, share, least):
        budget = Budget(sublayers, min_units=least)
        sparsity = share * budget.reachable[1]
        kept = budget.project(spread_importances(sublayers, seed), sparsity).kept
        ratios = np.array([k / s.units for k, s in zip(kept, sublayers, strict=True)])
        for dtype in (np.float64, np.float32):
            assert budget.project((2 * ratios - 1).astype(dtype), sparsity).kept == kept

    @given(models(), seeds, st.floats(0, 1), st.floats(0, 1))
    def test_only_differences_of_importances_count(self, sublayers, seed, share, shift):
        """One shift of all of them is what nu is, as long as nothing is clipped."""
        budget = Budget(sublayers)
        importance = spread_importances(sublayers, seed) / 2
        sparsity = share * budget.reachable[1]
        shifted = budget.project(importance + (shift - 0.5), sparsity)
        assert shifted.kept == budget.project(importance, sparsity).kept

    def test_equal_importances_give_equal_ratios(self):
        sublayers = model_of(6, replace(ATTENTION, units=20), replace(MLP, units=200))
        got = Budget(sublayers).project(np.zeros(12), 0.25)
        ratios = [k / s.units for k, s in zip(got.kept, sublayers, strict=True)]
        assert max(ratios) - min(ratios) <= 1 / 20
        assert got.sparsity == pytest.approx(0.25, abs=9 / got.dense_cost)

    def test_importances_outside_the_range_are_clipped(self):
        budget = Budget(model_of(3))
        wild = np.array([-9, 5, 0.3, -0.2, 2, -1.5])
        assert budget.project(wild, 0.4) == budget.project(np.clip(wild, -1, 1), 0.4)


class TestTies:
    @pytest.mark.parametrize("depth", [2, 5, 16, 30, 32])
    def test_are_served_spread_over_depth(self, depth):
        """However many units are left over, both halves of the model get as many of them, and so do the quarters."""
        sublayers = [replace(MLP, layer=layer, units=10, unit_params=1) for layer in range(depth)]
        budget = Budget(sublayers)
        for extra in range(1, depth):
            kept = budget.project(np.zeros(depth), 1 - (5 * depth + extra) / (10 * depth)).kept
            served = [layer for layer, k in enumerate(kept) if k == 6]
            assert len(served) == extra
            assert set(kept) <= {5, 6}
            first = sum(layer < depth / 2 for layer in served)
            assert abs(first - (extra - first)) <= 2
            for quarter in range(4):
                here = sum(quarter * depth / 4 <= layer < (quarter + 1) * depth / 4 for layer in served)
                assert abs(here - extra / 4) <= 2

    @given(st.integers(1, 100))
    def test_service_order_is_a_permutation(self, depth):
        assert sorted(service_order(depth)) == list(range(depth))


class TestMinUnits:
    def test_zero_lets_sublayers_vanish_but_for_the_first_attention(self):
        budget = Budget(model_of(3), min_units=0)
        most = budget.reachable[1]
        assert most == pytest.approx(1 - 70 / budget.dense_cost)
        assert budget.project(np.zeros(6), most).kept == (1, 0, 0, 0, 0, 0)

    @pytest.mark.parametrize("least", [1, 3])
    def test_bounds_every_sublayer(self, least):
        budget = Budget(model_of(3), min_units=least)
        most = budget.reachable[1]
        assert budget.project(np.linspace(-1, 1, 6), most).kept == (least,) * 6
        assert most == pytest.approx(1 - least * 3 * (70 + 9) / budget.dense_cost)

    def test_a_sublayer_with_fewer_units_stays_whole(self):
        budget = Budget(model_of(2), min_units=6)
        assert budget.project(np.array([-1, 1, -1, 1.0]), budget.reachable[1]).kept == (4, 6, 4, 6)

    def test_negative_is_refused(self):
        with pytest.raises(BudgetError, match="min_units is -1"):
            Budget(model_of(1), min_units=-1)


class TestBadInput:
    def test_out_of_reach_names_the_reachable_range(self):
        budget = Budget(model_of(3), min_units=2)
        most = budget.reachable[1]
        assert budget.project(np.zeros(6), most).kept == (2,) * 6
        with pytest.raises(BudgetError, match=f"0.95 of params is out of reach.* 0 to {most:.4f}") as raised:
            budget.project(np.zeros(6), 0.95)
        assert "min_units" in raised.value.hint

    @pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
    def test_outside_the_unit_interval(self, sparsity):
        with pytest.raises(BudgetError, match="outside"):
            Budget(model_of(2)).check(sparsity)

    @pytest.mark.parametrize("importance", [np.zeros(3), np.zeros((2, 2)), np.array([0, np.nan, 0, 0])])
    def test_importances_of_another_shape_or_not_finite(self, importance):
        with pytest.raises(BudgetError, match="4 finite numbers"):
            Budget(model_of(2)).project(importance, 0.2)

    def test_an_unknown_resource(self):
        with pytest.raises(BudgetError, match="'watts'") as raised:
            Budget(model_of(2), resource="watts")
        assert "params, macs, kv" in raised.value.hint


class TestByHand:
    """SmolLM2-135M: d = 576, 9 query heads in 3 groups, head_dim = 64, 1,536 intermediate channels, 30 layers."""

    attention = Sublayer(0, "attention", 3, 192, 294_912, 294_912, query_heads_per_unit=3, head_dim=64)
    mlp = Sublayer(0, "mlp", 1536, 1, 1728, 1728)

    @pytest.mark.parametrize(
        ("resource", "attention", "mlp"),
        [
            ("params", 576 * (192 + 64 + 64 + 192), 3 * 576),
            ("macs", 294_912 + 3 * (64 * 1024 + 1024 * 64), 1728),  # q k^T and p v for 3 heads
            ("kv", 2 * 64 * 2, 0),  # a key and a value of 64 numbers of 2 bytes
        ],
    )
    def test_prices(self, resource, attention, mlp):
        assert unit_cost(self.attention, resource, context=1024, kv_bytes=2) == attention
        assert unit_cost(self.mlp, resource, context=1024, kv_bytes=2) == mlp
        budget = Budget(model_of(30, self.attention, self.mlp), resource=resource, context=1024, kv_bytes=2)
        assert budget.dense_cost == 30 * (3 * attention + 1536 * mlp)
        one_less = budget.allocation([2] + [3 if i % 2 == 0 else 1536 for i in range(1, 60)])
        assert budget.dense_cost - one_less.cost == attention

    def test_context_and_cache_width_count(self):
        short = unit_cost(self.attention, "macs", context=1, kv_bytes=2)
        assert unit_cost(self.attention, "macs", context=2, kv_bytes=2) - short == 2 * 3 * 64
        assert unit_cost(self.attention, "kv", context=1, kv_bytes=4) == 512

    def test_what_costs_nothing_stays_whole(self):
        budget = Budget(model_of(30, self.attention, self.mlp), resource="kv")
        got = budget.project(np.full(60, -1.0), 0.5)
        assert got.kept[1::2] == (1536,) * 30
        assert sum(got.kept[::2]) == 45
        assert got.sparsity == 0.5
        assert budget.reachable[1] == pytest.approx(2 / 3)
