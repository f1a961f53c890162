"""How the loss would change with one unit more or less in every sublayer, from one backward pass of the cut model.

The cut model is computed at full width, with zeros for the consumer columns that went: the same function, but with a
derivative with respect to them. A pruning path says how the refitted consumer moves as a unit joins, so the derivative
along the path is an inner product with dL/dW: the pathwise derivative of the loss, without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ffgym.models.cut import PrunableModel


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
    halves, model = prunable.halves, prunable.model
    try:
        for half, units in zip(halves, kept, strict=True):
            half.pad(units, calibrated=calibrated)
        weights = [half.consumer.weight for half in halves]
        biases = [half.consumer.bias for half in halves]
        wanted = [*weights, *(bias for bias in biases if bias is not None)]
        totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in wanted]
        frozen = [parameter for parameter in wanted if not parameter.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                for window in windows:  # one at a time, to bound the activations held
                    ids = window[None].to(model.get_input_embeddings().weight.device)
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                    for total, gradient in zip(totals, torch.autograd.grad(loss, wanted), strict=True):
                        total += gradient.float() / len(windows)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        of_biases = iter(totals[len(halves) :])
        found = []
        for half, bias, gradient in zip(halves, biases, totals[: len(halves)], strict=True):
            bias_gradient = None if bias is None else next(of_biases)
            channels = half.path_for(calibrated=calibrated).slopes(gradient, bias_gradient)
            found.append(channels.view(half.sublayer.units, -1).sum(dim=1).cpu())
        return found
    finally:
        prunable.restore()
