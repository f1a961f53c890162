"""A causal language model, run one decoder layer at a time.

What stands before the layers and behind them is whatever the architecture's own code does there: an ordinary call in
which every layer is replaced by a stub. So no family's embeddings, masks, rotary positions or final norms are known
here, and neither end needs the weights of a layer. The results have the bits of an ordinary call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffgym.models.families import dense_or_pruned_family_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: by position, by name."""


@dataclass(frozen=True)
class Entry:
    """What an ordinary call hands to the decoder layers, for one batch.

    Attributes:
        hidden: enters layer 0, shape (windows, length, d), the model's dtype.
        calls: the other arguments of every layer; batches of one shape without a mask share them.
        ids: token ids, shape (windows, length), int64, on the embedding's device.
        mask: the attention mask that the model was called with, or ``None``.
        positions: the position ids that the model was called with, or ``None``.
    """

    hidden: torch.Tensor
    calls: Sequence[Arguments]
    ids: torch.Tensor
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class Walk:
    """Runs a model's decoder layers one by one.

    ``enter``, then ``layer`` for each of them, then ``leave`` give the bits of an ordinary call, in any grad mode.

    Args:
        model: a Hugging Face causal LM of a supported family, dense or pruned, in eval mode. Layers and their
            sublayers may be replaced between calls, but not its device or dtype.

    Raises:
        ModelError: an unsupported architecture.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._modules: Any = model.get_submodule(dense_or_pruned_family_of(model).decoder).get_submodule("layers")
        self._shared: dict[torch.Size, Sequence[Arguments]] = {}

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers as they are now, first to last."""
        return list(self._modules)

    def enter(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Entry:
        """What reaches the layers.

        Args:
            ids: token ids, shape (windows, length), int64.
            attention_mask: in any form that the model takes; ``None`` where nothing is padded.
            position_ids: in any form that the model takes; ``None`` for those that follow from the mask.
        """
        device = self._model.get_input_embeddings().weight.device
        ids = ids.to(device)
        mask, positions = (None if given is None else given.to(device) for given in (attention_mask, position_ids))
        gradients = torch.is_grad_enabled()
        # What is recorded may be used again where gradients are wanted, and there no inference tensor may be saved.
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            calls, _ = self._call_with_stubs(ids, mask, positions)
        args, kwargs = calls[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        others: Sequence[Arguments] = [_without_hidden(call) for call in calls]
        if mask is None and positions is None:
            others = self._shared.setdefault(ids.shape, others)
        return Entry(hidden, others, ids, mask, positions)

    def layer(self, index: int, hidden: torch.Tensor, entry: Entry) -> torch.Tensor:
        """Hidden states behind a layer, for those before it; shape (windows, length, d)."""
        args, kwargs = entry.calls[index]
        output: torch.Tensor = self._modules[index](hidden, *args, **kwargs)
        return output

    def leave(self, hidden: torch.Tensor, entry: Entry) -> torch.Tensor:
        """The base model's ``last_hidden_state``, for hidden states behind the last layer."""
        _, last = self._call_with_stubs(entry.ids, entry.mask, entry.positions, hidden)
        return last

    def _call_with_stubs(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        hidden: torch.Tensor | None = None,
    ) -> tuple[list[Arguments], torch.Tensor]:
        """What an ordinary call passes to each layer, and what it returns if the layers return ``hidden``."""
        given = {"attention_mask": mask, "position_ids": positions}
        with self._stubs(hidden) as calls:
            output = self._model.base_model(
                input_ids=ids, use_cache=False, **{name: value for name, value in given.items() if value is not None}
            )
        return calls, output.last_hidden_state

    @contextmanager
    def _stubs(self, hidden: torch.Tensor | None) -> Iterator[list[Arguments]]:
        """Every layer is replaced meanwhile; the list grows by what each is called with."""
        layers, calls = self.layers, list[Arguments]()
        try:
            for index in range(len(layers)):
                self._modules[index] = _Stub(calls, hidden)
            yield calls
        finally:
            for index, layer in enumerate(layers):
                self._modules[index] = layer


class _Stub(nn.Module):
    """Stands for a decoder layer: notes what it is called with and returns ``hidden``, or what it was given."""

    def __init__(self, calls: list[Arguments], hidden: torch.Tensor | None) -> None:
        super().__init__()
        self._calls, self._hidden = calls, hidden

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._calls.append((args, kwargs))
        given: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        return given if self._hidden is None else self._hidden


def _without_hidden(call: Arguments) -> Arguments:
    args, kwargs = call
    return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
