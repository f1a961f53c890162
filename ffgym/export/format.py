"""What a saved model can be written as for other programs: export formats, chosen by name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffgym.data.hub import is_hub_id
from ffgym.errors import FFGymError, OutputError, PluginError
from ffgym.files import NOT_WRITABLE
from ffgym.plugins import manager
from ffgym.plugins.bases import Plugin
from ffgym.plugins.contracts import call_plugin
from ffgym.types import OnStep, do_nothing

OTHERWISE = "The folder itself loads with transformers and vLLM."


@dataclass(frozen=True)
class Exported:
    """What lies on the disk now.

    Attributes:
        path: the file or folder.
        bytes: its size; of a folder, that of its weights at least.
        parameters: numbers in its tensors.
        architecture: the format's name for what it is.
        dtype: of its matrices.
        notes: what differs from the saved model, in whole sentences.
        run: a command that tries it.
        needs: what has to be installed for that command.
    """

    path: Path
    bytes: int
    parameters: int
    architecture: str
    dtype: str
    notes: tuple[str, ...] = ()
    run: str = ""
    needs: str = ""


FIELDS: dict[str, tuple[Any, str]] = {
    "path": (Path, "a Path"),
    **dict.fromkeys(("bytes", "parameters"), (int, "a whole number from 0")),
    **dict.fromkeys(("architecture", "dtype", "run", "needs"), (str, "text")),
    "notes": ((tuple, list), "a tuple of sentences"),
}
"""What the fields of an `Exported` must be, and how a message says it."""


class ExportFormat(Plugin, ABC):
    """Writes the folder of a saved model as something that another program reads."""

    kind = "export"

    @abstractmethod
    def write(self, folder: Path, target: Path, *, overwrite: bool, progress: OnStep) -> Exported:
        """Write a model, whole or not at all.

        Args:
            folder: what ffgym saved, or a stock checkpoint.
            target: the file or folder to write; its parents are created.
            overwrite: replace what is there.
            progress: called with (tensors written, tensors in all), first with 0 written, once the model is open.

        Raises:
            ModelError: the folder holds no model, or one that the format cannot represent.
            OutputError: the target is there already, or cannot be written.
        """


def export(
    folder: Path,
    target: Path,
    *,
    name: str,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: OnStep = do_nothing,
) -> Exported:
    """Write a saved model in the format of this name.

    Args:
        folder: of a saved model, or of a run, whose model is meant; or the name of a model in the hub's cache, or demo.

    Raises:
        OutputError: the target is there already, is the model itself or its dense model, or cannot be written.
        ModelError: there is no model, or one that the format cannot represent.
    """
    plugin: ExportFormat = manager.create("export", name, options)
    source, place = _source(folder), target.expanduser()
    for what, model in _not_to_be_lost(source):
        if model.resolve().is_relative_to(place.resolve()):
            raise OutputError(f"writing {place} would delete the {what} in {model}", hint="Choose another place.")

    def write() -> Exported:
        try:
            return plugin.write(source, place, overwrite=overwrite, progress=progress)
        except FileExistsError as error:
            if overwrite or not place.exists():
                raise
            raise OutputError(f"{place} exists already", hint="Add --overwrite, or name another place.") from error
        except OSError as error:
            if not _concerns(error, source.resolve(), place.resolve()):
                raise  # of another file that the plugin wants
            hint = "Check both paths, and that you may use them."
            raise OutputError(f"{source} could not be written as {place}: {error}", hint=hint) from error

    written = call_plugin(plugin, write, f"writing {place}")
    if wrong := _fault(written):
        raise PluginError(f"{manager.described(plugin)}: write returned {wrong}")
    return written


def _source(folder: Path) -> Path:
    """The folder of a model by its place, else of the demo or a model in the hub's cache by its name."""
    # Late: it needs transformers, and the base class above does not.
    from ffgym.models.checkpoint import model_folder
    from ffgym.models.loading import checkpoint_folder

    if not folder.expanduser().exists() and is_hub_id(str(folder)):
        with suppress(OSError, ValueError):  # it is not in the cache, or the hub allows no such name
            return checkpoint_folder(str(folder))
    return model_folder(folder)


def _not_to_be_lost(source: Path) -> Iterator[tuple[str, Path]]:
    """The model, and the dense one that it was made from where that is a folder or a file: no run brings it back."""
    from ffgym.models.origin import absolute_name, recorded_dense_model

    yield "model", source
    with suppress(FFGymError):  # a damaged record names none
        dense = recorded_dense_model(source)
        if dense is not None and (path := absolute_name(dense.name)) is not None:
            yield "dense model", Path(path)


def _concerns(error: OSError, source: Path, place: Path) -> bool:
    """Whether the disk refused the model, the place to write to or a folder above it, or is full."""
    named = [Path(os.path.realpath(name)) for name in (error.filename, error.filename2) if isinstance(name, str | Path)]
    return error.errno in NOT_WRITABLE or any(
        path.is_relative_to(source) or path.is_relative_to(place) or place.is_relative_to(path) for path in named
    )


def _fault(written: Any) -> str | None:
    """What a plugin returned, if it is no `Exported`, or one that does not say what lies on the disk."""
    if not isinstance(written, Exported):
        return f"{type(written).__name__}, not an Exported"
    for field, (kind, what) in FIELDS.items():
        value = getattr(written, field)
        is_one = isinstance(value, kind) and (kind is not int or value >= 0)
        if not is_one or (field == "notes" and not all(isinstance(note, str) for note in value)):
            return f"an Exported whose {field} is {value!r}, not {what}"
    path = written.path
    if not path.exists():
        return f"an Exported of {path}, which is not there"
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]  # none of a device
    size = sum(file.stat().st_size for file in files)
    if files and not (size if path.is_file() else 0) <= written.bytes <= size:
        return f"an Exported of {written.bytes} bytes, and {path} has {size}"
    return None
