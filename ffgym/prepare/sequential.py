"""Calibrate a cut model layer by layer, on what the pruned layers before really pass on (docs/design.md).

Two streams of hidden states walk through one model: the dense one gives the targets, the pruned one the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ffgym.models.cut import PrunableModel, PrunableSublayer
from ffgym.models.walk import Stream, Walk
from ffgym.prepare.statistics import OnProgress, linear_input
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
    walk = Walk(prunable.model)
    batches = torch.split(windows, max(1, tokens_per_batch // windows.shape[1]))
    dense, pruned = Stream(walk, batches), Stream(walk, batches)
    for index in range(len(walk.layers)):
        sublayers = 2 * index, 2 * index + 1
        halves = [prunable.halves[sublayer] for sublayer in sublayers]
        targets = _consumer_inputs(dense, index, halves)
        for half, sublayer in zip(halves, sublayers, strict=True):
            half.cut(kept[sublayer], calibrated=False)
            inputs = (linear_input(half.consumer, run) for run in pruned.runs(index))
            _refit(half, targets.pop(0), inputs, kept[sublayer], ridges[sublayer])
        pruned.step(index)
        if on_progress is not None:
            on_progress(index + 1, len(walk.layers))
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
    half: PrunableSublayer, targets: Sequence[torch.Tensor], inputs: Iterable[torch.Tensor], units: int, ridge: float
) -> None:
    weight, bias = half.dense_consumer
    if units == 0:
        if half.affine:
            tokens = sum(target[..., 0].numel() for target in targets)
            mean = (
                torch.stack([sum_in_float64(target.flatten(0, -2).float()) for target in targets]).sum(dim=0) / tokens
            )
            half.set_bias((0 if bias is None else in_float64(bias)) + in_float64(weight) @ mean)
        return
    sums = _CrossMoments()
    for target, given in zip(targets, inputs, strict=True):
        sums.update(target, given)
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


def _consumer_inputs(stream: Stream, index: int, halves: Sequence[PrunableSublayer]) -> list[list[torch.Tensor]]:
    """Move the states behind a layer; what its consumers were given meanwhile, for every batch."""
    seen: list[list[torch.Tensor]] = [[] for _ in halves]
    handles = [
        half.consumer.register_forward_pre_hook(lambda _, inputs, to=to: to.append(inputs[0]))
        for half, to in zip(halves, seen, strict=True)
    ]
    try:
        stream.step(index)
    finally:
        for handle in handles:
            handle.remove()
    return seen
