"""The tensors of a saved model, read one at a time while they are written in another format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ffgym.errors import ModelError
from ffgym.models.checkpoint import weight_tensors
from ffgym.models.loading import load_config
from ffgym.models.loading_errors import AGAIN

FLOATS = ("F32", "F16", "BF16")  # safetensors' names
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def read_checkpoint(folder: Path) -> tuple[Any, SavedWeights]:
    """The config and the tensors of a saved model. Its ``tie_word_embeddings`` is what the weights say."""
    config, saved = load_config(folder), SavedWeights(folder)
    if config.tie_word_embeddings and saved.differ(EMBEDDING, OUTPUT):  # then transformers uses both
        config.tie_word_embeddings = False
    return config, saved


class SavedWeights:
    """The tensors of a folder's safetensors files, read one at a time.

    Raises:
        ModelError: a file is truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = weight_tensors(folder)
        self._taken: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors calls it, e.g. ``"BF16"``."""
        return self._files[name].dtype(name)

    def take(self, name: str, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        """A tensor, to be read when the returned function is called.

        Raises:
            ModelError: it is missing, has another shape than the config says, or is quantised.
        """
        if name not in self._files:
            is_base = name.removeprefix("model.") in self._files
            hint = "It lacks its head: load it with AutoModelForCausalLM, and save it again." if is_base else AGAIN
            raise ModelError(f"model {str(self.folder)!r} is incomplete: {name} is missing", hint=hint)
        found = self._files[name].shape(name)
        if found != shape:
            raise ModelError(f"{name} has shape {found}, and config.json says {shape}", hint=AGAIN)
        if self.dtype(name) not in FLOATS:
            raise ModelError(
                f"{name} is {self.dtype(name)}; only float32, float16 and bfloat16 weights are written",
                hint="Export the model as it was before it was quantised.",
            )
        self._taken.add(name)
        return lambda: self._files[name].read(name)

    def differ(self, one: str, other: str) -> bool:
        """Whether both are there, and not the same numbers."""
        if one not in self or other not in self:
            return False
        return not torch.equal(*(self._files[name].read(name) for name in (one, other)))

    def drop(self, name: str) -> None:
        """Leave a tensor out on purpose."""
        self._taken.add(name)

    @property
    def left(self) -> list[str]:
        """Tensors that were neither taken nor left out."""
        return sorted(self._files.keys() - self._taken)
