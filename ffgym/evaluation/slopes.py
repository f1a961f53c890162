"""How the loss would change with one unit more or less in every sublayer, from a walk backwards through the cut model.

The cut model is computed at full width, with zeros for the consumer columns that went: the same function, but with a
derivative with respect to them. A pruning path says how the refitted consumer moves as a unit joins, so the derivative
along the path is an inner product with dL/dW: the pathwise derivative of the loss, without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ffgym.models.cut import PrunableModel
from ffgym.models.walk import Walk, walk_back


def unit_slopes(
    prunable: PrunableModel, windows: torch.Tensor, kept: Sequence[int], *, calibrated: bool = True
) -> list[torch.Tensor]:
    """First-order change of the mean loss as each unit joins those that stand before it in its sublayer's path.

    Args:
        prunable: the model; it is handed back dense.
        windows: token ids, shape (windows, length), int64.
        kept: units per sublayer at which the derivative is taken, length 2L.
        calibrated: along the refitted paths, not plain removal.

    Returns:
        for every sublayer shape (units,), float32, in nats per token and unit; negative where the unit helps. Of units
        that are kept it is what dropping them would undo.
    """
    try:
        for half, units in zip(prunable.halves, kept, strict=True):
            half.pad(units, calibrated=calibrated)
        gradients = _consumer_gradients(prunable, windows)
        slopes = []
        for half in prunable.halves:
            of_weight, of_bias = gradients[half.consumer.weight], gradients.get(half.consumer.bias)
            channels = half.path_for(calibrated=calibrated).slopes(of_weight, of_bias)
            slopes.append(channels.view(half.sublayer.units, -1).sum(dim=1).cpu())
        return slopes
    finally:
        prunable.restore()


def _consumer_gradients(prunable: PrunableModel, windows: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """Of the mean loss, with respect to the weights and biases of all consumers; float32."""
    consumers = prunable.consumers
    wanted = [
        [*first.parameters(), *second.parameters()]
        for first, second in zip(consumers[::2], consumers[1::2], strict=True)
    ]
    totals: dict[torch.Tensor, torch.Tensor] = {
        parameter: torch.zeros_like(parameter, dtype=torch.float32) for layer in wanted for parameter in layer
    }
    frozen = [parameter for parameter in totals if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        # One window at a time, to bound the graph of a layer.
        for layer, gradients in walk_back(Walk(prunable.model), torch.split(windows, 1), wanted.__getitem__):
            for parameter, gradient in zip(wanted[layer], gradients, strict=True):
                totals[parameter] += gradient.float() / len(windows)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return totals
