"""How the loss, or the divergence from the dense model, would change with one unit more or less in every sublayer.

It is computed by a walk backwards through the cut model, at full width, with zeros for the removed consumer columns:
the same function, but with a derivative with respect to them. A pruning path says how the refitted consumer changes as
a unit joins. So the derivative along the path is an inner product with dL/dW: the pathwise derivative, without
sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from ffgym.models.cut import PrunableModel
from ffgym.models.sublayer import PrunableSublayer
from ffgym.models.walk import Objective, Stream, Walk, walk_back
from ffgym.pruning.budget import within_reach


def unit_slopes(
    prunable: PrunableModel,
    windows: torch.Tensor,
    kept: Sequence[int],
    states: list[list[torch.Tensor]],
    *,
    calibrated: bool = True,
    objectives: Sequence[Objective] | None = None,
) -> list[tuple[np.ndarray, ...]]:
    """First-order change of each window's mean loss as each unit joins those before it in its sublayer's path.

    Args:
        prunable: the model; it is dense afterwards. Layers are padded one at a time.
        windows: token ids, shape (windows, length), int64.
        kept: units per sublayer at which the derivative is taken, length 2L.
        states: hidden states of the model that is cut so, before each layer and behind the last one, of each window,
            shape (1, length, d), the model's dtype; each is forgotten when it has been used.
        calibrated: along the refitted paths, not plain removal.
        objectives: what changes instead of the loss, one a window.

    Returns:
        for every window, and in it for every sublayer, shape (units,), float32, in nats per token and unit; negative
        where the unit helps. Removing a kept unit would undo its change. 0 for units that are not `within_reach` of the
        level, and for experts: a router chooses, which has no derivative.
    """
    slopes: list[list[np.ndarray]] = [[] for _ in windows]  # from the last layer to the first

    @contextmanager
    def layer(index: int) -> Iterator[None]:
        with prunable.layer(index) as halves:
            for half, units in zip(halves, kept[2 * index : 2 * index + 2], strict=True):
                half.pad(units, calibrated=calibrated)
            frozen = [each for each in _parameters(prunable, index) if not each.requires_grad]
            try:
                for parameter in frozen:
                    parameter.requires_grad_(True)
                yield
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)
                for half in halves:
                    half.restore()

    # One window at a time, to bound the graph of a layer.
    with torch.no_grad():
        stream = Stream(Walk(prunable.model), torch.split(windows, 1))
    walked = walk_back(stream, states, partial(_parameters, prunable), objectives=objectives, layer=layer)
    for done, (index, gradients) in enumerate(walked):
        wide = (gradient.float() for gradient in gradients)
        own = dict(zip(_parameters(prunable, index), wide, strict=True))
        for at in (2 * index + 1, 2 * index):
            slopes[done % len(windows)].append(_along_path(prunable.halves[at], kept[at], own, calibrated))
    return [tuple(each[::-1]) for each in slopes]


def mean_slopes(windows: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """The slopes of the mean over several windows: for every sublayer shape (units,), float64."""
    return tuple(np.stack(each).astype(np.float64).mean(axis=0) for each in zip(*windows, strict=True))


@torch.no_grad()
def _along_path(
    half: PrunableSublayer, level: int, gradients: Mapping[torch.Tensor, torch.Tensor], calibrated: bool
) -> np.ndarray:
    """The slopes of a sublayer's units, given the gradients of the consumer's parameters, float32."""
    near, step = within_reach(half.sublayer.units, level), half.sublayer.channels_per_unit
    slopes = np.zeros(half.sublayer.units, dtype=np.float32)
    if near and half.is_refittable:
        of_weight, of_bias = gradients[half.consumer.weight], gradients.get(half.consumer.bias)
        path = half.path_for(calibrated=calibrated)
        channels = path.slopes(of_weight, of_bias, near.start * step, near.stop * step)
        slopes[near.start : near.stop] = channels.view(len(near), step).sum(dim=1).cpu().numpy()
    return slopes


def _parameters(prunable: PrunableModel, layer: int) -> list[torch.Tensor]:
    """Weights and biases of a layer's two consumers."""
    halves = prunable.halves[2 * layer : 2 * layer + 2]
    return [each for half in halves if half.is_refittable for each in half.consumer.parameters()]
