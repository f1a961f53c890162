"""A causal language model, run one decoder layer at a time.

What comes before and after the layers is left to the architecture's own code: an ordinary call in which every layer is
replaced by a stub. So this module knows no family's embeddings, masks, rotary positions or final norms, and the stubbed
call needs no layer's weights. The results are bit-equal to those of an ordinary call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ffgym.models.families import dense_or_pruned_family_of

LOGIT_ROWS = 256  # positions of a window whose logits are in memory together

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: by position, by name."""

Objective = Callable[[slice, torch.Tensor], torch.Tensor]
"""What a gradient is of, summed over some positions, given their logits in every window of a batch, shape (windows,
positions, vocabulary), float32."""


@dataclass(frozen=True)
class Entry:
    """What an ordinary call hands to the decoder layers, for one batch."""

    hidden: torch.Tensor  # enters layer 0, shape (windows, length, d), the model's dtype
    calls: Sequence[Arguments]  # the other arguments of every layer, shared by all batches of one shape without a mask
    inputs: dict[str, torch.Tensor]  # what the model was called with, by name, on the embedding's device

    @property
    def ids(self) -> torch.Tensor:
        """Token ids, shape (windows, length), int64."""
        return self.inputs["input_ids"]


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
        self._decoder: Any = model.get_submodule(dense_or_pruned_family_of(model).decoder)
        self._shared: dict[torch.Size, Sequence[Arguments]] = {}

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers as they are now, first to last."""
        return list(self._decoder.layers)

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
        given = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs = {name: tensor.to(device) for name, tensor in given.items() if tensor is not None}
        gradients = torch.is_grad_enabled()
        # What is recorded may be used again where gradients are wanted, and there no inference tensor may be saved.
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), self._stubs() as calls:
            self._model.base_model(**inputs, use_cache=False)
        args, kwargs = calls[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        others: Sequence[Arguments] = [_without_hidden(call) for call in calls]
        if attention_mask is None and position_ids is None:
            others = self._shared.setdefault(ids.shape, others)
        return Entry(hidden, others, inputs)

    def layer(self, index: int, hidden: torch.Tensor, entry: Entry) -> torch.Tensor:
        """Hidden states behind a layer, for those before it; shape (windows, length, d)."""
        args, kwargs = entry.calls[index]
        output: torch.Tensor = self._decoder.layers[index](hidden, *args, **kwargs)
        return output

    def leave(self, hidden: torch.Tensor, entry: Entry) -> torch.Tensor:
        """The base model's ``last_hidden_state``, for hidden states behind the last layer."""
        with self._stubs(hidden):
            output = self._model.base_model(**entry.inputs, use_cache=False)
        last: torch.Tensor = output.last_hidden_state
        return last

    @torch.enable_grad()
    def last_gradient(
        self, hidden: torch.Tensor, entry: Entry, scale: float = 1.0, objective: Objective | None = None
    ) -> torch.Tensor:
        """Gradient of an objective's mean over a batch without a mask, a few positions' logits at a time.

        Args:
            hidden: behind the last layer, shape (windows, length, d), the model's dtype.
            scale: factor of the objective.
            objective: the loss of the next token where left out.

        Returns:
            as ``hidden``.
        """
        hidden.requires_grad_(True)
        objective = objective or partial(_next_token_losses, entry.ids)
        gradient, last = torch.zeros_like(hidden), entry.ids.shape[1] - 1
        for start in range(0, last, LOGIT_ROWS):
            here = slice(start, min(start + LOGIT_ROWS, last))  # a tensor would go to the first of several GPUs
            with self._stubs(hidden):
                logits = self._model(**entry.inputs, use_cache=False, logits_to_keep=here).logits.float()
            mean = objective(here, logits) / (len(hidden) * last)
            gradient += torch.autograd.grad(scale * mean, hidden)[0]
        return gradient

    @contextmanager
    def _stubs(self, hidden: torch.Tensor | None = None) -> Iterator[list[Arguments]]:
        """Stubs stand in the layers' places meanwhile; the list grows by what each is called with."""
        layers, calls = self._decoder.layers, list[Arguments]()
        try:
            self._decoder.layers = nn.ModuleList(_Stub(calls, hidden) for _ in layers)
            yield calls
        finally:
            self._decoder.layers = layers


class Stream:
    """The hidden states of several batches on their way through the layers.

    Attributes:
        hidden: those that enter the next layer, one tensor a batch, shape (windows, length, d).

    Args:
        batches: token ids, each of shape (windows, length), int64.
    """

    def __init__(self, walk: Walk, batches: Iterable[torch.Tensor]) -> None:
        self.walk = walk
        self.hidden: list[torch.Tensor] = []
        self.entries: list[Entry] = []
        for batch in batches:
            entry = walk.enter(batch)
            self.hidden.append(entry.hidden)
            # The states move on, so nothing else may keep the first ones in memory.
            self.entries.append(replace(entry, hidden=entry.hidden.new_empty(0)))

    def runs(self, index: int) -> Iterator[Callable[[], torch.Tensor]]:
        """For each batch, a function that runs the layer on it; the states stay what they are."""
        for hidden, entry in zip(self.hidden, self.entries, strict=True):
            yield partial(self.walk.layer, index, hidden, entry)

    def step(self, index: int) -> None:
        """Move all states behind a layer, batch by batch."""
        for batch, run in enumerate(self.runs(index)):
            self.hidden[batch] = run()


@torch.no_grad()
def all_states(
    stream: Stream, layer: Callable[[int], AbstractContextManager[object]] = nullcontext
) -> list[list[torch.Tensor]]:
    """The hidden states of all batches before each layer, and behind the last one.

    Args:
        stream: which has just been made; it is behind the last layer afterwards.
        layer: entered before a layer is run, left when nothing more is asked of it.
    """
    states = [list(stream.hidden)]
    for index in range(len(stream.walk.layers)):
        with layer(index):
            stream.step(index)
        states.append(list(stream.hidden))
    return states


def walk_back(
    stream: Stream,
    states: list[list[torch.Tensor]],
    wanted: Callable[[int], Sequence[torch.Tensor]],
    *,
    scale: float = 1.0,
    objectives: Sequence[Objective] | None = None,
    layer: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
    """Gradients of an objective, layer by layer from the last to the first, and batch by batch within each.

    Memory is the input of every layer for every batch and the graph of one layer for one batch: each layer is run again
    from its input, as gradient checkpointing does. With the states of the same layers, the gradients have the bits of a
    backward pass through the model.

    Args:
        stream: of the batches, through a model in eval mode.
        states: as `all_states` gives them; each is forgotten when it has been used.
        wanted: for a layer that has just been run, tensors of its graph.
        scale: factor of each batch's mean.
        objectives: one a batch; the loss of the next token where left out.
        layer: entered before a layer is run, left when nothing more is asked of it.

    Yields:
        (layer, gradients of one batch's mean objective with respect to what is wanted).
    """
    walk = stream.walk
    own: Sequence[Objective | None] = objectives or [None] * len(stream.entries)
    gradients = [
        walk.last_gradient(hidden, entry, scale, objective)
        for hidden, entry, objective in zip(states.pop(), stream.entries, own, strict=True)
    ]
    for index in reversed(range(len(states))):
        with layer(index):
            for batch, hidden in enumerate(states.pop()):
                with torch.enable_grad():
                    output = walk.layer(index, hidden.requires_grad_(True), stream.entries[batch])
                    gradients[batch], *found = torch.autograd.grad(output, [hidden, *wanted(index)], gradients[batch])
                    del output  # and with it the graph
                yield index, found


def arguments_of(module: nn.Module, run: Callable[[], object]) -> Arguments:
    """What ``run`` passes to a module that it calls; the run ends there."""
    found: list[Arguments] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    with module.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Reached):
        run()
    return found[0]


def _next_token_losses(ids: torch.Tensor, here: slice, logits: torch.Tensor) -> torch.Tensor:
    targets = ids[:, 1:][:, here].to(logits.device)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Raised by a hook that has seen what it was waiting for."""


class _Stub(nn.Module):
    """Stands for a decoder layer: records its arguments, and returns ``hidden`` or the states it was given."""

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
