"""How large a model is once cut: parameters, multiply-accumulates per token, KV-cache bytes per token, latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ffgym.costs.latency import LatencyTable, layer_shapes
from ffgym.errors import BudgetError
from ffgym.models.cut import PrunableModel
from ffgym.pruning.budget import unit_cost
from ffgym.types import Resource


@dataclass(frozen=True)
class Size:
    """Whole-model figures.

    Attributes:
        parameters: all parameters, tied ones once.
        macs: multiply-accumulates to produce one token that attends to ``context`` tokens: linear layers, attention
            scores over all of the context, also where a window slides over it, and output head (norms, activations and
            rotary embeddings are left out).
        kv_bytes: bytes that one token adds to the KV cache.
        latency: picoseconds of one forward pass, as a latency table has it; ``None`` where there is no table.
    """

    parameters: int
    macs: float
    kv_bytes: float
    latency: float | None = None

    def of(self, resource: Resource) -> float:
        """The figure of that resource; raises ``BudgetError`` for a latency that nobody has timed."""
        figures = {"params": self.parameters, "macs": self.macs, "kv": self.kv_bytes, "latency": self.latency}
        figure = figures[resource]
        if figure is None:
            raise BudgetError("the latency of this model has not been timed", hint="Give SizeMeter a latency table.")
        return float(figure)


class SizeMeter:
    """Sizes of any allocation of one dense model.

    Args:
        prunable: the model, dense at this moment.
        context: tokens attended to.
        latency: the times of its sublayers, where latency is asked for; must fit the model.

    Attributes:
        kv_bytes: bytes of one cached number.
        head_macs: multiply-accumulates of the output head, for one token.
    """

    def __init__(self, prunable: PrunableModel, *, context: int, latency: LatencyTable | None = None) -> None:
        model = prunable.model
        head = model.get_output_embeddings().weight
        self.kv_bytes = head.element_size()
        self._sublayers = prunable.sublayers
        self._unit_free = [half.unit_free_params for half in prunable.halves]
        self._context = context
        self._dense_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.head_macs = float(head.numel())
        self._between_macs = float(sum(linear.weight.numel() for linear in _linears_between(prunable)))
        shapes = layer_shapes(model) if latency is not None else []
        self._latencies = None if latency is None else latency.cost_tables(shapes)
        self._latency_rest = 0.0 if latency is None else latency.rest(shapes)

    def __call__(self, kept: Sequence[int], *, new_biases: int = 0) -> Size:
        """Size with ``kept`` units per sublayer, length 2L.

        Args:
            kept: units per sublayer.
            new_biases: parameters of the biases that calibration gave consumers without one, which no unit owns
                (``PrunableModel.new_bias_params``); the budget does not count them.
        """
        removed = sum((s.units - k) * s.unit_params for s, k in zip(self._sublayers, kept, strict=True))
        removed += sum(extra for extra, k in zip(self._unit_free, kept, strict=True) if k == 0)
        return Size(
            parameters=self._dense_parameters - removed + new_biases,
            macs=self.head_macs + self._between_macs + self._total("macs", kept),
            kv_bytes=self._total("kv", kept),
            latency=self._latency(kept),
        )

    def _latency(self, kept: Sequence[int]) -> float | None:
        if self._latencies is None:
            return None
        return self._latency_rest + sum(float(table[k]) for k, table in zip(kept, self._latencies, strict=True))

    def _total(self, resource: Resource, kept: Sequence[int]) -> float:
        return sum(
            k * unit_cost(s, resource, context=self._context, kv_bytes=self.kv_bytes)
            for s, k in zip(self._sublayers, kept, strict=True)
        )


def _linears_between(prunable: PrunableModel) -> list[nn.Linear]:
    """The linears of neither a decoder layer nor the head: where OPT's embeddings are narrower than its layers."""
    model = prunable.model
    inside = {module for layer in prunable.family.layers(model) for module in layer.modules()}
    inside.add(model.get_output_embeddings())
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside]
