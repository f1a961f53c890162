"""The tensors of a saved model, read one at a time while they are written in another format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ffgym.errors import ModelError
from ffgym.models.checkpoint import weight_files
from ffgym.models.loading import load_config

FLOATS = ("F32", "F16", "BF16")  # safetensors' names
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def read_checkpoint(folder: Path) -> tuple[Any, Checkpoint]:
    """The config and the tensors of a saved model. Its ``tie_word_embeddings`` is what the weights say."""
    config, checkpoint = load_config(folder), Checkpoint(folder)
    if config.tie_word_embeddings and checkpoint.differ(EMBEDDING, OUTPUT):  # then transformers uses both
        config.tie_word_embeddings = False
    return config, checkpoint


class Checkpoint:
    """The tensors of a folder's safetensors files, read one at a time.

    Raises:
        ModelError: a file is truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._taken: set[str] = set()
        for path in weight_files(folder):
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{str(path)!r} is damaged or incomplete: {error}", hint="Write or download the model again."
                ) from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors calls it, e.g. ``"BF16"``."""
        return str(self._files[name].get_slice(name).get_dtype())

    def take(self, name: str, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        """A tensor, to be read when the returned function is called.

        Raises:
            ModelError: it is missing, has another shape than the config says, or is quantised.
        """
        if name not in self._files:
            raise ModelError(
                f"model {str(self.folder)!r} is incomplete: {name} is missing",
                hint="Write or download the model again.",
            )
        found = tuple(self._files[name].get_slice(name).get_shape())
        if found != shape:
            raise ModelError(
                f"{name} has shape {found}, and config.json says {shape}", hint="Write or download the model again."
            )
        if self.dtype(name) not in FLOATS:
            raise ModelError(
                f"{name} is {self.dtype(name)}; only float32, float16 and bfloat16 weights are written",
                hint="Export the model as it was before it was quantised.",
            )
        self._taken.add(name)
        return lambda: torch.as_tensor(self._files[name].get_tensor(name))

    def differ(self, one: str, other: str) -> bool:
        """Whether both are there, and not the same numbers."""
        if one not in self or other not in self:
            return False
        return not torch.equal(*(torch.as_tensor(self._files[name].get_tensor(name)) for name in (one, other)))

    def drop(self, name: str) -> None:
        """Leave a tensor out on purpose."""
        self._taken.add(name)

    @property
    def left(self) -> list[str]:
        """Tensors that were neither taken nor left out."""
        return sorted(self._files.keys() - self._taken)
