"""A walk through the layers has the bits of an ordinary call, for every family, whatever was cut or padded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from transformers import AutoModelForCausalLM

from ffgym.data.examples import EncodedExample
from ffgym.evaluation.multiple_choice import padded
from ffgym.export.checkpoint import save_pruned
from ffgym.models.cut import PrunableModel
from ffgym.models.walk import Walk
from ffgym.testing.models import TINY_FAMILIES, tiny_model

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in TINY_FAMILIES},
    "sliding windows": ("mistral", {"sliding_window": 5}),
    "sliding windows in some layers": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "projections": ("opt", {"word_embed_proj_dim": 16}),
    "norms behind": ("opt", {"do_layer_norm_before": False}),
    "dynamic rotary": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
}
DENSE, CUT, SKIPPED = None, (1, 20, 2, 30, 1, 9), (2, 48, 0, 24, 1, 0)


def variant(name: str) -> Any:
    """A tiny model whose config differs in a few values from its family's."""
    family, changes = VARIANTS[name]
    model: Any = tiny_model(family)
    if not changes:
        return model
    config = model.config.from_dict({**model.config.to_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.ndim == 1) + 0.25 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(params=["llama", "opt", *(name for name in VARIANTS if name not in TINY_FAMILIES)])
def model(request: pytest.FixtureRequest) -> Any:
    return variant(request.param)


@pytest.fixture(scope="module")
def windows(random_windows: Any) -> torch.Tensor:
    ids: torch.Tensor = random_windows(3, 16)
    return ids


def walked(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The base model's last hidden states, one layer after another."""
    walk = Walk(model)
    entry = walk.enter(ids, **inputs)
    hidden = entry.hidden
    for index in range(len(walk.layers)):
        hidden = walk.layer(index, hidden, entry)
    return walk.leave(hidden, entry)


def ordinary(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    states: torch.Tensor = model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    return states


@pytest.mark.parametrize("kept", [DENSE, CUT, SKIPPED], ids=["dense", "cut", "skipped"])
@torch.inference_mode()
def test_has_the_bits_of_an_ordinary_call(model: Any, windows: torch.Tensor, kept: tuple[int, ...] | None) -> None:
    if kept is not None:
        PrunableModel(model).cut(kept)
    mask = torch.ones_like(windows)
    mask[1, :5] = 0
    mask[2, 7:] = 0
    whole, padded = walked(model, windows), walked(model, windows, attention_mask=mask)
    assert torch.equal(whole, ordinary(model, windows))
    assert torch.equal(padded, ordinary(model, windows, attention_mask=mask))
    assert not torch.equal(whole, padded), "the mask tells"


@pytest.mark.parametrize("name", TINY_FAMILIES)
@torch.inference_mode()
def test_multiple_choice_can_be_walked(name: str) -> None:
    """Its rows are padded, its masks have four dimensions, and positions start again with every answer."""
    model = variant(name)
    PrunableModel(model).cut(CUT)
    first = EncodedExample("t", (3, 4, 5, 6), ((7, 8), (9,)), 0)
    rows = padded(model, [first, EncodedExample("t", (10, 11), ((12, 13, 14), (15,), (16, 17)), 1)])
    inputs = {"attention_mask": rows.mask, "position_ids": rows.positions}
    assert torch.equal(walked(model, rows.ids, **inputs), ordinary(model, rows.ids, **inputs))


def test_gradients_have_the_bits_of_an_ordinary_call(model: Any, windows: torch.Tensor) -> None:
    parameters = list(model.parameters())
    gradients = [
        torch.autograd.grad(run(model, windows).square().mean(), parameters, allow_unused=True)
        for run in (walked, ordinary)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_what_inference_recorded_serves_where_gradients_are_wanted(windows: torch.Tensor) -> None:
    model = variant("llama")
    walk = Walk(model)
    with torch.inference_mode():
        entry = walk.enter(windows)
    with torch.enable_grad():
        states = walk.layer(0, entry.hidden.requires_grad_(), entry)
        torch.autograd.backward(states.sum())
    assert entry.hidden.grad is not None


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_loaded_pruned_model_can_be_walked(name: str, windows: torch.Tensor, tmp_path: Path) -> None:
    prunable = PrunableModel(tiny_model(name))
    prunable.cut(SKIPPED)
    save_pruned(prunable, None, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(walked(model, windows), ordinary(model, windows))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_hooks_of_a_placed_model_are_called(name: str, windows: torch.Tensor) -> None:
    """Accelerate's, which move each module's inputs to its device."""
    model = variant(name)
    layers = f"{'model.decoder' if name == 'opt' else 'model'}.layers"
    attach_align_device_hook_on_blocks(model, {f"{layers}.{index}": "cpu" for index in range(3)})
    with torch.inference_mode():
        assert torch.equal(walked(model, windows), ordinary(model, windows))


def test_replaced_layers_and_sublayers_count(windows: torch.Tensor) -> None:
    prunable = PrunableModel(tiny_model("llama"))
    walk = Walk(prunable.model)
    entry = walk.enter(windows)
    dense = walk.layer(1, entry.hidden, entry)
    prunable.cut(CUT)
    assert not torch.equal(walk.layer(1, entry.hidden, entry), dense)
    prunable.model.model.layers[1] = copy.deepcopy(prunable.model.model.layers[2])
    assert walk.layers[1] is prunable.model.model.layers[1]
    assert torch.equal(walk.layer(1, entry.hidden, entry), walk.layer(2, entry.hidden, entry))


def test_the_model_keeps_its_layers_when_a_call_fails(windows: torch.Tensor) -> None:
    model: Any = tiny_model("opt")
    walk, layers = Walk(model), list(model.model.decoder.layers)
    with pytest.raises(IndexError):
        walk.enter(windows + 1000)
    assert walk.layers == layers
