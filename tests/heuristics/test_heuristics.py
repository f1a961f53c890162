"""The built-in heuristics keep their contract and compute what their docstrings say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ffgym.errors import ConfigError
from ffgym.heuristics.fisher import Fisher
from ffgym.heuristics.flap import Flap, keep_ratios, standardised_units
from ffgym.heuristics.gate_scaling import GateScaling, gate_sensitivity
from ffgym.heuristics.mlp_first import MlpFirst
from ffgym.heuristics.owl import Owl, outlier_ratio, spread
from ffgym.heuristics.skip_ends import SkipEnds
from ffgym.heuristics.uniform import Uniform
from ffgym.plugins import manager
from ffgym.plugins.bases import Heuristic
from ffgym.plugins.built_ins import BUILTINS
from ffgym.pruning.budget import Budget
from ffgym.testing.conformance import HeuristicConformance
from ffgym.testing.toys import toy_views
from ffgym.types import LayerStats, SublayerView


class TestContract(HeuristicConformance):
    @pytest.fixture(params=BUILTINS["heuristic"], autouse=True)
    def _choose(self, request: Any) -> None:
        self.name = request.param

    def make(self) -> Heuristic:
        return manager.create("heuristic", self.name)


def test_fisher_keeps_what_would_cost_more_to_lose() -> None:
    """Twice the loss at every level of one MLP: it keeps more, the other less."""
    views = toy_views(2, Fisher.needs)
    dear = [*views[:3], replace(views[3], loss_increase=2 * np.asarray(views[3].loss_increase))]
    plain, raised = (Fisher().importance(given) for given in (views, dear))
    assert raised[3] > plain[3]
    assert raised[1] <= plain[1]


def test_uniform_is_zero_everywhere() -> None:
    np.testing.assert_array_equal(Uniform().importance(toy_views(3, frozenset())), np.zeros(6))


def test_mlp_first_spares_attention_and_the_ends() -> None:
    importance = MlpFirst().importance(toy_views(10, frozenset()))
    np.testing.assert_array_equal(importance[0::2], np.ones(10))
    np.testing.assert_array_equal(importance[1::2], [1, 1, 1, -1, -1, -1, -1, -1, -1, 1])


@pytest.mark.parametrize(
    ("first", "last", "spared"),
    [
        (0, 2, [-1, -1, -1, 1, 1]),
        (3, 1, [1, 1, 1, -1, -1, -1, -1, 1]),
        (3, 1, [1, -1, -1, -1]),  # of shallow models, proportionally less
        (3, 1, [-1]),
        (0, 0, [-1]),
        (10, 10, [1, -1, -1, 1]),
    ],
)
def test_mlp_first_spares_what_its_options_say(first: int, last: int, spared: list[int]) -> None:
    heuristic = MlpFirst(MlpFirst.Config(spare_first=first, spare_last=last))
    np.testing.assert_array_equal(heuristic.importance(toy_views(len(spared), frozenset()))[1::2], spared)


@pytest.mark.parametrize("cls", [Flap, Owl, GateScaling])
def test_importances_follow_a_permutation_of_sublayers(cls: type[Heuristic]) -> None:
    views = toy_views(4, cls.needs)
    order = np.random.default_rng(0).permutation(len(views))
    permuted = cls().importance([views[i] for i in order])
    np.testing.assert_allclose(permuted, cls().importance(views)[order], atol=1e-12)


@pytest.mark.parametrize("cls", [Flap, Owl, GateScaling])
def test_equal_sublayers_get_equal_importances(cls: type[Heuristic]) -> None:
    view = toy_views(1, cls.needs)[1]
    importance = cls().importance([view] * 4)
    np.testing.assert_allclose(importance, importance[0], atol=0.05)  # flap's cut falls within a unit


@pytest.mark.parametrize(("cls", "span"), [(Owl, 0.08), (GateScaling, 0.15)])
def test_keep_ratios_differ_by_twice_the_span(cls: type[Heuristic], span: float) -> None:
    ratios = (cls().importance(toy_views(4, cls.needs)) + 1) / 2
    assert np.ptp(ratios) == pytest.approx(2 * span)


def test_skip_ends_leaves_the_ends_whole_at_any_budget_the_middle_can_pay() -> None:
    views = toy_views(10, frozenset())
    sublayers = [view.sublayer for view in views]
    for sparsity in (0.1, 0.5):
        kept = Budget(sublayers).project(SkipEnds().importance(views), sparsity).kept
        cut = {sublayer.layer for sublayer, units in zip(sublayers, kept, strict=True) if units < sublayer.units}
        assert cut == set(range(3, 9))


def test_flap_cuts_all_units_at_one_threshold_by_cost() -> None:
    scores = [np.array([3.0, -1.0]), np.array([2.0, 1.0, 0.0, -2.0])]
    # Of 2 * 2 + 4 * 1 = 8, three quarters are 6: the best four units cost 2 + 1 + 1 + 1, the fifth would make it 7.
    np.testing.assert_allclose(keep_ratios(scores, [2, 1], 0.75), [0.5, 0.75])
    np.testing.assert_allclose(keep_ratios(scores, [2, 1], 7 / 8), [1.0, 0.75])


def test_flap_standardises_channels_and_averages_over_a_unit() -> None:
    view = toy_views(1, Flap.needs)[0]
    z = standardised_units(view)
    wifv = (view.stats.variance * view.weight.square().sum(dim=0)).numpy()
    np.testing.assert_allclose(z, ((wifv - wifv.mean()) / wifv.std()).reshape(4, 8).mean(axis=1), rtol=1e-4, atol=1e-6)
    constant = replace(view, stats=LayerStats(mean=torch.ones(32), square=torch.ones(32)))
    np.testing.assert_array_equal(standardised_units(constant), np.zeros(4))


def test_flap_at_its_reference_is_the_projected_allocation() -> None:
    views = toy_views(6, Flap.needs)
    importance = Flap(Flap.Config(reference=0.3)).importance(views)
    allocation = Budget([view.sublayer for view in views], min_units=0).project(importance, 0.3)
    wanted = [(a + 1) / 2 * view.sublayer.units for a, view in zip(importance, views, strict=True)]
    assert np.abs(np.array(allocation.kept) - wanted).sum() <= 2 + 768 / 48  # the rest of one KV group is handed out


@pytest.mark.parametrize("rule", [Flap, Fisher])
def test_a_rule_that_decides_at_a_sparsity_decides_at_the_target(rule: type[Flap] | type[Fisher]) -> None:
    views = toy_views(6, rule.needs)
    followed, told, fixed = rule(), rule(rule.Config(reference=0.4)), rule(rule.Config(reference=0.1))
    followed.target = fixed.target = 0.4
    assert np.array_equal(followed.importance(views), told.importance(views))
    assert not np.array_equal(followed.importance(views), fixed.importance(views))
    assert np.array_equal(rule().importance(views), rule(rule.Config(reference=0.2)).importance(views))


def test_owl_counts_elements_above_the_threshold_times_the_mean() -> None:
    view = replace(
        toy_views(1, Owl.needs)[1],
        weight=torch.tensor([[1.0, -1.0], [1.0, 9.0]]),
        stats=LayerStats(square=torch.tensor([1.0, 4.0])),
    )
    # |W| * norm = 1, 2, 1, 18, mean 5.5
    assert outlier_ratio(view, 3.0) == 0.25
    assert outlier_ratio(view, 0.3) == 0.5
    assert outlier_ratio(view, 5.0) == 0.0


def test_owls_outliers_are_above_5_times_the_mean() -> None:
    view = toy_views(1, Owl.needs)[1]

    def peaked(times: float) -> SublayerView:
        weight = torch.ones(4, 5)
        weight[0, 0] = 19 * times / (20 - times)  # this many times the mean of all 20
        return replace(view, weight=weight, stats=LayerStats(square=torch.ones(5)))

    np.testing.assert_allclose(Owl().importance([peaked(1.0), peaked(4.5), peaked(5.5)]), [-0.16, -0.16, 0.16])


def test_spread_is_linear_around_the_middle() -> None:
    np.testing.assert_allclose(spread([0.0, 1.0, 4.0], 0.25), [-0.5, -0.25, 0.5])
    np.testing.assert_array_equal(spread([3.0, 3.0], 0.25), [0.0, 0.0])


def test_gate_sensitivity_is_the_derivative_of_a_factor_on_the_output() -> None:
    view = toy_views(1, GateScaling.needs)[1]
    x, target = torch.randn(20, view.weight.shape[1]), torch.randn(20, view.weight.shape[0])
    weight, gate = view.weight.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True)
    loss = (gate * (x @ weight.T) - target).square().mean()
    by_weight, by_gate = torch.autograd.grad(loss, [weight, gate])
    assert gate_sensitivity(replace(view, stats=LayerStats(gradient=by_weight))) == pytest.approx(
        abs(float(by_gate)), rel=1e-4
    )


@pytest.mark.parametrize(("name", "options"), [("flap", {"reference": 1}), ("mlp-first", {"spare_first": -1})])
def test_impossible_options_are_refused_by_name(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"prior\.{next(iter(options))}"):
        manager.create("heuristic", name, options)
