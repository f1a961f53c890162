"""A model larger than memory: its decoder layers stay in the checkpoint's shards until they are needed.

The model is built with its layers on the meta device; embeddings, final norm and head are in memory. The next layer is
read in a thread of its own while a layer is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ffgym.data.cache import remembered
from ffgym.errors import ModelError, first_line
from ffgym.models.checkpoint import check_surplus, weight_tensors
from ffgym.models.families import family_of
from ffgym.models.loading_errors import AGAIN, explained

Weights = Mapping[str, torch.Tensor]
Arriving = tuple[Weights, torch.cuda.Event | None]
"""A layer's weights on the device, and the event of their copy where a GPU may still be at it."""


class LayerStream:
    """Reads the weights of a model whose decoder layers are on the meta device, each layer when it is asked for.

    Args:
        name: what the user called the model.
        model: its parameters say dtypes and shapes.
        folder: of the checkpoint.
        device: where layers go.

    Raises:
        ModelError: the checkpoint lacks a weight, names its weights otherwise than the model does, or holds some in
            its layers that the model has no place for.
    """

    def __init__(self, name: str, model: Any, folder: Path, device: torch.device) -> None:
        self.device = device
        self._dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
        there = {key: (file, key) for key, file in weight_tensors(folder).items()}
        base = f"{model.base_model_prefix}."  # a checkpoint of the base model alone leaves it out
        places = {key: there.get(key) or there.get(key.removeprefix(base)) for key in self._dtypes}
        self._places = {key: place for key, place in places.items() if place is not None}
        self.missing = places.keys() - self._places.keys()
        if lacking := sorted(self.missing - model.all_tied_weights_keys.keys()):
            raise ModelError(
                f"model {name!r} cannot be streamed: {len(lacking)} of its weights are not in the checkpoint "
                f"under their own names, {lacking[0]} first",
                hint="Write the model again with save_pretrained, or set model.placement to resident.",
            )
        found = {key for _, key in self._places.values()}
        check_surplus(name, model, {each for key in there.keys() - found for each in (key, base + key)})
        family = family_of(model)
        self._names = [
            {short: f"{family.decoder}.layers.{index}.{short}" for short in layer.state_dict()}
            for index, layer in enumerate(family.layers(model))
        ]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layers")
        self._next: tuple[int, Future[Arriving]] | None = None
        self._last = -1
        self._side: Any = None if device.type != "cuda" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def read(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model, in the model's dtype, on the CPU.

        Raises:
            ModelError: its file cannot be read any more.
        """
        file, key = self._places[name]
        try:
            return file.read(key).to(self._dtypes[name])
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{name} cannot be read from {file.path}: {first_line(error)}", hint=AGAIN) from error

    def remembered(self, compute: Callable[[], str]) -> str:
        """A digest of the weights, computed again where their files, names or dtypes are others; see `remembered`."""
        files = sorted({file.path for file, _ in self._places.values()})
        weights = [(name, key, self._dtypes[name]) for name, (_, key) in sorted(self._places.items())]
        return remembered(files, compute, str(weights))

    def outside(self) -> dict[str, torch.Tensor]:
        """The weights outside of the layers, by their names in the model, on the device."""
        inside = {name for layer in self._names for name in layer.values()}
        return {name: self.read(name).to(self.device) for name in self._places.keys() - inside}

    def load(self, layer: int) -> Weights:
        """A layer's weights by their names in the layer, on the device. The next one is prefetched."""
        expected, self._next = self._next, None
        weights, copied = expected[1].result() if expected is not None and expected[0] == layer else self._fetch(layer)
        following = self._following(layer)
        self._last = layer
        if expected is not None and expected[0] == following:
            self._next = expected
        elif 0 <= following < len(self._names):
            self._next = following, self._thread.submit(self._fetch, following)
        if copied is not None:  # the stream at work waits for it, not the CPU
            at_work = torch.cuda.current_stream(self.device)
            at_work.wait_event(copied)
            for tensor in weights.values():
                tensor.record_stream(at_work)  # its memory is of the prefetching stream
        return weights

    def _following(self, layer: int) -> int:
        """The layer that will be asked for next: walks go forwards from the first, or back from the last."""
        if layer == self._last:
            return layer - 1 if layer == len(self._names) - 1 else layer + 1
        return layer + 1 if layer == 0 or layer > self._last else layer - 1

    def _fetch(self, layer: int) -> Arriving:
        weights = {short: self.read(name) for short, name in self._names[layer].items()}
        if self._side is None:
            return {short: tensor.to(self.device) for short, tensor in weights.items()}, None
        with torch.cuda.stream(self._side):
            moved = {short: tensor.pin_memory().to(self.device, non_blocking=True) for short, tensor in weights.items()}
            return moved, self._side.record_event()


def streamed_model(name: str, folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, LayerStream]:
    """A causal LM whose decoder layers are on the meta device, and what reads them; errors as in `LayerStream`."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with explained(str(folder), name):
        # Results are read by name, whatever config.json says.
        options = {"dtype": dtype, "return_dict": True, "output_attentions": False}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except OSError:  # there is none: older checkpoints have such settings in config.json
            model.generation_config = GenerationConfig.from_pretrained(folder, "config.json", _from_model_config=True)
    stream = LayerStream(name, model, folder, device)
    model.load_state_dict(stream.outside(), strict=False, assign=True)
    model.tie_weights(missing_keys=set(stream.missing), recompute_mapping=False)
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))
    model.eval()
    model.requires_grad_(False)
    return model, stream
