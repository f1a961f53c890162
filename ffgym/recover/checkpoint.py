"""What an interrupted training needs to go on: tensors and plain facts, in safetensors files; nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar, get_origin

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ffgym.data.cache import sha256
from ffgym.errors import OutputError, RecoveryError
from ffgym.files import FileFormat, replacing, write_text
from ffgym.models.checkpoint import TensorFile, weight_files
from ffgym.types import JSONDict

IDENTITY = "identity.json"
SUFFIX = ".safetensors"
START_ANEW = "Delete the folder that it lies in, and start anew."

T = TypeVar("T")
_IDENTITY = FileFormat("identity of a training", JSONDict, RecoveryError, START_ANEW)


class Part(NamedTuple, Generic[T]):
    """One part of a checkpoint."""

    tensors: dict[str, torch.Tensor]
    facts: T


class Checkpoint:
    """A folder of parts, each one file that is replaced in one move, so that it is old or new and never half.

    ``identity.json`` beside them holds the facts that decide the numbers of the training that they belong to.

    Args:
        folder: made by ``claim``, which comes before anything else.
        identity: those facts, JSON.
    """

    def __init__(self, folder: Path, identity: JSONDict) -> None:
        self.folder = folder
        self.identity = identity

    @property
    def exists(self) -> bool:
        """There is a part to go on from."""
        return any(self.folder.glob(f"*{SUFFIX}"))

    def claim(self, *, overwrite: bool = False) -> None:
        """Make the folder, and make sure that the parts that are there already belong to this training.

        Args:
            overwrite: delete them where they do not.

        Raises:
            RecoveryError: they belong to another training, or the identity is damaged.
            OutputError: the folder is something else, or cannot be made or written to.
        """
        path = self.folder / IDENTITY
        is_empty = self.folder.is_dir() and not any(self.folder.iterdir())
        if self.folder.exists() and not path.is_file() and not is_empty:
            raise OutputError(
                f"{self.folder} is in the way: it is no unfinished training",
                hint="Move it, or choose another --output.",
            )
        if self.exists:
            self._check(path, overwrite)
        if not self.exists:
            _IDENTITY.write(path, self.identity)

    def _check(self, path: Path, overwrite: bool) -> None:
        try:
            other = _IDENTITY.read(path)
        except RecoveryError:
            if not overwrite:
                raise
            other = {}
        names = [name for name in self.identity if other.get(name) != self.identity[name]]
        if names and overwrite:
            self.remove()
        elif names:
            then, now = (", ".join(f"{name} = {of.get(name)!r}" for name in names) for of in (other, self.identity))
            raise RecoveryError(
                f"{self.folder} holds an unfinished training with {then}; this one has {now}",
                hint="Go on with the same options, start anew with --overwrite, or choose another --output.",
            )

    def save(self, name: str, tensors: dict[str, torch.Tensor], facts: JSONDict) -> None:
        """Write one part.

        Raises:
            RecoveryError: one of the tensors is none.
        """
        path = self.folder / f"{name}{SUFFIX}"
        for key, value in tensors.items():
            if not torch.is_tensor(value):
                raise RecoveryError(
                    f"checkpoint part {name!r}: tensors[{key!r}] is a {type(value).__name__}, not a tensor",
                    hint="Numbers, text, lists and dicts go into its facts.",
                )
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with replacing(path) as unfinished:
            save_file(plain, unfinished, {"facts": json.dumps(facts)})

    def write(self, name: str, text: str) -> Path:
        """Write a text file beside the parts, whole or not at all; its path."""
        path = self.folder / name
        write_text(path, text)
        return path

    def load(self, name: str, facts: type[T]) -> Part[T] | None:
        """One part, or ``None`` where there is none.

        Args:
            facts: what the facts must be: a dataclass or another type that pydantic knows.

        Raises:
            RecoveryError: ``facts`` is no type, or the part is damaged.
        """
        given: object = facts  # a plugin's author may pass anything
        if not isinstance(given, type) and get_origin(given) is None:
            raise RecoveryError(
                f"checkpoint part {name!r}: facts is {given!r}, not a type such as dict",
                hint="Pass the type that the facts have: checkpoint.load(name, dict).",
            )
        path = self.folder / f"{name}{SUFFIX}"
        if not path.exists():
            return None
        try:
            file = TensorFile(path)
            stored, tensors = file.metadata["facts"], {key: file.read(key) for key in file.names}
        except (OSError, SafetensorError, KeyError) as error:
            raise RecoveryError(f"the checkpoint {path} is damaged: {error}", hint=START_ANEW) from error
        return Part(tensors, FileFormat("checkpoint", facts, RecoveryError, START_ANEW).parse(stored, str(path)))

    @contextmanager
    def taking_up(self, name: str) -> Iterator[None]:
        """Say that a part is damaged where the block cannot use what ``load`` gave."""
        try:
            yield
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            path = self.folder / f"{name}{SUFFIX}"
            raise RecoveryError(f"the checkpoint {path} is damaged: {error}", hint=START_ANEW) from error

    def remove(self) -> None:
        """Delete the folder and what is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def files_digest(folder: Path) -> str:
    """SHA-256 over the safetensors files that are loaded of a model folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def random_state(devices: Collection[torch.device]) -> dict[str, torch.Tensor]:
    """torch's random state on the CPU and on those of the devices that are GPUs."""
    on_gpus = {f"random.{device}": torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
    return {"random.cpu": torch.get_rng_state(), **on_gpus}


def set_random_state(state: dict[str, torch.Tensor], devices: Collection[torch.device]) -> None:
    """Undo what was drawn since ``random_state``."""
    torch.set_rng_state(state["random.cpu"])
    for device in devices:
        if device.type == "cuda" and (saved := state.get(f"random.{device}")) is not None:
            torch.cuda.set_rng_state(saved, device)
