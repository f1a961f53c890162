"""Cut the experts of a layer, and their rows of the router."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ffgym.models.families import Family
from ffgym.models.modeling_ffgym import count_experts
from ffgym.models.sublayer import PrunableSublayer, Refit, parameter
from ffgym.types import Sublayer


class PrunableExperts(PrunableSublayer):
    """The experts of a layer and the router that chooses among them; a unit is an expert.

    No linear reads the experts, so there is none to refit. In its place stands one that no model computes with, and
    that criteria and heuristics rank experts by: of each expert, its weight is the norm of the expert's own weights,
    and its input at a token is the length of what the expert adds there, over that norm; 0 where the token is not sent
    to it. So weight times input is the router's weight times the norm of the expert's output, as in REAP (arXiv
    2510.13999). Removing experts is the same as router logits of minus infinity for them.

    Args:
        family: names of the parts.
        layer: the decoder layer.
        sublayer: its experts.
    """

    is_refittable = False

    def __init__(self, family: Family, layer: nn.Module, sublayer: Sublayer) -> None:
        self.sublayer = sublayer
        self._modules = family.expert_modules(layer)
        self.producers = []
        self._keep_dense()
        self.consumer = nn.Linear(sublayer.units, 1, bias=False, device="meta")
        self.consumer.weight = parameter(self._norms())
        self._begin()

    @property
    def dense_consumer(self) -> tuple[torch.Tensor, None]:
        """The stand-in's weight, shape (1, experts), path order."""
        return self.consumer.weight, None

    def watch(self, receive: Callable[[torch.Tensor], object]) -> RemovableHandle:
        """Call ``receive`` with what the stand-in is given, shape (tokens, experts), each time that the layer runs."""

        def contributions(experts: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen, weights = inputs
            lengths = hidden.new_zeros(len(hidden), self.sublayer.units)
            ones = torch.ones_like(weights[:, :1])
            for place in range(chosen.shape[1]):  # of the experts that a token is sent to, one after another
                output = experts.forward(hidden, chosen[:, place : place + 1], ones).norm(dim=-1, keepdim=True)
                lengths.scatter_(1, chosen[:, place : place + 1], (output * weights[:, place : place + 1]).to(lengths))
            receive(lengths / self.consumer.weight.to(lengths))

        handle: RemovableHandle = self._modules[0].register_forward_pre_hook(contributions)
        return handle

    def cut(self, units: int, *, calibrated: bool = True, refit: Refit | None = None) -> None:
        """Keep the first ``units`` experts, and their rows of the router.

        Args:
            units: from as many as a token is sent to, to all.
            calibrated: changes nothing here.
            refit: there is none.
        """
        for (module, name), weight in self._dense.items():
            setattr(module, name, weight if units == self.sublayer.units else parameter(weight[:units]))
        count_experts(self._modules, units)  # type: ignore[no-untyped-call]

    def refits(self, levels: Iterable[int], *, calibrated: bool = True) -> dict[int, Refit]:
        """None."""
        return {}

    def pad(self, units: int, *, calibrated: bool = True) -> None:
        """As ``cut``: a router chooses, which has no derivative with respect to what went."""
        self.cut(units)

    def hand_back(self) -> None:
        """Put the dense parameters into the modules, whatever is to be there when the layer is next brought in."""
        self.cut(self.sublayer.units)

    def _permute_weights(self, order: torch.Tensor) -> None:
        with torch.no_grad():
            for weight in (*self._dense.values(), self.consumer.weight.T):
                weight.copy_(weight[order.to(weight.device)])

    def _norms(self) -> torch.Tensor:
        """Of the weights of each expert, shape (1, experts), float32."""
        squares = [
            weight.detach().to(torch.float32, copy=True).square_().flatten(1).sum(dim=1)
            for (module, _), weight in self._dense.items()
            if module is self._modules[0]
        ]
        return torch.stack(squares).sum(dim=0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)[None]

    def _keep_dense(self) -> None:
        self._dense = {
            (module, name): weight
            for module in self._modules
            for name, weight in module.named_parameters(recurse=False)
        }
