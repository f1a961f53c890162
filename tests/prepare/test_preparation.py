"""Preparing a model changes nothing but the order of its units, and what is prepared helps once units go."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from distinct_families import DISTINCT_FAMILIES

import ffgym
from ffgym.criteria.flap import Flap
from ffgym.criteria.magnitude import Magnitude
from ffgym.criteria.obs import Obs
from ffgym.criteria.taylor import Taylor
from ffgym.criteria.wanda import Wanda
from ffgym.errors import CalibrationError, PluginError
from ffgym.evaluation.perplexity import evaluate
from ffgym.prepare.paths import held_out_windows, prepare, some_rows
from ffgym.pruning.budget import Budget
from ffgym.pruning.calibration import NestedRidge, PlainPath
from ffgym.testing.models import tiny_model

every_family = pytest.mark.parametrize("family", DISTINCT_FAMILIES)


@pytest.fixture(scope="module")
def windows(random_windows):
    return random_windows(8, 24)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


class Spoken(ffgym.Criterion):
    """A criterion that answers what the test says."""

    name = "spoken"

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.asked = []

    def score(self, weight, stats):
        self.asked.append(stats)
        return self.answer(weight)


@every_family
def test_the_models_function_is_unchanged(family, windows):
    model = tiny_model(family)
    before = logits(model, windows)
    prepare(model, Wanda(), windows, ridge=0.01)
    torch.testing.assert_close(logits(model, windows), before, rtol=1e-4, atol=2e-4)


@every_family
def test_units_stand_in_the_criterions_order(family, windows):
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    prepared = prepare(model, Magnitude(), windows, ridge=0.01)
    from ffgym.models.cut import PrunableModel

    for view, half in zip(prepared.views, PrunableModel(dense).halves, strict=True):
        own = half.consumer.weight.abs().sum(0).reshape(view.sublayer.units, -1).sum(1)
        torch.testing.assert_close(view.unit_scores, own.sort(descending=True).values.detach())
        columns = half.consumer.weight.reshape(32, view.sublayer.units, -1)[:, own.argsort(descending=True)]
        assert torch.equal(view.weight, columns.reshape(32, -1))


@every_family
def test_views_say_what_the_definitions_say(family, windows):
    """Removal error and energy from inputs recorded on the model as it stands after the preparation."""
    model = tiny_model(family)
    prepared = prepare(model, Wanda(), windows, ridge=0.05, keep=frozenset({"mean", "second_moment"}))
    inputs = {}
    for index, half in enumerate(prepared.prunable.halves):
        half.consumer.register_forward_pre_hook(
            lambda _, args, i=index: inputs.__setitem__(i, args[0].flatten(0, -2).double())
        )
    logits(model, windows)
    for index, view in enumerate(prepared.views):
        x, W = inputs[index], view.weight.double()
        torch.testing.assert_close(view.stats.second_moment.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        assert view.stats.square is None
        assert view.output_energy == pytest.approx(float((x @ W.T).square().sum(1).mean()), rel=1e-3)
        assert view.removal_error.shape == (view.sublayer.units + 1,)
        assert view.removal_error[-1] == 0
        assert (np.diff(view.removal_error) <= 0).all()
        assert view.loss_increase is None
        affine = prepared.prunable.halves[index].affine
        centred = x - x.mean(0) if affine else x
        shrinkage = 0.05 * centred.square().mean()
        whole = float((centred @ W.T).square().sum(1).mean() + shrinkage * W.square().sum())
        assert view.removal_error[0] == pytest.approx(whole, rel=1e-3)


def test_keeping_a_mean_does_not_make_a_refit_affine(windows):
    prepared = prepare(tiny_model("llama"), Wanda(), windows, ridge=0.05, keep=frozenset({"mean"}))
    prepared.prunable.cut([1, 10] * 3)
    assert all(half.consumer.bias is None for half in prepared.prunable.halves)


def test_the_second_order_estimate_is_there_where_it_is_kept(windows):
    needs = frozenset({"output_gradient"})
    for view in prepare(tiny_model("llama"), Wanda(), windows, ridge=0.05, keep=needs).views:
        assert view.stats.output_gradient.shape == (32, 32)
        assert view.loss_increase.shape == (view.sublayer.units + 1,)
        assert (np.diff(view.loss_increase) <= 1e-9).all()
        assert view.loss_increase[0] > view.loss_increase[-1] == 0


def test_gradients_reach_the_criterion_in_the_weights_order_and_views_in_path_order(windows):
    from ffgym.models.cut import PrunableModel
    from ffgym.prepare.statistics import gradient_statistics

    seen = []

    class Seen(Wanda):
        needs = frozenset({"square", "gradient"})

        def score(self, weight, stats):
            seen.append(stats.gradient)
            return super().score(weight, stats)

    dense = PrunableModel(tiny_model("llama"))
    quarter = windows[:2]
    wanted = dict(gradient_statistics(dense, quarter, frozenset({"gradient"})))
    prepared = prepare(tiny_model("llama"), Seen(), windows, ridge=0.05, keep=frozenset({"gradient"}))
    after = dict(gradient_statistics(prepared.prunable, quarter, frozenset({"gradient"})))
    for index, view in enumerate(prepared.views):
        torch.testing.assert_close(seen[index], wanted[index].gradient)
        torch.testing.assert_close(view.stats.gradient, after[index].gradient, rtol=1e-3, atol=1e-4)


def test_what_the_criterion_asks_for_and_which_channels_go_together_reaches_it(windows):
    criterion = Spoken(lambda weight: weight.abs())
    prepared = prepare(tiny_model("llama"), criterion, windows, ridge=0.01)
    expected = [view.sublayer.channels_per_unit for view in prepared.views]
    assert [stats.channels_per_unit for stats in criterion.asked] == expected
    assert len(set(expected)) == 2
    for stats in criterion.asked:
        assert stats.tokens == windows.numel()
        assert stats.mean is stats.square is stats.second_moment is stats.gradient is None


class TestRidge:
    @pytest.mark.parametrize(
        ("windows", "length", "held_out"), [(2, 1024, 1), (8, 24, 2), (32, 1024, 8), (1000, 1024, 8), (4, 10_000, 1)]
    )
    def test_a_quarter_of_the_windows_is_held_out_within_bounds(self, windows, length, held_out):
        assert held_out_windows(windows, length) == held_out

    def test_inputs_are_drawn_from_all_that_were_held_out(self):
        inputs = torch.arange(9000.0)[:, None].expand(-1, 2)
        rows = some_rows(inputs)
        assert rows.shape == (1024, 2)
        assert (rows[1:] > rows[:-1]).all(), "none twice"
        assert torch.histc(rows[:, 0], bins=9, min=0, max=9000).min() > 70
        assert torch.equal(rows, some_rows(inputs))
        assert torch.equal(some_rows(inputs[:1000]), inputs[:1000])

    def test_statistics_run_over_all_windows_also_where_some_were_held_out(self, windows):
        picked = prepare(tiny_model("llama"), Wanda(), windows, keep=frozenset({"second_moment"}))
        fixed = prepare(tiny_model("llama"), Wanda(), windows, ridge=0.01, keep=frozenset({"second_moment"}))
        for a, b in zip(picked.views, fixed.views, strict=True):
            assert a.stats.tokens == b.stats.tokens == windows.numel()
            torch.testing.assert_close(a.stats.second_moment, b.stats.second_moment, rtol=1e-4, atol=1e-5)

    def test_one_window_is_too_few_to_pick(self, windows):
        with pytest.raises(CalibrationError, match="at least 2 calibration windows") as raised:
            prepare(tiny_model("llama"), Wanda(), windows[:1])
        assert "prune.ridge" in raised.value.hint
        prepare(tiny_model("llama"), Wanda(), windows[:1], ridge=0.01)
        prepare(tiny_model("llama"), Wanda(), windows[:2])


class TestCalibration:
    def test_affine_gives_every_consumer_a_bias_and_ridge_only_where_there_is_one(self, windows):
        for family, calibration, biased in (
            ("llama", "ridge", False),
            ("llama", "none", False),
            ("llama", "affine", True),
            ("opt", "ridge", True),
        ):
            prunable = prepare(tiny_model(family), Wanda(), windows, calibration=calibration, ridge=0.01).prunable
            assert all(isinstance(half.path, NestedRidge) for half in prunable.halves)
            assert [half.affine for half in prunable.halves] == [biased] * 6
            prunable.cut([1, 20] * 3)
            assert [half.consumer.bias is not None for half in prunable.halves] == [biased] * 6

    def test_the_refit_beats_plain_removal_on_the_calibration_text(self, glass):
        model, windows = copy.deepcopy(glass[0]), glass[1]
        prepared = prepare(model, Wanda(), windows)
        prunable = prepared.prunable
        dense = evaluate(model, windows).loss
        for sparsity in (0.2, 0.5):
            kept = Budget(prunable.sublayers).project(np.zeros(8), sparsity).kept
            prunable.cut(kept, calibrated=False)
            plain = evaluate(model, windows).loss
            prunable.cut(kept)
            refitted = evaluate(model, windows).loss
            prunable.restore()
            assert dense < refitted
            assert refitted - dense < 0.9 * (plain - dense)
        assert evaluate(model, windows).loss == dense

    def test_the_paths_error_is_that_of_the_cut_model(self, glass):
        """E||W x - W' x_K||^2 of the first sublayer, measured on the model, stays below ``removal_error``."""
        model, windows = copy.deepcopy(glass[0]), glass[1]
        prepared = prepare(model, Wanda(), windows, ridge=0.01)
        half, view = prepared.prunable.halves[1], prepared.views[1]
        outputs = []
        handle = half.consumer.register_forward_hook(lambda _, __, output: outputs.append(output))
        logits(model, windows)
        half.cut(100)
        logits(model, windows)
        half.path, path = PlainPath(*half.dense_consumer), half.path
        half.cut(100)
        logits(model, windows)
        half.path = path
        handle.remove()
        dense, refitted, plain = outputs
        error, without = ((dense - other).square().sum(-1).mean() for other in (refitted, plain))
        assert 0.5 * view.removal_error[100] < error <= view.removal_error[100] * 1.001
        assert error < without


def test_a_broken_criterion_is_named_with_the_sublayer_it_was_scoring(windows):
    broken = Spoken(lambda w: w.abs() if w.shape[1] == 32 else w[0, :2])
    with pytest.raises(PluginError, match=r"'spoken'.*layer 0 mlp"):
        prepare(tiny_model("llama"), broken, windows, ridge=0.01)


@pytest.mark.parametrize("criterion", [Magnitude, Wanda, Flap, Obs, Taylor])
def test_a_model_that_overflows_is_no_fault_of_the_criterion(criterion, windows):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.inf)
    where = "layer 0 attention: the gradient" if criterion is Taylor else "layer 1 mlp: the (mean|covariance)"
    with pytest.raises(CalibrationError, match=f"{where} on the calibration text holds NaN or infinity") as raised:
        prepare(model, criterion(), windows, ridge=0.01)
    assert "model.dtype" in raised.value.hint


def test_progress_counts_every_step_and_never_goes_back(windows):
    told = []
    prepare(tiny_model("llama"), Taylor(), windows, ridge=0.01, on_progress=lambda *at: told.append(at))
    done, steps = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == steps[-1] == steps[len(steps) // 2]
    assert all(one < all_of_them for one, all_of_them in told[:-1]), "full at the end only"
