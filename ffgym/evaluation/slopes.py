"""How the loss would change with one unit more or less in every sublayer, from a walk backwards through the cut model.

The cut model is computed at full width, with zeros for the removed consumer columns: the same function, but with a
derivative with respect to them. A pruning path says how the refitted consumer changes as a unit joins. So the
derivative along the path is an inner product with dL/dW: the pathwise derivative of the loss, without sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ffgym.models.cut import PrunableModel
from ffgym.models.walk import Walk, walk_back


def unit_slopes(
    prunable: PrunableModel, windows: torch.Tensor, kept: Sequence[int], *, calibrated: bool = True
) -> list[torch.Tensor]:
    """First-order change of the mean loss as each unit joins those before it in its sublayer's path.

    Args:
        prunable: the model; it is dense afterwards.
        windows: token ids, shape (windows, length), int64.
        kept: units per sublayer at which the derivative is taken, length 2L.
        calibrated: along the refitted paths, not plain removal.

    Returns:
        for every sublayer shape (units,), float32, in nats per token and unit; negative where the unit helps. Removing
        a kept unit would undo its change. 0 for experts: a router chooses, which has no derivative.
    """
    slopes: list[torch.Tensor] = []  # from the last layer to the first
    totals: dict[torch.Tensor, torch.Tensor] = {}

    @contextmanager
    def layer(index: int) -> Iterator[None]:
        with prunable.layer(index):
            frozen = [each for each in _parameters(prunable, index) if not each.requires_grad]
            try:
                for parameter in frozen:
                    parameter.requires_grad_(True)
                yield
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)

    try:
        for half, units in zip(prunable.halves, kept, strict=True):
            half.pad(units, calibrated=calibrated)
        # One window at a time, to bound the graph of a layer.
        walked = walk_back(Walk(prunable.model), torch.split(windows, 1), partial(_parameters, prunable), layer=layer)
        for done, (index, gradients) in enumerate(walked, start=1):
            for parameter, gradient in zip(_parameters(prunable, index), gradients, strict=True):
                before = totals.get(parameter, torch.zeros_like(parameter, dtype=torch.float32))
                totals[parameter] = before + gradient.float() / len(windows)
            if done % len(windows) == 0:
                for half in reversed(prunable.halves[2 * index : 2 * index + 2]):
                    if not half.is_refittable:
                        slopes.append(torch.zeros(half.sublayer.units))
                        continue
                    of_weight, of_bias = totals[half.consumer.weight], totals.get(half.consumer.bias)
                    channels = half.path_for(calibrated=calibrated).slopes(of_weight, of_bias)
                    slopes.append(channels.view(half.sublayer.units, -1).sum(dim=1).cpu())
                totals.clear()
        return slopes[::-1]
    finally:
        prunable.restore()


def _parameters(prunable: PrunableModel, layer: int) -> list[torch.Tensor]:
    """Weights and biases of a layer's two consumers."""
    halves = prunable.halves[2 * layer : 2 * layer + 2]
    return [each for half in halves if half.is_refittable for each in half.consumer.parameters()]
