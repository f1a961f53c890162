"""How large a model is once cut: parameters, multiply-accumulates per token, KV-cache bytes per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ffgym.models.surgery import PrunableModel
from ffgym.pruning.budget import unit_cost
from ffgym.types import Resource


@dataclass(frozen=True)
class Size:
    """Whole-model figures.

    Attributes:
        parameters: all parameters, tied ones once.
        macs: multiply-accumulates to produce one token that attends to ``context`` tokens: linear layers, attention
            scores and output head (norms, activations and rotary embeddings are left out).
        kv_bytes: bytes that one token adds to the KV cache.
    """

    parameters: int
    macs: float
    kv_bytes: float

    def of(self, resource: Resource) -> float:
        """The figure of that resource."""
        return {"params": float(self.parameters), "macs": self.macs, "kv": self.kv_bytes}[resource]


class SizeMeter:
    """Sizes of any allocation of one dense model.

    Args:
        prunable: the model, dense at this moment.
        context: tokens attended to.
    """

    def __init__(self, prunable: PrunableModel, *, context: int) -> None:
        model = prunable.model
        head = model.get_output_embeddings().weight
        self.kv_bytes = head.element_size()
        self._sublayers = prunable.sublayers
        self._unit_free = [half.unit_free_params for half in prunable.halves]
        self._context = context
        self._dense_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._head_macs = float(head.numel())

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
            macs=self._head_macs + self._total("macs", kept),
            kv_bytes=self._total("kv", kept),
        )

    def _total(self, resource: Resource, kept: Sequence[int]) -> float:
        return sum(
            k * unit_cost(s, resource, context=self._context, kv_bytes=self.kv_bytes)
            for s, k in zip(self._sublayers, kept, strict=True)
        )
