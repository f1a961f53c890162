"""Cutting is exactly zero-masking, restoring is bit-exact, and nothing is copied that need not be."""

from __future__ import annotations

import copy

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES

from ffgym.models.cut import PrunableModel
from ffgym.models.families import family_of_type
from ffgym.models.sublayer import parameter
from ffgym.pruning.calibration import NestedRidge, PlainPath
from ffgym.pruning.ordering import expand_order
from ffgym.testing.models import tiny_model

every_structure = pytest.mark.parametrize(
    ("family", "grouped"),
    [
        (family, grouped)
        for family in (*DISTINCT_FAMILIES, "olmo2")  # whose attention is one unit
        for grouped in (True, False)
        if family_of_type(family).kv_heads or not grouped
    ],
)


@pytest.fixture(scope="module")
def ids(random_windows):
    return random_windows(3, 20)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-4)


def snapshot(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def parameters_of(model):
    return {name: id(parameter) for name, parameter in model.named_parameters()}


def random_orders(prunable):
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(s.units, generator=generator) for s in prunable.sublayers]


def random_kept(prunable, seed=0, least=0):
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(least, s.units + 1, (), generator=generator)) for s in prunable.sublayers]


def masked(model, prunable, orders, kept):
    """The dense, unpermuted model with the consumer columns of the dropped units set to 0."""
    reference = PrunableModel(copy.deepcopy(model))
    for half, order, k in zip(reference.halves, orders, kept, strict=True):
        columns = expand_order(order[k:], half.sublayer.channels_per_unit)
        with torch.no_grad():
            half.consumer.weight[:, columns] = 0
    return reference.model


@every_structure
@pytest.mark.parametrize("kept", [None, (1, 0, 0, 0, 0, 0)], ids=["some", "almost nothing"])
def test_pruning_equals_zero_masking(family, grouped, kept, ids):
    """Any allocation, also one that empties sublayers; units in any order."""
    model = tiny_model(family, grouped_query=grouped)
    dense = copy.deepcopy(model)
    prunable = PrunableModel(model)
    orders, kept = random_orders(prunable), kept or random_kept(prunable)
    for half, order in zip(prunable.halves, orders, strict=True):
        half.permute(order)
    prunable.cut(kept)
    assert prunable.kept == tuple(kept)
    close(logits(model, ids), logits(masked(dense, prunable, orders, kept), ids))


@every_structure
def test_restoring_is_bit_exact(family, grouped, ids):
    model = tiny_model(family, grouped_query=grouped)
    before, weights, objects = logits(model, ids), snapshot(model), parameters_of(model)
    prunable = PrunableModel(model)
    for seed in (0, 1):
        prunable.cut(random_kept(prunable, seed))
        logits(model, ids)
    prunable.restore()
    assert prunable.kept == prunable.dense_units
    after = snapshot(model)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert parameters_of(model) == objects, "the same tensors, not copies"
    assert torch.equal(logits(model, ids), before)


@every_structure
def test_cutting_one_way_then_another_leaves_no_trace(family, grouped, ids):
    prunable = PrunableModel(tiny_model(family, grouped_query=grouped))
    first, second = random_kept(prunable, 0), random_kept(prunable, 1)
    prunable.cut(second)
    wanted = logits(prunable.model, ids)
    prunable.cut(first)
    prunable.cut(second)
    assert torch.equal(logits(prunable.model, ids), wanted)


@every_structure
def test_producers_stay_views_unless_they_are_fused(family, grouped):
    prunable = PrunableModel(tiny_model(family, grouped_query=grouped))
    before = [[p.weight.data_ptr() for p in half.producers] for half in prunable.halves]
    prunable.cut([1] * 6)
    for half, addresses in zip(prunable.halves, before, strict=True):
        assert ([p.weight.data_ptr() for p in half.producers] == addresses) == (family != "phi3")
        for producer in half.producers:
            assert producer.out_features == producer.weight.shape[0]
            assert producer.bias is None or len(producer.bias) == producer.out_features
        assert half.consumer.in_features == half.consumer.weight.shape[1] == half.sublayer.channels_per_unit


@every_structure
def test_the_refitted_consumer_and_its_bias_go_in(family, grouped, ids):
    """The affine path, on families with biases and without; what is cut is also what is put back."""
    model = tiny_model(family, grouped_query=grouped)
    prunable = PrunableModel(model)
    biases = [half.consumer.bias for half in prunable.halves]
    before = logits(model, ids)
    for half in prunable.halves:
        weight, bias = half.dense_consumer
        x = torch.randn(200, half.sublayer.channels, generator=torch.Generator().manual_seed(1)) + 0.5
        half.path = NestedRidge(weight.detach(), torch.cov(x.T, correction=0), 0.1, x.mean(0), bias)
        half.affine = True
    kept = random_kept(prunable, least=1)
    kept[1] = prunable.sublayers[1].units
    prunable.cut(kept)
    for half, k in zip(prunable.halves, kept, strict=True):
        channels = k * half.sublayer.channels_per_unit
        if k == half.sublayer.units:
            assert half.consumer.weight is half.dense_consumer[0]
            assert half.consumer.bias is half.dense_consumer[1]
        else:
            torch.testing.assert_close(half.consumer.weight, half.path.weight_at(channels), rtol=0, atol=0)
            torch.testing.assert_close(half.consumer.bias, half.path.bias_at(channels), rtol=0, atol=0)
            assert half.consumer.weight.is_contiguous()
    refitted = logits(model, ids)
    prunable.cut(kept, calibrated=False)
    assert [half.consumer.bias is None for half in prunable.halves] == [bias is None for bias in biases]
    assert not torch.allclose(logits(model, ids), refitted)
    prunable.restore()
    assert all(half.consumer.bias is bias for half, bias in zip(prunable.halves, biases, strict=True))
    assert torch.equal(logits(model, ids), before)


@every_structure
def test_an_empty_sublayer_leaves_its_constant(family, grouped, ids):
    """The affine path at level 0: attention of layer 1 and the MLP of layer 2 become E[W x + b]."""
    model = tiny_model(family, grouped_query=grouped)
    reference = PrunableModel(copy.deepcopy(model))
    prunable = PrunableModel(model)
    kept = list(prunable.dense_units)
    for index in (2, 5):
        half, twin = prunable.halves[index], reference.halves[index]
        weight, bias = half.dense_consumer
        x = torch.randn(200, half.sublayer.channels, generator=torch.Generator().manual_seed(1)) + 0.5
        half.path = NestedRidge(weight.detach(), torch.cov(x.T, correction=0), 0.1, x.mean(0), bias)
        kept[index] = 0
        constant = weight @ x.mean(0) + (0 if bias is None else bias)
        twin.consumer.weight, twin.consumer.bias = parameter(torch.zeros_like(weight)), parameter(constant.detach())
    prunable.cut(kept)
    close(logits(model, ids), logits(reference.model, ids))


@every_structure
def test_generates_with_a_cache_as_without(family, grouped, ids):
    """Also where attention is gone from all layers but the first, whose cache says how long the text is."""
    prunable = PrunableModel(tiny_model(family, grouped_query=grouped))
    prunable.cut([1, 20, 0, 10, 0, 0])
    with torch.no_grad():
        cached, fresh = (
            prunable.model.generate(
                ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=8, do_sample=False, use_cache=use
            )
            for use in (True, False)
        )
    assert cached.shape[1] == 28 or cached[0, -1] == prunable.model.config.eos_token_id
    assert torch.equal(cached, fresh)


def test_weights_take_the_models_dtype():
    model = tiny_model("llama", dtype=torch.bfloat16)
    half = PrunableModel(model).halves[1]
    half.path = PlainPath(torch.randn(32, 48), torch.randn(32))
    half.cut(5)
    assert half.consumer.weight.dtype == half.consumer.bias.dtype == torch.bfloat16
