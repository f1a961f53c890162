"""Sequential calibration against a slow reference that runs both models in full for every sublayer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from distinct_families import DISTINCT_FAMILIES

from ffgym.criteria.wanda import Wanda
from ffgym.evaluation.perplexity import evaluate
from ffgym.models.cut import PrunableModel
from ffgym.prepare.paths import prepare
from ffgym.prepare.sequential import calibrate_sequentially
from ffgym.pruning.budget import Budget
from ffgym.testing.models import tiny_model


@pytest.fixture(scope="module")
def windows(random_windows):
    return random_windows(8, 24)


def prepared_model(family, windows, calibration="ridge", **options):
    return prepare(tiny_model(family, **options), Wanda(), windows, calibration=calibration, ridge=0.01).prunable


@torch.no_grad()
def inputs_of(model, consumer, windows):
    """Shape (tokens, channels), float64, from one full forward pass of the whole model."""
    seen = []
    handle = consumer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    model(input_ids=windows, use_cache=False)
    handle.remove()
    return seen[0]


@torch.no_grad()
def calibrate_slowly(prunable, kept, windows, ridges):
    """For every sublayer in turn: both models in full, then the normal equations, shrunk towards the nested refit."""
    dense = copy.deepcopy(prunable)
    for index, (half, k, ridge) in enumerate(zip(prunable.halves, kept, ridges, strict=True)):
        half.cut(k, calibrated=False)
        weight, bias = half.dense_consumer
        W = weight.double()
        b = 0 if bias is None else bias.double()
        x = inputs_of(dense.model, dense.halves[index].consumer, windows)
        if k == 0:
            if half.affine:
                half.set_bias(b + W @ x.mean(0))
            continue
        y = inputs_of(prunable.model, half.consumer, windows)
        mean_x, mean_y = (x.mean(0), y.mean(0)) if half.affine else (x.mean(0) * 0, y.mean(0) * 0)
        x, y = x - mean_x, y - mean_y
        shrinkage = ridge * y.square().mean()
        A = y.T @ y / len(y) + shrinkage * torch.eye(y.shape[1], dtype=torch.float64)
        nested = half.path.weight_at(y.shape[1]).double()
        refit = torch.linalg.solve(A, (W @ (x.T @ y / len(y)) + shrinkage * nested).T).T
        half.set_consumer(refit, b + W @ mean_x - refit @ mean_y if half.affine else bias)


@pytest.mark.parametrize(
    ("family", "calibration", "kept"),
    [
        *[(family, "ridge", (1, 20, 2, 30, 1, 9)) for family in DISTINCT_FAMILIES],
        ("llama", "affine", (1, 20, 2, 30, 1, 9)),
        ("llama", "ridge", (2, 48, 0, 24, 1, 0)),
        ("llama", "affine", (2, 48, 0, 24, 1, 0)),
        ("opt", "ridge", (3, 48, 0, 24, 1, 0)),
        ("qwen2", "affine", (1, 0, 2, 48, 0, 10)),
    ],
)
@pytest.mark.parametrize("tokens_per_batch", [4096, 72])
def test_equals_the_slow_reference(family, calibration, kept, tokens_per_batch, windows):
    prunable = prepared_model(family, windows, calibration)
    slow = copy.deepcopy(prunable)
    ridges = (0.01, 0.1, 0.02, 0.05, 0.3, 0.01)
    calibrate_slowly(slow, kept, windows, ridges)
    calibrate_sequentially(prunable, kept, windows, ridges, tokens_per_batch=tokens_per_batch)
    for half, wanted in zip(prunable.halves, slow.halves, strict=True):
        torch.testing.assert_close(half.consumer.weight, wanted.consumer.weight, rtol=2e-3, atol=2e-3)
        assert (half.consumer.bias is None) == (wanted.consumer.bias is None)
        if half.consumer.bias is not None:
            torch.testing.assert_close(half.consumer.bias, wanted.consumer.bias, rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        got, expected = (p.model(input_ids=windows).logits for p in (prunable, slow))
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_inputs_with_means_of_a_thousand_deviations(windows):
    """Uncentred sums in float32 would lose the covariances that the affine refits are made from."""
    model = tiny_model("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight.mul_(0.01)
            layer.fc1.bias.add_(10.0)
    prunable = prepare(model, Wanda(), windows, ridge=0.01).prunable
    slow = copy.deepcopy(prunable)
    kept, ridges = (4, 20, 4, 30, 4, 9), [0.01] * 6
    calibrate_slowly(slow, kept, windows, ridges)
    calibrate_sequentially(prunable, kept, windows, ridges)
    for half, wanted in zip(prunable.halves, slow.halves, strict=True):
        torch.testing.assert_close(half.consumer.weight, wanted.consumer.weight, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_leaves_the_model_cut_and_restorable(family, windows):
    prunable = prepared_model(family, windows)
    with torch.no_grad():
        before = prunable.model(input_ids=windows).logits
    kept = (1, 20, 2, 30, 1, 9)
    calibrate_sequentially(prunable, kept, windows, [0.01] * 6)
    assert prunable.kept == kept
    assert [half.consumer.in_features // half.sublayer.channels_per_unit for half in prunable.halves] == list(kept)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in prunable.model.modules())
    prunable.restore()
    with torch.no_grad():
        assert torch.equal(prunable.model(input_ids=windows).logits, before)


def test_starts_from_the_dense_model_whatever_is_cut(windows):
    kept = (1, 20, 2, 30, 1, 9)
    fresh, used = prepared_model("llama", windows), prepared_model("llama", windows)
    used.cut([1] * 6)
    for prunable in (fresh, used):
        calibrate_sequentially(prunable, kept, windows, [0.01] * 6)
    for a, b in zip(fresh.halves, used.halves, strict=True):
        assert torch.equal(a.consumer.weight, b.consumer.weight)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_where_nothing_is_cut_nothing_changes(family, windows):
    prunable = prepared_model(family, windows)
    with torch.no_grad():
        before = prunable.model(input_ids=windows).logits
        calibrate_sequentially(prunable, prunable.dense_units, windows, [0.01] * 6)
        torch.testing.assert_close(prunable.model(input_ids=windows).logits, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "calibration"), [("llama", "ridge"), ("llama", "affine"), ("opt", "ridge")])
def test_a_strong_ridge_tends_to_the_nested_refit(family, calibration, windows):
    prunable = prepared_model(family, windows, calibration)
    kept = (1, 20, 2, 30, 1, 9)
    calibrate_sequentially(prunable, kept, windows, [1e7] * 6)
    for half, k in zip(prunable.halves, kept, strict=True):
        nested = half.path.weight_at(k * half.sublayer.channels_per_unit)
        torch.testing.assert_close(half.consumer.weight, nested, rtol=1e-3, atol=1e-3)


def test_a_model_without_paths_is_shrunk_towards_its_own_columns(windows):
    prunable = PrunableModel(tiny_model("llama"))
    calibrate_sequentially(prunable, (1, 20, 2, 30, 1, 9), windows, [1e7] * 6)
    for half in prunable.halves:
        columns = half.dense_consumer[0][:, : half.consumer.in_features]
        torch.testing.assert_close(half.consumer.weight, columns, rtol=1e-3, atol=1e-3, check_stride=False)


def test_progress_counts_layers(windows):
    seen = []
    prunable = prepared_model("llama", windows)
    calibrate_sequentially(prunable, [1] * 6, windows, [0.01] * 6, on_progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("sparsity", [0.5, 0.65])
def test_beats_nested_ridge_on_a_trained_model_that_is_cut_hard(glass, sparsity):
    model, windows = copy.deepcopy(glass[0]), glass[1]
    prepared = prepare(model, Wanda(), windows)
    prunable = prepared.prunable
    kept = Budget(prunable.sublayers).project(np.zeros(8), sparsity).kept
    prunable.cut(kept)
    nested = evaluate(model, windows).loss
    calibrate_sequentially(prunable, kept, windows, prepared.ridges)
    assert evaluate(model, windows).loss < nested
