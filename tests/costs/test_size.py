"""Sizes are those of the model that is really there after the cut."""

from __future__ import annotations

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from transformers import OPTForCausalLM

from ffgym.costs.resource import standard_costs
from ffgym.costs.size import SizeMeter
from ffgym.criteria.wanda import Wanda
from ffgym.models.cut import PrunableModel
from ffgym.prepare.paths import prepare
from ffgym.testing.models import tiny_model

ALLOCATIONS = [(1, 20, 2, 30, 1, 9), (2, 48, 1, 0, 2, 1), (1, 1, 0, 5, 0, 0)]


@pytest.fixture(params=DISTINCT_FAMILIES)
def prunable(request):
    return PrunableModel(tiny_model(request.param))


def meter_of(prunable, context=64):
    return SizeMeter(prunable, standard_costs(prunable.model, context=context))


def real_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kept", ALLOCATIONS)
def test_parameters_are_those_of_the_cut_model(prunable, kept):
    meter = meter_of(prunable)
    assert meter(prunable.dense_units)["params"] == real_parameters(prunable.model)
    prunable.cut(kept)
    assert meter(kept)["params"] == real_parameters(prunable.model)


def test_projections_of_narrow_embeddings_are_counted():
    """OPT-350m: embeddings of 16 numbers, layers of 32."""
    config = tiny_model("opt").config
    plain = meter_of(PrunableModel(OPTForCausalLM(config)))
    config.word_embed_proj_dim = 16
    narrow = meter_of(PrunableModel(OPTForCausalLM(config)))
    kept = PrunableModel(tiny_model("opt")).dense_units
    head, narrow_head = 128 * 32, 128 * 16
    assert narrow(kept)["macs"] - narrow_head == plain(kept)["macs"] - head + 2 * 16 * 32


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_biases_that_calibration_added_are_counted(family, random_windows):
    """What was cut has new ones; OPT had them before."""
    prepared = prepare(tiny_model(family), Wanda(), random_windows(8), calibration="affine", ridge=0.01)
    prunable = prepared.prunable
    meter, kept = meter_of(prunable), (1, 20, prunable.dense_units[2], 48, 1, 9)
    prunable.cut(kept)
    added = prunable.new_bias_params()
    assert added == {"llama": 4 * 32}.get(family, 0)
    assert meter(kept, new_biases=added)["params"] == real_parameters(prunable.model)
    prunable.restore()
    assert prunable.new_bias_params() == prunable.new_bias_params(stock=True) == 0


def test_counted_by_hand():
    """Llama: hidden 32, 4 query heads of 8 in 2 groups, 48 channels, 128 tokens, 3 layers; float32."""
    size = meter_of(PrunableModel(tiny_model("llama")), context=10)((2, 48) * 3)
    linears = 3 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)
    embeddings_and_head, norms = 2 * 128 * 32, 7 * 32
    assert size["params"] == linears + embeddings_and_head + norms
    assert size["macs"] == linears + 3 * 2 * 4 * 8 * 10 + 128 * 32
    assert size["kv"] == 3 * 2 * 2 * 8 * 4


def test_of_experts_the_matrices_that_a_token_meets_are_multiplied_and_their_biases_are_not():
    """gpt-oss: 6 experts in every layer, 2 to a token, all with biases; the rest is that of the llama above."""
    size = meter_of(PrunableModel(tiny_model("gpt_oss")), context=10)((1, 6) * 3)
    attention, router, experts = 32 * (32 + 16 + 16 + 32), 6 * 32, 2 * 3 * 32 * 48
    assert size["macs"] == 3 * (attention + router + experts + 2 * 4 * 8 * 10) + 128 * 32


def test_macs_are_what_the_profiler_counts():
    """FLOPs of the last of 16 tokens' linear layers, counted by torch on the cut model."""
    from torch.utils.flop_counter import FlopCounterMode

    prunable = PrunableModel(tiny_model("llama"))
    meter = meter_of(prunable, context=0)
    kept = (1, 20, 2, 30, 1, 9)
    prunable.cut(kept)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prunable.model(input_ids=torch.arange(3, 19)[None], use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert meter(kept)["macs"] == linear / 2 / 16


def test_the_cache_is_what_the_model_really_keeps():
    prunable = PrunableModel(tiny_model("llama", dtype=torch.bfloat16))
    meter = meter_of(prunable, context=10)
    kept = (1, 20, 2, 30, 1, 9)
    prunable.cut(kept)
    with torch.no_grad():
        cache = prunable.model(input_ids=torch.arange(3, 13)[None], use_cache=True).past_key_values
    stored = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert meter(kept)["kv"] == stored / 10
