"""Calibrate a cut model layer by layer, on what the pruned layers before really pass on (docs/design.md).

Two streams of hidden states walk through one model: the dense one gives the targets, the pruned one the inputs. Each
layer is called by itself, with the arguments that an ordinary call of the model passed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffgym.models.capture import OnProgress, arguments_of
from ffgym.models.surgery import Half, PrunableModel
from ffgym.models.walk import Arguments
from ffgym.pruning.calibration import sequential_refit
from ffgym.pruning.precision import in_float64, sum_in_float64


@torch.no_grad()
def calibrate_sequentially(
    prunable: PrunableModel,
    kept: Sequence[int],
    windows: torch.Tensor,
    ridges: Sequence[float],
    *,
    tokens_per_batch: int = 4096,
    on_progress: OnProgress | None = None,
) -> None:
    """Cut the model to ``kept`` and refit its consumers one after another; the model is left cut.

    Args:
        prunable: the prepared model, dense.
        kept: units per sublayer, length 2L.
        windows: calibration token ids, shape (windows, length), int64.
        ridges: lambda of each sublayer, length 2L.
        tokens_per_batch: tokens of one forward pass.
        on_progress: called with (layers done, layers).
    """
    prunable.restore()
    layers = prunable.family.layers(prunable.model)
    batches = torch.split(windows, equal_batch(len(windows), tokens_per_batch // windows.shape[1]))
    calls = layer_calls(prunable.model, layers, batches[0])
    dense = [first_input(prunable.model, layers[0], batch) for batch in batches]
    pruned = list(dense)
    for index, layer in enumerate(layers):
        attention, mlp = prunable.halves[2 * index], prunable.halves[2 * index + 1]
        run = layer_runner(layer, calls[index])
        targets, following = _dense_pass(run, (attention, mlp), dense)
        for half, target, sublayer in ((attention, targets[0], 2 * index), (mlp, targets[1], 2 * index + 1)):
            half.cut(kept[sublayer], calibrated=False)
            _refit(run, half, target, pruned, kept[sublayer], ridges[sublayer])
        pruned = [run(hidden) for hidden in pruned]
        dense = following
        if on_progress is not None:
            on_progress(index + 1, len(layers))
    prunable.kept = tuple(kept)


@dataclass
class _CrossMoments:
    """Sums over tokens of what ``sequential_refit`` needs; float32 products, float64 means."""

    tokens: int = 0
    cross: torch.Tensor | float = 0.0
    moment: torch.Tensor | float = 0.0
    dense_sum: torch.Tensor | float = 0.0
    pruned_sum: torch.Tensor | float = 0.0

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        self.tokens += len(x)
        self.cross = self.cross + x.T @ y
        self.moment = self.moment + y.T @ y
        self.dense_sum = self.dense_sum + sum_in_float64(x)
        self.pruned_sum = self.pruned_sum + sum_in_float64(y)


def _refit(
    run: Callable[[torch.Tensor], torch.Tensor],
    half: Half,
    targets: list[torch.Tensor],
    hidden: list[torch.Tensor],
    units: int,
    ridge: float,
) -> None:
    weight, bias = half.dense_consumer
    if units == 0:
        if half.affine:
            mean = sum(in_float64(target.flatten(0, -2)).mean(dim=0) for target in targets) / len(targets)
            half.set_bias((0 if bias is None else in_float64(bias)) + in_float64(weight) @ mean)
        return
    sums = _CrossMoments()
    for target, states in zip(targets, hidden, strict=True):
        sums.update(target, linear_input(run, half.consumer, states))
    assert isinstance(sums.cross, torch.Tensor)
    assert isinstance(sums.moment, torch.Tensor)
    cross, moment = in_float64(sums.cross) / sums.tokens, in_float64(sums.moment) / sums.tokens
    anchor = half.path.weight_at(moment.shape[0]) if half.path is not None else None
    if not half.affine:
        half.set_consumer(sequential_refit(weight, cross, moment, ridge, anchor), bias)
        return
    x, y = torch.as_tensor(sums.dense_sum) / sums.tokens, torch.as_tensor(sums.pruned_sum) / sums.tokens
    refit = sequential_refit(weight, cross - torch.outer(x, y), moment - torch.outer(y, y), ridge, anchor)
    moved = (0 if bias is None else in_float64(bias)) + in_float64(weight) @ x - in_float64(refit) @ y
    half.set_consumer(refit, moved)


def _dense_pass(
    run: Callable[[torch.Tensor], torch.Tensor], halves: Sequence[Half], hidden: list[torch.Tensor]
) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """Inputs of both consumers, and the layer's outputs, for every batch."""
    seen: list[list[torch.Tensor]] = [[], []]
    handles = [
        half.consumer.register_forward_pre_hook(lambda _, inputs, to=to: to.append(inputs[0]))
        for half, to in zip(halves, seen, strict=True)
    ]
    try:
        outputs = [run(states) for states in hidden]
    finally:
        for handle in handles:
            handle.remove()
    return seen, outputs


def linear_input(run: Callable[[torch.Tensor], torch.Tensor], linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """What a linear of the layer is given, for hidden states that enter the layer; what comes after is not run."""
    args, _ = arguments_of(linear, lambda: run(hidden))
    states: torch.Tensor = args[0]
    return states


def layer_calls(model: Any, layers: Sequence[nn.Module], batch: torch.Tensor) -> list[Arguments]:
    """The arguments (beside the hidden states) that an ordinary call passes to each layer."""
    calls: list[Arguments] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append((args[1:] if args else (), rest))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        model.base_model(input_ids=batch.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def first_input(model: Any, first: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The hidden states that enter the first layer, shape (windows, length, d)."""
    ids = batch.to(model.get_input_embeddings().weight.device)
    args, kwargs = arguments_of(first, lambda: model.base_model(input_ids=ids, use_cache=False))
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def layer_runner(layer: nn.Module, call: Arguments) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer as a function of its hidden states alone, shape (windows, length, d) to the same."""
    args, kwargs = call

    def run(hidden: torch.Tensor) -> torch.Tensor:
        output = layer(hidden, *args, **kwargs)
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    return run


def equal_batch(windows: int, wanted: int) -> int:
    """The largest batch of at most ``wanted`` windows that divides them: one mask then fits every batch."""
    return max(size for size in range(1, max(1, wanted) + 1) if windows % size == 0)
