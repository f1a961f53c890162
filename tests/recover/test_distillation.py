"""Each MLP learns what the dense one put out: against a plain loop, for every family, and on after Ctrl-C."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from trainings import checkpoint_in, setup_of

from ffgym.criteria.wanda import Wanda
from ffgym.errors import ModelError, RecoveryError
from ffgym.evaluation.perplexity import evaluate
from ffgym.export.checkpoint import save_pruned
from ffgym.models.cut import PrunableModel
from ffgym.models.families import dense_or_pruned_family_of, family_of_type
from ffgym.prepare.paths import prepare
from ffgym.pruning.budget import Budget
from ffgym.recover.checkpoint import Checkpoint
from ffgym.recover.distill import DistilMLP, LayerFit, distil_mlps
from ffgym.testing.models import tiny_model

UNEVEN, EMPTIED = (1, 17, 2, 30, 1, 5), (1, 17, 0, 48, 2, 0)


def settings(*, steps: int = 10, batch_tokens: int = 64, **changes: Any) -> dict[str, Any]:
    shared = {"learning_rate": 3e-3, "seed": 0, "evaluate_every": 5, "tokens_per_pass": 4096}
    return {**shared, "batch_tokens": batch_tokens, "tokens": steps * batch_tokens, **changes}


@pytest.fixture(scope="module")
def texts(random_windows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return random_windows(12, 16), random_windows(6, 20, seed=1)


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """``pair(family, kept)``: a pruned model as it is loaded, and the dense one, whose units stand in another order."""
    from transformers import AutoModelForCausalLM

    def make(family: str = "llama", kept: tuple[int, ...] = UNEVEN, dtype: torch.dtype = torch.float32) -> Any:
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        prunable = PrunableModel(tiny_model(family, dtype=dtype))
        for half in prunable.halves:
            half.permute(torch.arange(half.sublayer.units).flip(0))
        prunable.cut(kept)
        save_pruned(prunable, None, folder)
        pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
        return pruned, tiny_model(family, dtype=dtype).requires_grad_(False)

    return make


def distil(
    pair: tuple[Any, Any],
    texts: Any,
    wanted: dict[str, Any],
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, int, float], Any] = lambda layer, step, error: None,
) -> list[LayerFit]:
    setup = setup_of(pair[0], texts, dense=pair[1], checkpoint=checkpoint, **wanted)
    return distil_mlps(setup, on_step, lambda fit: None)


@torch.no_grad()
def mlp_input_and_output(model: Any, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one forward pass of the whole model, shape (tokens, d) each."""
    family = dense_or_pruned_family_of(model)
    mlp = family.layers(model)[layer]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        family.producers(mlp, "mlp")[0].register_forward_pre_hook(
            lambda _, args: seen.update(x=args[0].flatten(0, -2))
        ),
        family.consumer(mlp, "mlp").register_forward_hook(lambda _, __, out: seen.update(y=out.flatten(0, -2))),
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen["x"], seen["y"]


def relative_error(pruned: Any, dense: Any, layer: int, ids: torch.Tensor) -> float:
    missed = mlp_input_and_output(pruned, layer, ids)[1] - mlp_input_and_output(dense, layer, ids)[1]
    return float(missed.square().sum() / mlp_input_and_output(dense, layer, ids)[1].square().sum())


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_every_mlp_comes_closer_to_the_dense_one_in_the_finished_model(pair: Any, texts: Any, family: str) -> None:
    pruned, dense = pair(family)
    before = copy.deepcopy(pruned)
    fits = distil((pruned, dense), (texts[0], texts[0]), settings(steps=30))
    assert [fit.layer for fit in fits] == [0, 1, 2]
    for fit in fits:
        assert fit.after < fit.before
        # What was recorded on the way is what the finished model does in one ordinary forward pass.
        assert relative_error(pruned, dense, fit.layer, texts[0]) == pytest.approx(fit.after, rel=1e-3)
    assert relative_error(before, dense, 0, texts[0]) == pytest.approx(fits[0].before, rel=1e-3)


def test_memory_that_runs_out_names_what_takes_it(pair: Any, texts: Any) -> None:
    def fills_up(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    pruned, dense = pair()
    dense.model.layers[1].register_forward_pre_hook(fills_up)
    with pytest.raises(RecoveryError, match="training ran out of memory") as raised:
        DistilMLP().train(setup_of(pruned, texts, dense=dense, **settings(steps=1)))
    assert "recover.tokens" in str(raised.value.hint)


def test_only_the_mlps_change(pair: Any, texts: Any) -> None:
    pruned, dense = pair("qwen2")
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    teacher = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    distil((pruned, dense), texts, settings())
    changed = {name for name, tensor in pruned.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".mlp." in name}
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_it_is_adam_on_the_mlps_output(pair: Any, texts: Any, family: str) -> None:
    """The first layer against a plain loop over all tokens: inputs are the pruned model's, targets the dense one's."""
    pruned, dense = pair(family)
    reference = copy.deepcopy(pruned)
    x, _ = mlp_input_and_output(reference, 0, texts[0])
    _, y = mlp_input_and_output(dense, 0, texts[0])
    mlp = family_of_type(family).mlp(family_of_type(family).layers(reference)[0])
    parameters = list(mlp.requires_grad_().parameters())
    optimiser = torch.optim.Adam(parameters)
    for rate in (1e-3, 0.5 * (1 + np.cos(np.pi / 3)) * 1e-3, 0.5 * (1 + np.cos(2 * np.pi / 3)) * 1e-3):
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        loss = (mlp(x) - y).square().mean() / y.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    wanted = settings(learning_rate=1e-3, steps=3, batch_tokens=texts[0].numel(), evaluate_every=1)
    fits = distil((pruned, dense), (texts[0], texts[0]), wanted)
    assert fits[0].step == 3
    found = family_of_type(family).mlp(family_of_type(family).layers(pruned)[0])
    for ours, plain in zip(found.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_sublayers_with_nothing_left_are_passed_over(pair: Any, texts: Any, family: str) -> None:
    pruned, dense = pair(family, EMPTIED)
    fits = distil((pruned, dense), texts, settings())
    assert [fit.layer for fit in fits] == [0, 1]
    assert torch.isfinite(pruned(texts[0]).logits).all()


def test_where_nothing_is_cut_nothing_changes(pair: Any, texts: Any) -> None:
    pruned, dense = pair("llama", (2, 48, 2, 48, 2, 48))
    dense.load_state_dict(pruned.state_dict())  # the same order of units: not even rounding differs
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    fits = distil((pruned, dense), texts, settings())
    assert [(fit.before, fit.after, fit.step) for fit in fits] == [(0.0, 0.0, 0)] * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())


def test_a_layer_that_only_gets_worse_keeps_its_weights(pair: Any, texts: Any) -> None:
    pruned, dense = pair()
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    fits = distil((pruned, dense), texts, settings(learning_rate=1.0, steps=3))
    assert [fit.step for fit in fits] == [0, 0, 0]
    assert all(fit.after == fit.before for fit in fits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())


def test_bfloat16_weights_are_trained_in_float32_and_rounded_once(pair: Any, texts: Any, tmp_path: Path) -> None:
    pruned, dense = pair("llama", dtype=torch.bfloat16)
    checkpoint = checkpoint_in(tmp_path / "c")
    fits = distil((pruned, dense), (texts[0], texts[0]), settings(steps=20), checkpoint=checkpoint)
    assert all(fit.after < fit.before for fit in fits)
    part = checkpoint.load("layer-001", LayerFit)
    assert part is not None
    for name, master in part[0].items():
        assert master.dtype == torch.float32
        assert not torch.equal(master, master.bfloat16().float())
        assert torch.equal(pruned.get_parameter(f"model.layers.1.mlp.{name}"), master.bfloat16())


# going on after Ctrl-C


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_going_on_after_ctrl_c_ends_with_the_same_bits(pair: Any, texts: Any, tmp_path: Path, layer: int) -> None:
    whole = pair()
    expected = distil(whole, texts, settings())
    where = tmp_path / "checkpoint"

    def interrupt(at: int, step: int, _: float) -> None:
        if (at, step) == (layer, 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(pair(), texts, settings(), checkpoint=checkpoint_in(where), on_step=interrupt)
    again, steps = pair(), []
    fits = distil(
        again, texts, settings(), checkpoint=checkpoint_in(where), on_step=lambda at, step, _: steps.append((at, step))
    )
    assert steps[0] == (layer, 1)  # finished layers are not trained again
    assert fits == expected
    for ours, theirs in zip(again[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()  # as Ctrl-C may have left a notebook
def test_it_trains_where_gradients_are_off(pair: Any, texts: Any) -> None:
    models = pair()
    assert any(fit.after < fit.before for fit in distil(models, texts, settings()))


def test_the_seed_orders_the_tokens(pair: Any, texts: Any) -> None:
    first, same, other = pair(), pair(), pair()
    for one, seed in ((first, 0), (same, 0), (other, 1)):
        distil(one, texts, settings(seed=seed))
    weight = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(first[0].get_parameter(weight), same[0].get_parameter(weight))
    assert not torch.equal(first[0].get_parameter(weight), other[0].get_parameter(weight))


# what it is good for, and what goes wrong


def test_a_trained_model_that_was_cut_hard_recovers_more_than_ridge_gives(glass: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, windows = copy.deepcopy(glass[0]), glass[1]
    train, held_out, test = windows[:20], windows[20:26], windows[26:]
    prunable = prepare(model, Wanda(), train).prunable
    prunable.cut(Budget(prunable.sublayers).project(np.zeros(8), 0.5).kept)
    ridge = evaluate(model, test).loss
    save_pruned(prunable, None, tmp_path / "m")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    wanted = settings(learning_rate=1e-3, steps=30, batch_tokens=512, evaluate_every=10)
    distil((pruned, glass[0]), (train, held_out), wanted)
    assert evaluate(pruned, test).loss < ridge


def test_another_dense_model_is_refused(pair: Any, texts: Any) -> None:
    pruned, _ = pair()
    with pytest.raises(ModelError, match="the pruned model has 3 decoder layers, the dense one 4") as raised:
        distil((pruned, tiny_model("llama", layers=4)), texts, settings())
    assert "--model" in str(raised.value.hint)


def test_an_error_that_is_not_finite_stops_with_the_rate(pair: Any, texts: Any) -> None:
    pruned, dense = pair()
    pruned.model.layers[1].mlp.down_proj.weight.mul_(float("nan"))
    with pytest.raises(RecoveryError, match="layer 1's MLP is nan at step 1") as raised:
        distil((pruned, dense), texts, settings())
    assert "recover.learning_rate, now 0.003" in str(raised.value.hint)
