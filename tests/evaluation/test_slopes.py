"""Slopes are derivatives: of the cut model's loss, along the path that a refit takes as a unit joins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distinct_families import DISTINCT_FAMILIES

from ffgym.criteria.wanda import Wanda
from ffgym.evaluation.divergence import divergence_from
from ffgym.evaluation.perplexity import evaluate, predicting
from ffgym.evaluation.slopes import mean_slopes, unit_slopes
from ffgym.models.sublayer import parameter
from ffgym.models.walk import Stream, Walk, all_states
from ffgym.prepare.paths import prepare
from ffgym.pruning.budget import within_reach
from ffgym.testing.models import tiny_model


def prepared(family, windows, calibration="ridge"):
    """A tiny model in float64, so that differences of losses can be taken, and units kept in the middle."""
    prunable = prepare(tiny_model(family), Wanda(), windows, ridge=0.01, calibration=calibration).prunable
    prunable.restore()
    prunable.model.double()
    for half in prunable.halves:
        half._keep_dense()
    return prunable, [max(1, s.units // 2) for s in prunable.sublayers]


def exact_loss(prunable, windows):
    """Mean loss in float64 throughout."""
    with torch.no_grad():
        logits = prunable.model(input_ids=windows).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def exact_divergence(prunable, windows, log_dense, of):
    """Mean divergence from the dense model in float64 throughout."""
    log_cut = log_probabilities(prunable, windows)
    p, q = (log_dense, log_cut) if of == "kl" else (log_cut, log_dense)
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def log_probabilities(prunable, windows):
    with torch.no_grad():
        return prunable.model(input_ids=windows).logits[:, :-1].log_softmax(dim=-1)


def slopes_at(prunable, windows, kept, *, calibrated=True, of="loss"):
    """Slopes from the hidden states of the model that is cut so."""
    dense = predicting(prunable.model, windows)[0].detach()
    objectives = None if of == "loss" else [divergence_from(prunable.model, hidden, of) for hidden in dense]
    prunable.cut(kept, calibrated=calibrated)
    states = states_of(prunable, windows)
    return mean_slopes(unit_slopes(prunable, windows, kept, states, calibrated=calibrated, objectives=objectives))


def states_of(prunable, windows):
    """Hidden states of the model as it is now, window by window; it is dense afterwards."""
    with torch.no_grad():
        states = all_states(Stream(Walk(prunable.model), windows.split(1)))
    prunable.restore()
    return states


def pad(prunable, kept):
    for half, units in zip(prunable.halves, kept, strict=True):
        half.pad(units)


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_padding_computes_what_cutting_does(family, random_windows):
    prunable, kept = prepared(family, random_windows(8))
    windows = random_windows(3, seed=1)
    prunable.cut(kept)
    cut = exact_loss(prunable, windows)
    pad(prunable, kept)
    assert exact_loss(prunable, windows) == pytest.approx(cut, rel=1e-6)


@pytest.mark.parametrize("whole", [False, True], ids=["half", "whole"])
@pytest.mark.parametrize("calibration", ["ridge", "affine"])
@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_slopes_equal_differences_of_losses(family, calibration, whole, random_windows):
    """A unit of the last layer's and of the first layer's MLP and attention joins by a small part of itself."""
    prunable, kept = prepared(family, random_windows(8), calibration)
    kept = list(prunable.dense_units) if whole else kept
    windows = random_windows(3, seed=1)
    found = slopes_at(prunable, windows, kept)
    assert [slopes.shape for slopes in found] == [(s.units,) for s in prunable.sublayers]
    share = 1e-5 if family == "opt" else 3e-3  # small for the kinks of ReLU; norms in float32 drown what is too small
    for index in (0, 1, len(kept) - 2, len(kept) - 1):
        half, units = prunable.halves[index], kept[index]
        near = within_reach(half.sublayer.units, units)
        assert units - 1 in near
        assert not found[index][[unit not in near for unit in range(half.sublayer.units)]].any()
        for unit in {units - 1, units} & set(near):
            losses = []
            for side in (1, -1):
                pad(prunable, kept)
                weight, bias = half.consumer.weight.clone(), half.consumer.bias
                ends = [(half.pad(k), half.consumer.weight, half.consumer.bias)[1:] for k in (unit, unit + 1)]
                (before, after), biases = zip(*ends, strict=True)
                none = weight.new_zeros(len(weight))  # a consumer without a bias has one of 0
                bias, before_bias, after_bias = (none if b is None else b for b in (bias, *biases))
                moved = bias + side * share * (after_bias - before_bias)
                half.consumer.weight = parameter(weight + side * share * (after - before))
                half.consumer.bias = parameter(moved)
                losses.append(exact_loss(prunable, windows))
            difference = (losses[0] - losses[1]) / (2 * share)
            assert float(found[index][unit]) == pytest.approx(difference, rel=0.02, abs=4e-6), (index, unit)


@pytest.mark.parametrize("of", ["kl", "reverse_kl"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])  # whose logits are plain, soft-capped, divided
def test_slopes_equal_differences_of_divergences(family, of, random_windows):
    prunable, kept = prepared(family, random_windows(8))
    windows = random_windows(3, seed=1)
    log_dense = log_probabilities(prunable, windows)
    found = slopes_at(prunable, windows, kept, of=of)
    for index in (0, 1, len(kept) - 1):
        half, unit, found_of = prunable.halves[index], kept[index] - 1, []
        for side in (1, -1):
            pad(prunable, kept)
            weight = half.consumer.weight.clone()
            before, after = ((half.pad(k), half.consumer.weight)[1] for k in (unit, unit + 1))
            half.consumer.weight = parameter(weight + side * 3e-3 * (after - before))
            found_of.append(exact_divergence(prunable, windows, log_dense, of))
        difference = (found_of[0] - found_of[1]) / 6e-3
        assert float(found[index][unit]) == pytest.approx(difference, rel=0.02, abs=4e-6), (index, unit)


def test_divergence_has_no_slope_where_nothing_is_removed(random_windows):
    prunable, _ = prepared("llama", random_windows(8))
    for of in ("kl", "reverse_kl"):
        found = slopes_at(prunable, random_windows(3, seed=1), prunable.dense_units, of=of)
        np.testing.assert_allclose(np.concatenate(found), 0, atol=1e-7)


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_slopes_have_the_bits_of_a_backward_pass_through_the_model(family, random_windows):
    prunable = prepare(tiny_model(family), Wanda(), random_windows(8), ridge=0.01).prunable
    windows, kept = random_windows(3, seed=1), [max(1, s.units // 2) for s in prunable.sublayers]
    pad(prunable, kept)
    found = unit_slopes(prunable, windows, kept, states_of(prunable, windows))
    pad(prunable, kept)
    parameters = [parameter.requires_grad_() for half in prunable.halves for parameter in half.consumer.parameters()]
    for window, own in zip(windows.split(1), found, strict=True):
        loss = prunable.model(input_ids=window, labels=window, use_cache=False).loss
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
        for half, slopes, units in zip(prunable.halves, own, kept, strict=True):
            near, step = within_reach(half.sublayer.units, units), half.sublayer.channels_per_unit
            ends = near.start * step, near.stop * step
            channels = half.path.slopes(gradients[half.consumer.weight], gradients.get(half.consumer.bias), *ends)
            np.testing.assert_array_equal(slopes[near], channels.view(len(near), step).sum(dim=1))


def test_plain_removal_has_slopes_of_its_own(random_windows):
    prunable, kept = prepared("llama", random_windows(8))
    windows = random_windows(3, seed=1)
    refitted, plain = (slopes_at(prunable, windows, kept, calibrated=c) for c in (True, False))
    assert not np.allclose(refitted[1], plain[1])


def test_the_model_is_handed_back_dense_and_frozen(random_windows):
    prunable, kept = prepared("llama", random_windows(8))
    prunable.model.requires_grad_(False)
    windows = random_windows(3, seed=1)
    dense = evaluate(prunable.model, windows)
    slopes_at(prunable, windows, kept)
    slopes_at(prunable, windows, prunable.dense_units)
    assert evaluate(prunable.model, windows) == dense
    assert not any(p.requires_grad for p in prunable.model.parameters())
    assert all(p.grad is None for p in prunable.model.parameters())
