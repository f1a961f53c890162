"""The promises of the budget projection, against a slow reference and against numbers counted by hand."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ffgym.errors import BudgetError
from ffgym.pruning.budget import Budget, kernel_width, service_order, within_reach
from ffgym.types import Sublayer

ATTENTION = Sublayer(
    0, "attention", units=4, channels_per_unit=8, unit_params=70, unit_macs=64, query_heads_per_unit=2, head_dim=8
)
MLP = Sublayer(0, "mlp", units=16, channels_per_unit=1, unit_params=9, unit_macs=9)
# Of SmolLM2-135M: d = 576, 9 query heads in 3 groups, head_dim = 64, 1,536 intermediate channels.
SMOLLM = (
    Sublayer(0, "attention", 3, 192, 294_912, 294_912, query_heads_per_unit=3, head_dim=64),
    Sublayer(0, "mlp", 1536, 1, 1728, 1728),
)

seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0, 1)
alignments = st.sampled_from([1, 1, 2, 3, 8, 16, 64])


def model_of(depth, attention=ATTENTION, mlp=MLP):
    return [replace(half, layer=layer) for layer in range(depth) for half in (attention, mlp)]


@st.composite
def models(draw):
    """Up to 5 layers whose halves all differ in size, and what keeping 0 .. units units of each costs.

    That is a price per unit, or a measured table: half of its steps up cost nothing, and some are jumps.
    """
    sublayers = [
        replace(half, layer=layer, units=draw(st.integers(1, 24)), unit_params=draw(st.integers(1, 60)))
        for layer in range(draw(st.integers(1, 5)))
        for half in (ATTENTION, MLP)
    ]
    if draw(st.booleans()):
        return sublayers, linear(sublayers)
    rng = np.random.default_rng(draw(seeds))
    rises = [rng.choice([0, 0, 0, 1, 4, 10**6], s.units) for s in sublayers]
    rises[0][0] = 1  # something costs something
    return sublayers, [np.concatenate([[0], np.cumsum(each)]) for each in rises]


def linear(sublayers):
    """Costs of a price per unit."""
    return [np.arange(s.units + 1) * s.unit_params for s in sublayers]


@st.composite
def stock_models(draw):
    """Up to 5 layers of one shape, and the levels that stock code takes: prices may differ, to be general."""
    units = {kind: draw(st.integers(1, 24)) for kind in ("attention", "mlp")}
    sublayers = [
        replace(half, layer=layer, units=units[half.kind], unit_params=draw(st.integers(1, 60)))
        for layer in range(draw(st.integers(1, 5)))
        for half in (ATTENTION, MLP)
    ]
    legal = {kind: sorted({*draw(st.sets(st.integers(1, units[kind]))), units[kind]}) for kind in units}
    return sublayers, legal


@st.composite
def problems(draw, tied):
    """A model, its costs, and the rules of its budget: every sublayer has its own size, or all layers one shape."""
    align = draw(alignments)
    if tied:
        sublayers, legal = draw(stock_models())
        return sublayers, linear(sublayers), {"align": align, "legal": legal}
    return *draw(models()), {"align": align, "least": draw(st.integers(0, 3))}


def budget_of(sublayers, tables, *, align, least=1, legal=None):
    return Budget(sublayers, tables, min_units=least, align=align, shapes=legal)


free_and_tied = pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])


def spread_importances(sublayers, seed):
    """Importances without ties."""
    return np.random.default_rng(seed).uniform(-1, 1, len(sublayers))


def levels_of(sublayer, *, least=1, align=1, legal=None):
    """What may be kept, said in the plainest way; the attention of layer 0 never goes."""
    least = max(least, 1) if (sublayer.kind, sublayer.layer) == ("attention", 0) else least
    return [
        k
        for k in range(sublayer.units + 1)
        if k == sublayer.units
        or (k >= least and k * sublayer.channels_per_unit % align == 0 and (legal is None or k in legal[sublayer.kind]))
    ]


def next_costs(sublayers, tables, kept, **rules):
    """What one level more costs, wherever there is one."""
    return [
        table[next(level for level in levels_of(s, **rules) if level > k)] - table[k]
        for k, s, table in zip(kept, sublayers, tables, strict=True)
        if k < s.units
    ]


def slowly_projected(sublayers, tables, importance, sparsity, *, tied=False, **rules):
    """Raise nu from one event to the next; whoever's wanted ratio rounds to its next level gets it, if it fits."""
    rank = service_order(1 + max(s.layer for s in sublayers))
    in_turn = sorted(range(len(sublayers)), key=lambda i: (rank[sublayers[i].layer], sublayers[i].kind == "mlp"))
    kinds = ([i for i in in_turn if sublayers[i].kind == kind] for kind in ("attention", "mlp"))
    groups = list(kinds) if tied else [[i] for i in in_turn]
    wanted = [(Fraction(a) + 1) / 2 for a in importance]
    ratio = [sum(wanted[i] for i in group) / len(group) for group in groups]
    cost = [sum(tables[i] for i in group).tolist() for group in groups]
    units = [sublayers[group[0]].units for group in groups]
    # Layer 0 decides for its group: it may keep least. What costs nothing stays whole.
    levels = [
        levels_of(min((sublayers[i] for i in group), key=lambda s: s.layer), **rules) if price[-1] else [most]
        for group, price, most in zip(groups, cost, units, strict=True)
    ]
    kept = [steps[0] for steps in levels]
    room = (1 - Fraction(sparsity)) * sum(price[-1] for price in cost)
    room -= sum(price[k] for price, k in zip(cost, kept, strict=True))
    events = {
        Fraction(low + high, 2 * u) - r
        for steps, u, r in zip(levels, units, ratio, strict=True)
        for low, high in pairwise(steps)
    }
    open_ = set(range(len(groups)))
    for nu in sorted(events):
        for g in range(len(groups)):
            while g in open_ and kept[g] < units[g]:
                following = next(k for k in levels[g] if k > kept[g])
                if ratio[g] + nu < Fraction(kept[g] + following, 2 * units[g]):
                    break
                if (rise := cost[g][following] - cost[g][kept[g]]) <= room:
                    room -= rise
                    kept[g] = following
                else:
                    open_.discard(g)
    found = {i: kept[g] for g, group in enumerate(groups) for i in group}
    return tuple(found[i] for i in range(len(sublayers)))


def on_grid(data, sublayers):
    """Importances with many ties, exact in floating point."""
    grid = st.integers(-8, 8).map(lambda i: i / 8)
    return data.draw(st.lists(grid, min_size=len(sublayers), max_size=len(sublayers)))


class TestPromises:
    @given(models(), seeds, shares, st.integers(0, 3), alignments)
    def test_feasible_and_nothing_left_that_fits(self, model, seed, share, least, align):
        sublayers, tables = model
        budget = Budget(*model, min_units=least, align=align)
        sparsity = share * budget.greatest_sparsity
        got = budget.project(spread_importances(sublayers, seed), sparsity)
        limit = (1 - sparsity) * budget.dense_cost
        assert got.cost == sum(table[k] for k, table in zip(got.kept, tables, strict=True))
        assert got.cost <= limit * (1 + 1e-9)
        assert got.sparsity >= sparsity - 1e-9
        more = next_costs(sublayers, tables, got.kept, least=least, align=align)
        assert all(got.cost + one > limit for one in more), "a level that still fits was left out"
        assert not more or limit - got.cost < min(more), "within one smallest step of the budget"
        for k, sublayer in zip(got.kept, sublayers, strict=True):
            assert k in levels_of(sublayer, least=least, align=align)

    @free_and_tied
    @given(st.data(), shares)
    def test_equals_the_slow_reference(self, tied, data, share):
        """Importances on a grid, so that there are many ties, and exact fractions in the reference."""
        sublayers, tables, rules = data.draw(problems(tied))
        importance = on_grid(data, sublayers)
        budget = budget_of(sublayers, tables, **rules)
        sparsity = int(share * budget.greatest_sparsity * 1024) / 1024  # exact, and so is 1 - sparsity
        got = budget.project(np.array(importance), sparsity)
        assert got.kept == slowly_projected(sublayers, tables, importance, sparsity, tied=tied, **rules)

    @given(models(), seeds, shares, alignments)
    def test_the_order_of_the_list_does_not_matter(self, model, seed, share, align):
        sublayers, tables = model
        budget = Budget(*model, align=align)
        importance = spread_importances(sublayers, seed)
        order = np.random.default_rng(seed).permutation(len(sublayers))
        shuffled = Budget([sublayers[i] for i in order], [tables[i] for i in order], align=align)
        sparsity = share * budget.greatest_sparsity
        kept = budget.project(importance, sparsity).kept
        assert shuffled.project(importance[order], sparsity).kept == tuple(kept[i] for i in order)

    @given(models(), seeds, shares, alignments)
    def test_where_in_the_model_a_sublayer_stands_does_not_matter(self, model, seed, share, align):
        """Whole layers change places; no place is favoured where there are no ties."""
        sublayers, tables = model
        depth = len(sublayers) // 2
        order = np.random.default_rng(seed).permutation(depth)
        halves = [2 * layer + half for layer in order for half in (0, 1)]
        moved = [replace(sublayers[i], layer=place // 2) for place, i in enumerate(halves)]
        importance = spread_importances(sublayers, seed)
        budget = Budget(*model, align=align)
        sparsity = share * budget.greatest_sparsity
        kept = budget.project(importance, sparsity).kept
        again = Budget(moved, [tables[i] for i in halves], align=align).project(importance[halves], sparsity).kept
        assert again == tuple(kept[i] for i in halves)

    @free_and_tied
    @given(st.data(), seeds, shares, st.floats(0, 2), st.booleans())
    def test_more_importance_never_costs_a_sublayer_units(self, tied, data, seed, share, raise_by, coarse):
        sublayers, tables, rules = data.draw(problems(tied))
        budget = budget_of(sublayers, tables, **rules)
        importance = spread_importances(sublayers, seed)
        importance = np.round(importance * 2) / 2 if coarse else importance
        which = data.draw(st.integers(0, len(sublayers) - 1))
        raised = importance.copy()
        raised[which] = min(1.0, raised[which] + raise_by)
        sparsity = share * budget.greatest_sparsity
        assert budget.project(raised, sparsity).kept[which] >= budget.project(importance, sparsity).kept[which]

    @free_and_tied
    @given(st.data(), seeds, shares)
    def test_a_second_projection_changes_nothing(self, tied, data, seed, share):
        sublayers, tables, rules = data.draw(problems(tied))
        budget = budget_of(sublayers, tables, **rules)
        sparsity = share * budget.greatest_sparsity
        kept = budget.project(spread_importances(sublayers, seed), sparsity).kept
        ratios = np.array([k / s.units for k, s in zip(kept, sublayers, strict=True)])
        for importance in (2 * ratios - 1, (2 * ratios - 1).astype(np.float32), budget.importance(kept)):
            assert budget.project(importance, sparsity).kept == kept

    @given(models(), seeds, st.floats(0, 1), st.floats(0, 1), alignments)
    def test_only_differences_of_importances_count(self, model, seed, share, shift, align):
        """One shift of all of them is what nu is, as long as nothing is clipped."""
        sublayers, _ = model
        budget = Budget(*model, align=align)
        importance = spread_importances(sublayers, seed) / 2
        sparsity = share * budget.greatest_sparsity
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


class TestAlign:
    @pytest.mark.parametrize("align", [8, 32, 64])
    def test_a_real_model_keeps_multiples_and_stays_close_to_its_budget(self, align):
        """SmolLM2-135M: an MLP step is align channels, and no more than one is given away."""
        budget = Budget(model_of(30, *SMOLLM), align=align)
        got = budget.project(np.random.default_rng(0).uniform(-1, 1, 60), 0.2)
        assert all(k % align == 0 for k in got.kept[1::2])
        assert 0 <= 0.8 * budget.dense_cost - got.cost < align * 1728

    def test_ties_are_served_spread_over_depth(self):
        depth = 16
        sublayers = [replace(MLP, layer=layer, units=80, unit_params=1) for layer in range(depth)]
        kept = Budget(sublayers, align=8).project(np.zeros(depth), 1 - (40 * depth + 8 * 4) / (80 * depth)).kept
        served = [layer for layer, k in enumerate(kept) if k == 48]
        assert set(kept) == {40, 48}
        assert [sum(quarter * 4 <= layer < quarter * 4 + 4 for layer in served) for quarter in range(4)] == [1] * 4

    def test_out_of_reach_names_it(self):
        budget = Budget(model_of(2), align=16)  # MLPs of 16 channels stay whole, attention keeps 2 of 4
        assert budget.greatest_sparsity == pytest.approx(2 * 2 * 70 / budget.dense_cost)
        with pytest.raises(BudgetError, match="out of reach") as raised:
            budget.check(0.5)
        advised = re.match(r"Ask for at most (0\.\d{4}), or", raised.value.hint)
        budget.check(float(advised[1]))
        assert "prune.align" in raised.value.hint

    def test_where_nothing_can_go_nobody_is_told_to_ask_for_nothing(self):
        with pytest.raises(BudgetError, match="reachable range is 0 to 0") as raised:
            Budget(model_of(2), align=1000).check(0.1)
        assert raised.value.hint == "Lower prune.min_units, or lower prune.align."


class TestTied:
    @given(stock_models(), seeds, shares, alignments)
    def test_one_shape_that_is_legal_feasible_and_leaves_nothing_that_fits(self, model, seed, share, align):
        sublayers, legal = model
        budget = Budget(sublayers, shapes=legal, align=align)
        sparsity = share * budget.greatest_sparsity
        got = budget.project(spread_importances(sublayers, seed), sparsity)
        limit = (1 - sparsity) * budget.dense_cost
        assert len(set(zip(got.kept[::2], got.kept[1::2], strict=True))) == 1
        assert all(k in levels_of(s, align=align, legal=legal) for k, s in zip(got.kept, sublayers, strict=True))
        assert got.cost == sum(k * s.unit_params for k, s in zip(got.kept, sublayers, strict=True))
        assert got.cost <= limit * (1 + 1e-9)
        for half in (0, 1):  # all layers take the step together
            step = next_costs(
                sublayers[half::2], linear(sublayers)[half::2], got.kept[half::2], align=align, legal=legal
            )
            assert not step or got.cost + sum(step) > limit

    @given(stock_models(), shares, alignments)
    def test_every_shape_is_found_by_listing_as_by_projecting(self, model, share, align):
        """All pairs of levels, tried one by one; and a projection from each of many importances is one of them."""
        sublayers, legal = model
        budget = Budget(sublayers, shapes=legal, align=align)
        sparsity = share * budget.greatest_sparsity
        limit = (1 - sparsity) * budget.dense_cost * (1 + 1e-12)
        heads, channels = (levels_of(s, align=align, legal=legal) for s in sublayers[:2])
        depth = len(sublayers) // 2
        fitting = {pair for pair in itertools.product(heads, channels) if budget.allocation(pair * depth).cost <= limit}
        full = {(h, c) for h, c in fitting if not any((h2 > h or c2 > c) and h2 >= h and c2 >= c for h2, c2 in fitting)}
        listed = budget.shapes(sparsity)
        assert {shape.kept[:2] for shape in listed} == full
        assert len(listed) == len(full) <= len(heads)
        assert all(budget.project(budget.importance(shape.kept), sparsity) == shape for shape in listed)
        for difference in np.linspace(-1, 1, 21):
            assert budget.project(np.tile([difference, -difference], depth), sparsity) in listed

    def test_the_importance_of_a_kind_is_the_mean_over_its_sublayers(self):
        sublayers = model_of(4)
        budget = Budget(sublayers, shapes={"attention": range(1, 5), "mlp": range(1, 17)})
        scattered = np.array([1, -1, -0.5, 0, 0.5, -1, 0, 0])
        mean = np.tile([scattered[::2].mean(), scattered[1::2].mean()], 4)
        assert budget.project(scattered, 0.3) == budget.project(mean, 0.3)

    def test_without_ties_there_are_too_many_shapes_to_list(self):
        assert Budget(model_of(3)).shapes(0.2) == []

    def test_what_costs_nothing_stays_whole(self):
        sublayers = model_of(3)
        costs = [np.arange(s.units + 1) * (s.kind == "attention") for s in sublayers]
        budget = Budget(sublayers, costs, shapes={"attention": (1, 2, 4), "mlp": range(1, 17)})
        assert [shape.kept[:2] for shape in budget.shapes(0.5)] == [(2, 16)]

    def test_out_of_reach_names_it(self):
        budget = Budget(model_of(3), shapes={"attention": (4,), "mlp": range(1, 17)})
        with pytest.raises(BudgetError, match="out of reach") as raised:
            budget.check(0.9)
        assert "prune.uniform" in raised.value.hint


class TestTies:
    @pytest.mark.parametrize("depth", [2, 5, 16, 30, 32])
    def test_units_left_over_go_to_layers_spread_over_depth(self, depth):
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


class TestMinUnits:
    def test_zero_lets_sublayers_vanish_but_for_the_first_attention(self):
        budget = Budget(model_of(3), min_units=0)
        most = budget.greatest_sparsity
        assert most == pytest.approx(1 - 70 / budget.dense_cost)
        assert budget.project(np.zeros(6), most).kept == (1, 0, 0, 0, 0, 0)

    @pytest.mark.parametrize("least", [1, 3])
    def test_bounds_every_sublayer(self, least):
        budget = Budget(model_of(3), min_units=least)
        most = budget.greatest_sparsity
        assert budget.project(np.linspace(-1, 1, 6), most).kept == (least,) * 6
        assert most == pytest.approx(1 - least * 3 * (70 + 9) / budget.dense_cost)

    def test_a_sublayer_with_fewer_units_stays_whole(self):
        budget = Budget(model_of(2), min_units=6)
        assert budget.project(np.array([-1, 1, -1, 1.0]), budget.greatest_sparsity).kept == (4, 6, 4, 6)


class TestBadInput:
    def test_out_of_reach_names_the_reachable_range(self):
        budget = Budget(model_of(3), min_units=2)
        most = budget.greatest_sparsity
        assert budget.project(np.zeros(6), most).kept == (2,) * 6
        with pytest.raises(BudgetError, match=f"0.95 of params is out of reach.* 0 to {most - 5e-5:.4f}") as raised:
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


class TestImportanceSlopes:
    """The chain rule through the projection."""

    FINE = replace(MLP, units=24_000)

    @given(st.integers(2, 5), seeds, st.floats(0.1, 0.7))
    def test_equals_differences_of_a_linear_loss(self, depth, seed, sparsity):
        """On levels so fine that rounding does not matter, away from both ends."""
        rng = np.random.default_rng(seed)
        sublayers = [
            replace(self.FINE, layer=i // 2, kind=("attention", "mlp")[i % 2], unit_params=int(rng.integers(1, 20)))
            for i in range(2 * depth)
        ]
        budget = Budget(sublayers)
        importance = rng.uniform(-0.2, 0.2, len(sublayers))
        worth = [np.full(s.units, rng.normal() / s.units) for s in sublayers]

        def loss(a):
            return sum(k * w[0] for k, w in zip(budget.project(a, sparsity).kept, worth, strict=True))

        kept = budget.project(importance, sparsity).kept
        assume(all(0.1 < k / self.FINE.units < 0.9 for k in kept))
        found = budget.importance_slopes(importance, kept, worth)
        nudges = 0.05 * np.eye(len(sublayers))
        wanted = [(loss(importance + nudge) - loss(importance - nudge)) / 0.1 for nudge in nudges]
        np.testing.assert_allclose(found, wanted, atol=0.02)

    def test_averages_over_the_units_near_the_level(self):
        """1,000 units reach 83 to either side; both sublayers cost the same, so what they share goes."""
        sublayers = [replace(MLP, units=1000), replace(MLP, units=1000, layer=1)]
        slopes = [np.zeros(1000), np.zeros(1000)]
        slopes[0][500 - 83 : 500 + 83] = -0.001
        slopes[1][:300] = 5.0  # far from its level
        found = Budget(sublayers).importance_slopes(np.zeros(2), (500, 500), slopes)
        np.testing.assert_allclose(found, [-0.25, 0.25])

    def test_a_coarse_one_says_what_its_last_unit_is_worth_and_is_no_part_of_the_price(self):
        """A KV group is a quarter of its attention, and costs what 16 channels of an MLP cost."""
        sublayers = model_of(2, mlp=replace(MLP, units=1000))
        slopes = [np.full(s.units, -1.0 - i) for i, s in enumerate(sublayers)]
        slopes[2][1] = -40.0
        budget = Budget(sublayers)
        found = budget.importance_slopes(np.zeros(4), (2, 500, 2, 500), slopes)
        assert budget.coarse.tolist() == [True, False, True, False]
        np.testing.assert_allclose(found[[1, 3]], [500.0, -500.0])
        price = -3.0 / MLP.unit_params  # of a parameter, by the mean of both MLPs
        group = ATTENTION.unit_params
        np.testing.assert_allclose(found[[0, 2]], 4 * np.array([-1.0 - price * group, -40.0 - price * group]) / 2)

    @pytest.mark.parametrize(
        ("importance", "level", "unit"),
        [(0.0, 2, 1), (-0.1, 2, 1), (0.1, 2, 2), (0.4, 3, 2), (0.4, 2, 2), (0.4, 1, None)],
    )
    def test_a_coarse_one_speaks_of_the_unit_that_its_importance_lies_in(self, importance, level, unit):
        """Of four units, -0.1 is 1.8, 0 is 2, 0.1 is 2.2 and 0.4 is 2.8 units; only units beside the level count."""
        sublayers = model_of(1, mlp=replace(MLP, units=1000))
        slopes = [np.array([-1.0, -2.0, -4.0, -8.0]), np.zeros(1000)]
        found = Budget(sublayers).importance_slopes(np.array([importance, 0.0]), (level, 500), slopes)
        assert found[0] == (0 if unit is None else 4 * slopes[0][unit] / 2)

    @pytest.mark.parametrize(("units", "level", "near"), [(5, 3, [2, 3]), (6, 3, [2, 3]), (9, 9, [8]), (9, 0, [0])])
    def test_of_few_units_those_beside_the_level_count(self, units, level, near):
        assert list(within_reach(units, level)) == near

    def test_nine_heads_move_and_share_the_price(self):
        sublayers = model_of(2, replace(ATTENTION, units=9), replace(MLP, units=1000))
        slopes = [np.full(s.units, -1.0) for s in sublayers]
        budget = Budget(sublayers)
        found = budget.importance_slopes(np.array([1.0, 0.0, 1.0, 0.0]), (9, 500, 9, 500), slopes)
        assert not budget.coarse.any()
        costs = np.array([s.units * s.unit_params for s in sublayers])
        price = -sum(s.units for s in sublayers) / costs.sum()
        np.testing.assert_allclose(found, [(-s.units - price * c) / 2 for s, c in zip(sublayers, costs, strict=True)])

    def test_what_is_whole_moves_only_near_the_end(self):
        sublayers = [replace(MLP, units=1000, layer=i) for i in range(3)]
        slopes = [np.full(1000, worth) for worth in (0.0, -0.001, -0.003)]
        budget = Budget(sublayers)
        kept = (1000, 500, 500)
        near = budget.importance_slopes(np.array([1.0, 0.0, 0.0]), kept, slopes)
        np.testing.assert_allclose(near, np.array([4.0, 1.0, -5.0]) / 6)
        beyond = budget.importance_slopes(np.array([1.0, -0.4, -0.4]), kept, slopes)  # the shift is 0.2
        np.testing.assert_allclose(beyond, [0.0, 0.5, -0.5])

    def test_what_costs_nothing_has_none(self):
        sublayers = [replace(MLP, units=1000), replace(MLP, units=1000, layer=1)]
        tables = [np.zeros(1001), np.arange(1001.0)]
        budget = Budget(sublayers, cost_tables=tables)
        found = budget.importance_slopes(np.zeros(2), (1000, 500), [np.full(1000, -1.0)] * 2)
        np.testing.assert_array_equal(found, [0.0, 0.0])

    def test_a_coarse_one_that_may_lose_no_unit_has_none(self):
        sublayers = model_of(2, mlp=replace(MLP, units=1000))
        slopes = [np.full(s.units, 1.0) for s in sublayers]
        kept = (1, 500, 2, 500)
        found = Budget(sublayers).importance_slopes(np.array([-0.5, 0.0, 0.0, 0.0]), kept, slopes)
        assert (found[[0, 2]] != 0).tolist() == [False, True]

    def test_where_nothing_fine_costs_anything_there_are_none(self):
        """As with the KV cache of a model with few heads."""
        sublayers = model_of(2, mlp=replace(MLP, units=1000))
        free = [np.arange(s.units + 1.0) * (s.kind == "attention") for s in sublayers]
        budget = Budget(sublayers, cost_tables=free, resource="kv")
        assert Budget(sublayers).has_slopes
        assert not budget.has_slopes
        with pytest.raises(BudgetError, match="everything that costs kv comes in a few large units"):
            budget.importance_slopes(np.zeros(4), (2, 1000, 2, 1000), [np.zeros(s.units) for s in sublayers])

    def test_tied_layers_are_refused(self):
        budget = Budget(model_of(2), shapes={"attention": (2, 4), "mlp": range(1, 17)})
        with pytest.raises(BudgetError, match="each have a size of their own"):
            budget.importance_slopes(np.zeros(4), (2, 8, 2, 8), [np.zeros(4), np.zeros(16)] * 2)


@pytest.mark.parametrize(
    ("channels", "width"), [(14336, 64), (3072, 64), (2048, 32), (1536, 32), (1535, 16), (128, 2), (95, 1), (1, 1)]
)
def test_widths_that_kernels_like_leave_48_to_choose_from(channels, width):
    assert kernel_width(channels) == width


@given(seeds, shares)
def test_auto_aligns_mlps_alone(seed, share):
    sublayers = model_of(4, mlp=replace(MLP, units=1536))
    budget = Budget(sublayers, align="auto")
    kept = budget.project(spread_importances(sublayers, seed), share * budget.greatest_sparsity).kept
    assert all(k % 32 == 0 for k in kept[1::2])
    drawn = [budget.project(spread_importances(sublayers, other), 0.3).kept[::2] for other in range(9)]
    assert {k for kept in drawn for k in kept} == set(range(1, ATTENTION.units + 1))


def test_auto_aligns_the_one_shape_of_all_layers():
    sublayers = model_of(4, mlp=replace(MLP, units=1536))
    shapes = {"attention": range(1, ATTENTION.units), "mlp": range(1, 1536)}
    found = Budget(sublayers, align="auto", shapes=shapes).shapes(0.3)
    assert found
    assert all(each.kept[1] % 32 == 0 and each.sparsity >= 0.3 for each in found)
