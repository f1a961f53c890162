"""Cut a model to an allocation and put it back.

The layers of a model larger than memory are on the meta device until ``PrunableModel.layer`` brings one in. A cut of
such a layer changes its sizes at once, and its values when it is next in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ffgym.errors import PluginError, first_line, is_out_of_memory
from ffgym.models.experts import PrunableExperts
from ffgym.models.families import family_of
from ffgym.models.modes import own_modes
from ffgym.models.stream import LayerStream
from ffgym.models.sublayer import PrunableSublayer
from ffgym.plugins.manager import described

# Relative change of the logits, in roots of the dtype's precision: 0.44 in bfloat16. There rounding alone gives
# 0.03 on the demo model and 0.33 on random mixtures of 32 layers; a head out of order in one layer of the demo model
# gives 2.
SORTING_TOLERANCE = 5.0


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
        try:
            yield halves
        finally:
            self._release(index)

    # No inference tensors: slopes take gradients of what is brought in, and sizes outlive the mode.
    @own_modes()
    @torch.no_grad()
    def _bring(self, index: int, source: LayerStream) -> None:
        self._place(index, source.load(index))
        for half in self.halves[2 * index : 2 * index + 2]:
            half.arrive()

    @own_modes()
    @torch.no_grad()
    def _release(self, index: int) -> None:
        self._place(index, self._sizes[index])
        for half in self.halves[2 * index : 2 * index + 2]:
            half.leave()

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

    @own_modes()
    def cut(self, kept: Sequence[int] | np.ndarray, *, calibrated: bool = True) -> None:
        """Cut every sublayer to its first ``kept`` units.

        Args:
            kept: units per sublayer, length 2L.
            calibrated: use refitted consumers where a path is there, not plain removal.
        """
        kept = tuple(map(int, kept))  # a checkpoint's configuration takes no integers of numpy
        for half, units in zip(self.halves, kept, strict=True):
            half.cut(units, calibrated=calibrated)
        self.kept = kept

    def restore(self) -> None:
        """Put the dense model back, bit for bit."""
        for half in self.halves:
            half.restore()
        self.kept = self.dense_units


def check_sorting(prunable: PrunableModel, ids: torch.Tensor) -> None:
    """Refuse a family whose model computes something else once its units are sorted.

    Args:
        prunable: a dense model in memory, which is as it was afterwards.
        ids: some token ids, shape (windows, length), int64.

    Raises:
        PluginError: its logits change more than rounding explains.
    """
    dense = _logits(prunable, ids)
    _reverse(prunable)
    change = (_logits(prunable, ids) - dense).norm(dim=-1)
    _reverse(prunable)
    relative = change / (dense - dense.mean(dim=-1, keepdim=True)).norm(dim=-1)
    # Of most tokens: rounding sends some to other experts.
    if relative.median() > SORTING_TOLERANCE * torch.finfo(prunable.model.dtype).eps ** 0.5:
        raise PluginError(
            f"{described(prunable.family)}: the model computes something else once its units are sorted",
            hint="Its names are wrong, or a fused linear is laid out in another way, for example head by head: see "
            "docs/models.md#adding-a-family.",
        )


def check_cutting(prunable: PrunableModel, ids: torch.Tensor) -> None:
    """Refuse a family whose model does not run with one unit less in every sublayer; arguments as `check_sorting`.

    Raises:
        PluginError: says why it does not run.
    """
    prunable.cut([max(1, s.units - 1, s.experts_per_token) for s in prunable.sublayers])
    try:
        _logits(prunable, ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise PluginError(
            f"{described(prunable.family)}: a model with one unit less in every sublayer does not run: "
            f"{first_line(error)}",
            hint="If the attention keeps its number of heads in an attribute, name it in head_count_attributes.",
        ) from error
    finally:
        prunable.restore()


@torch.no_grad()
def _logits(prunable: PrunableModel, ids: torch.Tensor) -> torch.Tensor:
    device = prunable.model.get_input_embeddings().weight.device
    logits: torch.Tensor = prunable.model(input_ids=ids.to(device), use_cache=False).logits
    return logits.float()


def _reverse(prunable: PrunableModel) -> None:
    for half in prunable.halves:
        half.permute(torch.arange(half.sublayer.units).flip(0))
