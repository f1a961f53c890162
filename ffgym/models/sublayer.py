"""Cut half a layer and put it back, by swapping parameters for prefixes of themselves (docs/design.md).

Producers keep views of their first rows, so cutting copies nothing but the refitted consumers. Restoring hands the
dense parameters back: the same tensors, bit for bit.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ffgym.models.families import Family
from ffgym.models.modeling_ffgym import Skipped, count_heads
from ffgym.pruning.calibration import ConsumerPath, PlainPath
from ffgym.pruning.ordering import expand_order
from ffgym.types import Sublayer

Refit = tuple[torch.Tensor, torch.Tensor | None]
"""A consumer's weight and bias at a level, the model's dtype."""


class PrunableSublayer:
    """One sublayer's modules, their dense parameters, and the path that its consumer is cut along.

    Attributes:
        is_refittable: whether a consumer reads the units, which can be refitted when some of them go.
        order: where each unit was before `permute`, shape (units,), int64; ``None`` before.
        load_path: reads the path from disk, once each time that the layer is brought in; ``None`` where the path is
            in memory.
        affine: whether calibration moves the consumer's bias too.
    """

    is_refittable: ClassVar[bool] = True

    def __init__(self, family: Family, layer: nn.Module, sublayer: Sublayer) -> None:
        self.sublayer = sublayer
        self.consumer = family.consumer(layer, sublayer.kind)
        self.producers = family.producers(layer, sublayer.kind)
        self._rows = family.rows_per_unit(sublayer)
        self._layer: Any = layer
        self._attention_name, _, _ = family.attention_consumer.partition(".")
        self._head_counts = family.head_count_attributes if sublayer.kind == "attention" else ()
        self._attention: Any = getattr(layer, self._attention_name)
        if any(attribute.startswith("config.") for attribute in self._head_counts):
            self._attention.config = copy.copy(self._attention.config)
        self._keep_dense()
        self._begin()

    def _begin(self) -> None:
        self.order: torch.Tensor | None = None
        self.load_path: Callable[[], ConsumerPath] | None = None
        self._path: ConsumerPath | None = None
        self.affine = False
        self._asked: Callable[[PrunableSublayer], None] = PrunableSublayer.restore  # how it was cut last

    @property
    def path(self) -> ConsumerPath | None:
        """The consumer's weights at every level; ``None`` for plain removal."""
        if self._path is None and self.load_path is not None:
            self._path = self.load_path()
        return self._path

    @path.setter
    def path(self, path: ConsumerPath) -> None:
        self._path = path

    @property
    def dense_consumer(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The consumer's dense weight, shape (m, n), path order, and bias, shape (m,) or ``None``."""
        _, weight, bias = self._parameters[-1]
        return weight, bias

    @property
    def unit_free_params(self) -> int:
        """Parameters that no unit owns and that go with the last one: an attention's norms of queries and keys."""
        if self.sublayer.kind != "attention":
            return 0
        linears = {id(p) for linear in [*self.producers, self.consumer] for p in linear.parameters()}
        return sum(p.numel() for p in self._attention.parameters() if id(p) not in linears)

    def new_bias_params(self, *, stock: bool = False) -> int:
        """Parameters of the bias that calibration has given a consumer without one, as the half is cut now.

        Args:
            stock: count the zeros too that a stock checkpoint then holds as biases of the producers.
        """
        _, dense_bias = self.dense_consumer
        if dense_bias is not None or self.consumer.bias is None:
            return 0
        zeros = sum(p.out_features for p in self.producers if p.bias is None) if stock else 0
        return self.consumer.out_features + zeros

    def watch(self, receive: Callable[[torch.Tensor], object]) -> RemovableHandle:
        """Call ``receive`` with what the consumer is given, shape (..., channels), each time that the layer runs."""

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            receive(inputs[0])

        return self.consumer.register_forward_pre_hook(hook)

    def permute(self, order: torch.Tensor) -> None:
        """Put the units in this order, shape (units,), int64, for good; the model computes the same as before."""
        self.order = order if self.order is None else self.order[order]
        self._permute_weights(order)

    def _permute_weights(self, order: torch.Tensor) -> None:
        with torch.no_grad():
            for producer, rows in zip(self.producers, self._rows, strict=True):
                index = _rows_in_order(order, rows).to(producer.weight.device)
                producer.weight.copy_(producer.weight[index])
                if producer.bias is not None:
                    producer.bias.copy_(producer.bias[index])
            columns = expand_order(order, self.sublayer.channels_per_unit).to(self.consumer.weight.device)
            self.consumer.weight.copy_(self.consumer.weight[:, columns])

    def cut(self, units: int, *, calibrated: bool = True, refit: Refit | None = None) -> None:
        """Keep the first ``units`` units.

        Args:
            units: 0 .. all; all of them is the dense sublayer.
            calibrated: use the path's refitted consumer, not plain removal.
            refit: the consumer of this level where `refits` has formed it.
        """
        if units == self.sublayer.units:
            self.restore()
            return
        self._asked = partial(PrunableSublayer.cut, units=units, calibrated=calibrated)
        if refit is None:
            refit = self.refits([units], calibrated=calibrated)[units]
        _set(self.consumer, *refit)
        for (producer, weight, bias), rows in zip(self._parameters[:-1], self._rows, strict=True):
            first = partial(_first_rows, rows=rows, kept=units, units=self.sublayer.units)
            _set(producer, first(weight), None if bias is None else first(bias))
        self._count_heads(units)
        self._place_attention(empty=units == 0)

    def refits(self, levels: Iterable[int], *, calibrated: bool = True) -> dict[int, Refit]:
        """The consumer at several levels, by units kept, formed together with the bits that each has alone."""
        path, step = self.path_for(calibrated=calibrated), self.sublayer.channels_per_unit
        swept = path.weights_at(units * step for units in levels)
        return {channels // step: self._in_dtype(weight, path.bias_at(channels)) for channels, weight in swept}

    def path_for(self, *, calibrated: bool) -> ConsumerPath:
        """The refitted path, or plain removal where none was built or wanted; only sizes where the layer is away."""
        weight, bias = self.dense_consumer
        if weight.is_meta:  # not in memory
            if bias is None and self.affine and calibrated:
                bias = weight.new_zeros(len(weight))
            return PlainPath(weight, bias)
        path = self.path if calibrated else None
        return PlainPath(weight, bias) if path is None else path

    def pad(self, units: int, *, calibrated: bool = True) -> None:
        """Compute what ``cut`` would, at full width: the columns of the removed units are zeros.

        So there is a derivative with respect to the removed units.
        """
        self.restore()
        self._asked = partial(PrunableSublayer.pad, units=units, calibrated=calibrated)
        dense, bias = self.dense_consumer
        if units == self.sublayer.units:
            if calibrated and self.affine and bias is None:  # the path gives it one
                _set(self.consumer, dense, dense.new_zeros(len(dense)))
            return
        channels = units * self.sublayer.channels_per_unit
        path = self.path_for(calibrated=calibrated)
        weight = torch.zeros_like(dense)
        weight[:, :channels] = path.weight_at(channels).to(weight)
        _set(self.consumer, *self._in_dtype(weight, path.bias_at(channels)))

    def _in_dtype(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Refit:
        like, _ = self.dense_consumer
        # Contiguous, as a checkpoint stores it: kernels round differently on strided weights.
        return weight.to(like).contiguous(), None if bias is None else bias.to(like)

    def restore(self) -> None:
        """Hand the dense parameters back."""
        self._asked = PrunableSublayer.restore
        self.hand_back()

    def hand_back(self) -> None:
        """Put the dense parameters into the modules; the next `arrive` cuts the sublayer as before."""
        for linear, weight, bias in self._parameters:
            _set(linear, weight, bias)
        self._count_heads(self.sublayer.units)
        self._place_attention(empty=False)

    def _count_heads(self, units: int) -> None:
        if self.sublayer.kind == "attention":
            heads, kv_heads, _ = (units * count for count in self.sublayer.heads_per_unit)
            count_heads(self._attention, heads, kv_heads, self._head_counts)  # type: ignore[no-untyped-call]

    def arrive(self) -> None:
        """Order the dense weights that have been put into the modules, and cut them as they were cut last."""
        self._keep_dense()
        if self.order is not None:
            self._permute_weights(self.order)
        self._asked(self)

    def leave(self) -> None:
        """Keep nothing but sizes, now that the modules' weights are on the meta device."""
        self._keep_dense()
        self._path = None
        self._asked(self)

    def _place_attention(self, *, empty: bool) -> None:
        # Stock attention cannot reshape zero heads.
        if self.sublayer.kind == "attention":
            module = Skipped(self.consumer.bias, attention=True) if empty else self._attention
            setattr(self._layer, self._attention_name, module)

    def _keep_dense(self) -> None:
        self._parameters = [(linear, linear.weight, linear.bias) for linear in [*self.producers, self.consumer]]


def _rows_in_order(order: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Where each row of a producer comes from when its units are put in order; a unit has ``rows`` in every block."""
    starts = itertools.accumulate((len(order) * count for count in rows), initial=0)
    return torch.cat([start + expand_order(order, count) for start, count in zip(starts, rows, strict=False)])


def _first_rows(tensor: torch.Tensor, rows: Sequence[int], kept: int, units: int) -> torch.Tensor:
    """The rows of the first ``kept`` of ``units`` units: a view, or a copy where there are several blocks."""
    blocks = torch.split(tensor, [units * count for count in rows])
    first = [block[: kept * count] for block, count in zip(blocks, rows, strict=True)]
    return first[0] if len(first) == 1 else torch.cat(first)


def _set(module: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    module.weight = parameter(weight)
    module.register_parameter("bias", None if bias is None else parameter(bias))
    module.out_features, module.in_features = weight.shape


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    """The tensor as a parameter without a gradient; a parameter as it is."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
