"""Adapters: where they go, that training goes on bit by bit after Ctrl-C, and what is merged."""

from __future__ import annotations

import copy
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from trainings import checkpoint_in, setup_of

from ffgym.errors import RecoveryError
from ffgym.evaluation.perplexity import evaluate
from ffgym.export.checkpoint import save_pruned
from ffgym.models.cut import PrunableModel
from ffgym.models.families import family_of_type
from ffgym.recover import lora as module
from ffgym.recover.lora import Lora, LoraCurve, merge, target_modules, train_lora
from ffgym.testing.models import tiny_model

EMPTIED = (1, 17, 0, 48, 2, 0)
STEPS = 6


OPTIONS = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "checkpoint_every": 4}  # of the method


def settings(*, steps: int = STEPS, learning_rate: float = 1e-3, seed: int = 0, **options: Any) -> dict[str, Any]:
    shared = {"tokens": steps * 64, "batch_tokens": 64, "learning_rate": learning_rate, "seed": seed}
    return {"setup": {**shared, "evaluate_every": 2}, "options": Lora.Config(**{**OPTIONS, **options})}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of every family, one half of some layers gone."""
    root = tmp_path_factory.mktemp("saved")
    for family in DISTINCT_FAMILIES:
        prunable = PrunableModel(tiny_model(family))
        prunable.cut(EMPTIED)
        save_pruned(prunable, None, root / family)
    return {family: root / family for family in DISTINCT_FAMILIES}


@pytest.fixture
def fresh(folders: dict[str, Path]) -> Callable[..., Any]:
    """``fresh(family, dtype)``: the saved model, as it was saved."""
    from transformers import AutoModelForCausalLM

    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(folders[family], dtype=dtype).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="module")
def texts(random_windows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return random_windows(14, 16), random_windows(6, 16, seed=1)


def train(
    model: Any,
    texts: tuple[torch.Tensor, torch.Tensor],
    wanted: dict[str, Any],
    on_step: Callable[[LoraCurve], Any] = lambda curve: None,
    **more: Any,
) -> LoraCurve:
    return train_lora(setup_of(model, texts, **wanted["setup"], **more), wanted["options"], on_step)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_adapters_that_did_not_learn_are_not_said_to_be_merged(fresh: Any, texts: Any) -> None:
    losses = iter([0.0])  # of the model before; none can be less
    outcome = Lora().train(
        setup_of(fresh(), texts, **settings(steps=1)["setup"], held_out_loss=lambda: next(losses, 9.0))
    )
    assert outcome.kept == "the weights are as they were"


# where adapters go


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_every_linear_that_has_weights_gets_an_adapter(fresh: Any, family: str) -> None:
    model = fresh(family)
    names = target_modules(model, family_of_type(family))
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.numel() and ".layers." in n}
    assert set(names) == linears


# training


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_training_lowers_the_loss_and_leaves_an_ordinary_model(fresh: Any, texts: Any, family: str) -> None:
    model, before = fresh(family), fresh(family)
    curve = train(model, (texts[0], texts[0]), settings(steps=12, learning_rate=3e-3))
    assert curve.chosen == 12
    assert evaluate(model, texts[0]).loss < evaluate(before, texts[0]).loss
    assert evaluate(model, texts[0]).loss == pytest.approx(curve.held_out[-1][1], abs=1e-5)
    assert model.state_dict().keys() == before.state_dict().keys()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights(before)[name])}
    assert changed == {f"{name}.weight" for name in target_modules(before, family_of_type(family))}


def test_no_weight_decays_and_the_gradient_has_norm_1_at_most(fresh: Any, texts: Any, tmp_path: Path) -> None:
    states = []
    for rate in (1e-3, 1.0):
        wanted = settings(steps=1, learning_rate=rate, alpha=1e6)  # and a gradient to match
        checkpoint = checkpoint_in(tmp_path / str(rate))
        train(fresh(), texts, wanted, checkpoint=checkpoint)
        states.append(load_file(checkpoint.folder / f"{module.PART}.safetensors"))
    # At first B is 0, so the loss does not depend on A.
    pairs = [(tensor, states[1][name]) for name, tensor in states[0].items() if re.match("adapter.*lora_A", name)]
    assert pairs
    assert all(torch.equal(*pair) for pair in pairs)
    gradient = torch.cat([10 * tensor.flatten() for name, tensor in states[0].items() if name.startswith("exp_avg.")])
    assert gradient.norm() == pytest.approx(1.0, abs=1e-4)


def test_the_first_loss_is_the_models_own(fresh: Any, texts: Any) -> None:
    model = fresh()
    expected = evaluate(model, texts[1]).loss
    curve = train(model, texts, settings())
    assert curve.held_out[0] == (0, expected)
    assert [step for step, _ in curve.held_out] == [0, 2, 4, 6]
    assert len(curve.train) == STEPS


def test_what_does_not_help_is_not_merged(fresh: Any, texts: Any) -> None:
    model, before = fresh(), fresh()
    losses = iter([3.0, 3.0, 3.1, math.nan])
    curve = train(model, texts, settings(), held_out_loss=lambda: next(losses))
    assert curve.chosen == 0
    assert equal(weights(model), weights(before))


def test_the_best_step_is_merged_not_the_last(fresh: Any, texts: Any) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.9])
    model, shorter = fresh(), fresh()
    curve = train(model, texts, settings(dropout=0.0), held_out_loss=lambda: next(losses))
    assert curve.chosen == 2
    taken: dict[str, torch.Tensor] = {}

    def watch(curve: LoraCurve) -> None:
        if len(curve.train) == 2 and not taken:
            merged = copy.deepcopy(shorter)
            merge(merged)
            taken.update({n: m.base_layer.weight for n, m in merged.named_modules() if hasattr(m, "base_layer")})

    train(shorter, texts, settings(dropout=0.0), on_step=watch)
    assert taken
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in taken.items())


def test_the_same_seed_gives_the_same_bits_and_another_does_not(fresh: Any, texts: Any) -> None:
    first, second, other = fresh(), fresh(), fresh()
    torch.manual_seed(1)
    train(first, texts, settings())
    drawn = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), drawn)  # the caller's random numbers are untouched
    with torch.no_grad():  # as Ctrl-C may have left a notebook
        train(second, texts, settings())
    train(other, texts, settings(seed=1))
    assert equal(weights(first), weights(second))
    assert not equal(weights(first), weights(other))


def test_recomputing_activations_changes_no_number(fresh: Any, texts: Any) -> None:
    plain, recomputed = fresh(), fresh()
    assert train(plain, texts, settings()) == train(recomputed, texts, settings(gradient_checkpointing=True))
    assert equal(weights(plain), weights(recomputed))
    assert not any(getattr(part, "gradient_checkpointing", False) for part in recomputed.modules())


def test_windows_are_taken_in_parts_that_fit(fresh: Any, texts: Any) -> None:
    whole, parted = fresh(), fresh()
    expected = train(whole, texts, settings(dropout=0.0))
    sizes: set[int] = set()

    def note(model: Any, _: Any, given: dict[str, torch.Tensor]) -> None:
        if model.training:
            sizes.add(given["input_ids"].numel())

    parted.register_forward_pre_hook(note, with_kwargs=True)
    found = train(parted, texts, settings(dropout=0.0), tokens_per_pass=16)
    assert sizes == {16}
    assert found.train == pytest.approx(expected.train, rel=1e-5)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parted)[name], tensor, atol=1e-4, rtol=1e-3)


# bfloat16


def test_adapters_are_float32_over_bfloat16_weights(fresh: Any, texts: Any) -> None:
    model, before = fresh(dtype=torch.bfloat16), fresh(dtype=torch.bfloat16)
    seen: set[torch.dtype] = set()
    curve = train(
        model,
        texts,
        settings(),
        on_step=lambda _: seen.update(p.dtype for p in model.parameters() if p.requires_grad),
    )
    assert seen == {torch.float32}
    assert math.isfinite(curve.train[-1])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.state_dict().keys() == before.state_dict().keys()


def test_merging_is_done_in_float32_and_rounded_once(fresh: Any) -> None:
    model, exact = fresh(dtype=torch.bfloat16), fresh()
    family = family_of_type("llama")
    for one in (model, exact):
        module._add_adapters(one, family, Lora.Config())
    for (name, adapted), other in zip(model.named_modules(), exact.modules(), strict=True):
        if name.endswith("q_proj"):
            other.base_layer.weight.copy_(adapted.base_layer.weight.float())
            torch.nn.init.normal_(adapted.lora_B["default"].weight, std=0.01)
            other.lora_A["default"].weight.data.copy_(adapted.lora_A["default"].weight)
            other.lora_B["default"].weight.data.copy_(adapted.lora_B["default"].weight)
            merged = other.base_layer.weight + other.get_delta_weight("default")
            expected = merged.bfloat16()
    for one in (model, exact):
        merge(one)
    last = [m for name, m in model.named_modules() if name.endswith("q_proj")][-1]
    torch.testing.assert_close(last.base_layer.weight, expected, rtol=0, atol=0)


# going on after Ctrl-C


def interrupt_forward(model: Any, calls: int) -> None:
    """Ctrl-C while the model's forward pass runs for the ``calls``-th time in training."""
    count = iter(range(10**6))

    def hook(*_: Any) -> None:
        if model.training and next(count) == calls:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(hook)


@pytest.mark.parametrize("steps_done", [0, 1, 4, 5])
def test_going_on_after_ctrl_c_ends_with_the_same_bits(fresh: Any, texts: Any, tmp_path: Path, steps_done: int) -> None:
    wanted = settings(dropout=0.2)
    whole = fresh()
    expected = train(whole, texts, wanted)
    model = fresh()
    interrupt_forward(model, steps_done)
    with pytest.raises(KeyboardInterrupt):
        train(model, texts, wanted, checkpoint=checkpoint_in(tmp_path / "c"))
    model = fresh()
    torch.manual_seed(77)
    seen: list[int] = []
    curve = train(
        model,
        texts,
        wanted,
        checkpoint=checkpoint_in(tmp_path / "c"),
        on_step=lambda curve: seen.append(len(curve.train)),
    )
    assert min(seen) in (steps_done, steps_done + 1)  # nothing was done again
    assert curve == expected
    assert equal(weights(model), weights(whole))


def test_ctrl_c_between_passes_measurements_and_updates_is_all_the_same(fresh: Any, texts: Any, tmp_path: Path) -> None:
    whole, model = fresh(), fresh()
    expected = train(whole, texts, settings())
    calls = iter(range(100))

    def interrupt(*_: Any) -> None:
        if next(calls) == 1:  # a real signal, in the middle of an update
            os.kill(os.getpid(), signal.SIGINT)

    hook = register_optimizer_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, texts, settings(), checkpoint=checkpoint_in(tmp_path / "c"))
    hook.remove()

    measured = iter(range(100))
    model = fresh()

    def held_out() -> float:
        if next(measured) == 1:
            raise KeyboardInterrupt
        return evaluate(model, texts[1]).loss

    with pytest.raises(KeyboardInterrupt):
        train(model, texts, settings(), checkpoint=checkpoint_in(tmp_path / "c"), held_out_loss=held_out)
    model = fresh()
    assert train(model, texts, settings(), checkpoint=checkpoint_in(tmp_path / "c")) == expected
    assert equal(weights(model), weights(whole))


def test_a_finished_training_is_not_done_again(fresh: Any, texts: Any, tmp_path: Path) -> None:
    first, second = fresh(), fresh()
    train(first, texts, settings(), checkpoint=checkpoint_in(tmp_path / "c"))
    calls: list[LoraCurve] = []
    train(second, texts, settings(), checkpoint=checkpoint_in(tmp_path / "c"), on_step=calls.append)
    assert not calls
    assert equal(weights(first), weights(second))


# what goes wrong


def test_a_loss_that_is_not_finite_stops_with_the_rate(fresh: Any, texts: Any) -> None:
    model = fresh()
    model.get_output_embeddings().weight.mul_(math.nan)
    with pytest.raises(RecoveryError, match="the loss of step 1 is nan") as raised:
        train(model, texts, settings())
    assert "recover.learning_rate, now 0.001" in str(raised.value.hint)


def test_a_full_device_is_said_to_be(fresh: Any, texts: Any) -> None:
    model = fresh(dtype=torch.bfloat16)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.base_model.register_forward_pre_hook(lambda *_: full() if model.training else None)
    with pytest.raises(RecoveryError, match="out of memory on cpu") as raised:
        train(model, texts, settings())
    assert "gradient_checkpointing=true, or model.device=cpu and model.dtype=bfloat16," in str(raised.value.hint)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_runs_on_a_gpu(fresh: Callable[..., Any], texts: Any, tmp_path: Path) -> None:
    model = fresh(dtype=torch.bfloat16).to("cuda")
    curve = train(model, texts, settings(), checkpoint=checkpoint_in(tmp_path / "c"))
    assert all(math.isfinite(loss) for loss in curve.train)
    part = checkpoint_in(tmp_path / "c").load(module.PART, LoraCurve)
    assert part is not None
    assert any(name.startswith("random.cuda") for name in part[0])
