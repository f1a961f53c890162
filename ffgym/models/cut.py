"""Cut a model to an allocation and put it back.

The layers of a model larger than memory are on the meta device until ``PrunableModel.layer`` brings one in. A cut of
such a layer changes its sizes at once, and its values when it is next in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ffgym.models.experts import PrunableExperts
from ffgym.models.families import family_of
from ffgym.models.stream import LayerStream
from ffgym.models.sublayer import PrunableSublayer


class PrunableModel:
    """A dense model that can be cut to any allocation and put back.

    Args:
        model: a Hugging Face causal LM of a supported family; its weights will be permuted in place.
        source: where its layers come from, which are on the meta device; ``None`` where they are in memory.

    Raises:
        ModelError: an unsupported architecture.
    """

    def __init__(self, model: Any, source: LayerStream | None = None) -> None:
        self.model = model
        self.source = source
        self.family = family_of(model)
        self.sublayers = tuple(self.family.sublayers(model))
        self._layers = layers = self.family.layers(model)
        self.halves = tuple(
            (PrunableExperts if s.kind == "experts" else PrunableSublayer)(self.family, layers[s.layer], s)
            for s in self.sublayers
        )
        self.kept = self.dense_units
        self._sizes = [] if source is None else [layer.state_dict() for layer in layers]

    @contextmanager
    def layer(self, index: int) -> Iterator[tuple[PrunableSublayer, ...]]:
        """The two halves of a layer, whose weights are in memory within the block.

        Whatever runs a layer or reads its weights does so in here. A model in memory is not moved.
        """
        halves = self.halves[2 * index : 2 * index + 2]
        if self.source is None:
            yield halves
            return
        self._bring(index, self.source)
        brought = [half.consumer.weight for half in halves]
        try:
            yield halves
            for half, weight in zip(halves, brought, strict=True):
                if half.is_refitted and half.consumer.weight is not weight:
                    self.source.refits.keep(half.sublayer.name, half.consumer.state_dict())
        finally:
            self._release(index)

    # No inference tensors: slopes take gradients of what is brought in, and sizes outlive the mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _bring(self, index: int, source: LayerStream) -> None:
        halves = self.halves[2 * index : 2 * index + 2]
        self._place(index, source.load(index))
        for half in halves:
            half.arrive(source.refits.kept(half.sublayer.name) if half.is_refitted else None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _release(self, index: int) -> None:
        halves = self.halves[2 * index : 2 * index + 2]
        refits = [_outline(half.consumer) if half.is_refitted else None for half in halves]
        self._place(index, self._sizes[index])
        for half, refit in zip(halves, refits, strict=True):
            half.leave(refit)

    def _place(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        for half in self.halves[2 * index : 2 * index + 2]:
            half.hand_back()
        self._layers[index].load_state_dict(weights, assign=True)

    @property
    def dense_units(self) -> tuple[int, ...]:
        """Units per sublayer before anything was cut."""
        return tuple(sublayer.units for sublayer in self.sublayers)

    def new_bias_params(self, *, stock: bool = False) -> int:
        """Parameters of all biases that calibration has added, as the model is cut now."""
        return sum(half.new_bias_params(stock=stock) for half in self.halves)

    def cut(self, kept: Sequence[int], *, calibrated: bool = True) -> None:
        """Cut every sublayer to its first ``kept`` units.

        Args:
            kept: units per sublayer, length 2L.
            calibrated: use refitted consumers where a path is there, not plain removal.
        """
        for half, units in zip(self.halves, kept, strict=True):
            half.cut(units, calibrated=calibrated)
        self.kept = tuple(kept)

    def restore(self) -> None:
        """Put the dense model back, bit for bit."""
        for half in self.halves:
            half.restore()
        self.kept = self.dense_units


def _outline(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
