"""Mixtures of experts: which ones a token is sent to, what each adds, and what is left when some go."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from ffgym.costs.latency_table import layer_shapes
from ffgym.errors import BudgetError, ModelError, RecoveryError
from ffgym.export.checkpoint import save_pruned
from ffgym.measure.pairs import units_kept
from ffgym.models.cut import PrunableModel
from ffgym.plan.shape import shape_of
from ffgym.plugins import manager
from ffgym.prepare.paths import prepare
from ffgym.pruning.budget import Budget
from ffgym.recover.distill import distil_mlps
from ffgym.testing.models import EXPERT_FAMILIES, tiny_model

IDS = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(0))
EXPERTS, PER_TOKEN = 6, 2

pytestmark = [pytest.mark.parametrize("family", EXPERT_FAMILIES)]


@pytest.fixture
def prunable(family):
    return PrunableModel(tiny_model(family))


def fewer(prunable, experts=3):
    """An allocation: so many experts in every layer that has some, all else whole."""
    return tuple(experts if s.kind == "experts" else s.units for s in prunable.sublayers)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_unit_is_an_expert_with_its_row_of_the_router(family, prunable):
    half = next(half for half in prunable.halves if half.sublayer.kind == "experts")
    sublayer, config = half.sublayer, prunable.model.config
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert (sublayer.units, sublayer.experts_per_token) == (EXPERTS, PER_TOKEN)
    biases = 2 * width + config.hidden_size + 1 if family == "gpt_oss" else 0
    assert sublayer.unit_params == 3 * config.hidden_size * width + config.hidden_size + biases
    assert sublayer.unit_macs == config.hidden_size, "a token passes through as many experts as before"


def output_of(experts, index, state):
    """What one expert makes of a token."""

    def project(name, inputs):
        weight, bias = getattr(experts, name)[index], getattr(experts, f"{name}_bias", None)
        return linear(inputs, weight.T if experts.is_transposed else weight, None if bias is None else bias[index])

    return project("down_proj", experts._apply_gate(project("gate_up_proj", state)))


def test_an_expert_is_ranked_by_the_length_of_what_it_adds(prunable):
    """Router's weight times norm of the output, token by token and expert by expert."""
    half = next(half for half in prunable.halves if half.sublayer.kind == "experts")
    experts, calls, seen = half._modules[0], [], []
    handle = experts.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    watch = half.watch(seen.append)
    logits(prunable.model)
    handle.remove()
    watch.remove()
    ((hidden, chosen, weights),) = calls
    expected = torch.zeros(len(hidden), EXPERTS)
    with torch.no_grad():
        for token, state in enumerate(hidden):
            for place in range(PER_TOKEN):
                expert = int(chosen[token, place])
                expected[token, expert] = weights[token, place] * output_of(experts, expert, state).norm()
    torch.testing.assert_close(seen[0] * half.consumer.weight, expected, rtol=1e-4, atol=1e-5)


def test_prepared_experts_stand_in_the_order_of_the_criterion_and_have_no_refit(family):
    """Wanda's score is weight times root mean square of the input: here the mean square of what an expert adds."""
    model, windows = tiny_model(family), torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(2))
    prepared = prepare(model, manager.create("criterion", "wanda", {}), windows)
    for half, view, ridge in zip(prepared.prunable.halves, prepared.views, prepared.ridges, strict=True):
        if half.sublayer.kind != "experts":
            continue
        assert (ridge, half.path) == (0.0, None)
        assert (view.unit_scores.diff() <= 0).all()
        added = []
        watch = half.watch(added.append)
        with torch.no_grad():
            model(windows)
        watch.remove()
        squares = (added[0] * half.consumer.weight).double().square().mean(dim=0).detach()
        assert view.output_energy == pytest.approx(float(squares.sum()), rel=1e-3)
        assert view.removal_error == pytest.approx([float(squares[k:].sum()) for k in range(EXPERTS + 1)], rel=1e-3)


def test_as_many_experts_stay_as_a_token_is_sent_to(prunable):
    budget = Budget(prunable.sublayers, min_units=0)
    importance = np.array([-1.0 if s.kind == "experts" else 1.0 for s in prunable.sublayers])
    kept = budget.project(importance, budget.greatest_sparsity).kept
    assert {k for k, s in zip(kept, prunable.sublayers, strict=True) if s.kind == "experts"} == {PER_TOKEN}


def test_a_saved_model_says_how_many_experts_it_has(family, prunable, tmp_path):
    kept = tuple(2 + i // 2 if s.kind == "experts" else max(1, s.units // 2) for i, s in enumerate(prunable.sublayers))
    prunable.cut(kept)
    saved = save_pruned(prunable, None, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(saved.path, trust_remote_code=True)
    assert saved.parameters == sum(parameter.numel() for parameter in again.parameters())
    assert units_kept(again, tiny_model(family)) == kept


def test_one_number_of_experts_in_all_layers_is_a_stock_checkpoint(prunable, tmp_path):
    """As uniform runs keep them: engines that know the family need no code for it."""
    kept = fewer(prunable, experts=4)
    prunable.cut(kept)
    expected = logits(prunable.model)
    saved = save_pruned(prunable, None, tmp_path / "model", stock=True)
    again = AutoModelForCausalLM.from_pretrained(saved.path).eval()
    assert type(again) is type(prunable.model)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def test_what_experts_do_not_have_is_refused_with_its_name(family, prunable):
    windows = torch.randint(0, 128, (4, 16))
    with pytest.raises(ModelError, match="layer 0 experts has no gradient"):
        prepare(prunable.model, manager.create("criterion", "taylor", {}), windows)
    with pytest.raises(BudgetError, match="layer 0 experts takes a time that depends"):
        layer_shapes(prunable.model)
    with pytest.raises(RecoveryError, match="distil-mlp trains MLPs"):
        distil_mlps(SimpleNamespace(model=prunable.model, dense=tiny_model(family), checkpoint=None), None, None)


def test_a_plan_counts_the_experts_of_one_token_as_work_and_all_of_them_as_weights(prunable):
    shape = shape_of(prunable.model.config, "tiny")
    holding = [s for s in prunable.sublayers if s.kind == "experts"]
    assert shape.has_experts
    assert shape.parameters == prunable.model.num_parameters()
    assert shape.active_experts == PER_TOKEN * sum(s.unit_params for s in holding)
    experts = sum(p.numel() for name, p in prunable.model.named_parameters() if ".experts." in name)
    idle = experts * (EXPERTS - PER_TOKEN) // EXPERTS
    # A router's biases count as its experts' (gpt-oss).
    assert shape.active_parameters == pytest.approx(shape.parameters - idle, abs=EXPERTS * len(holding))
