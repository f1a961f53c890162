"""What a saved model can be written as for other programs: export formats, chosen by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffgym.data.hub import is_hub_id
from ffgym.errors import FFGymError, OutputError, PluginError
from ffgym.plugins import manager
from ffgym.plugins.bases import Plugin
from ffgym.plugins.contracts import call_plugin

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""

OTHERWISE = "The folder itself loads with transformers and vLLM."


@dataclass(frozen=True)
class Exported:
    """What lies on the disk now.

    Attributes:
        path: the file or folder.
        bytes: its size.
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


class ExportFormat(Plugin, ABC):
    """Writes the folder of a saved model as something that another program reads."""

    kind = "export"

    @abstractmethod
    def write(self, folder: Path, target: Path, *, overwrite: bool, progress: Progress) -> Exported:
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
    progress: Progress | None = None,
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
            return plugin.write(source, place, overwrite=overwrite, progress=progress or (lambda done, total: None))
        except FileExistsError as error:
            raise OutputError(f"{place} exists already", hint="Add --overwrite, or name another place.") from error
        except OSError as error:
            hint = "Check both paths, and that you may use them."
            raise OutputError(f"{source} could not be written as {place}: {error}", hint=hint) from error

    written = call_plugin(plugin, write, f"writing {place}")
    if not isinstance(written, Exported):
        raise PluginError(f"{manager.described(plugin)}: write returned {type(written).__name__}, not an Exported")
    return written


def _source(folder: Path) -> Path:
    """The folder of a model by its place, else of the demo or a model in the hub's cache by its name."""
    # Late: it needs transformers, and the base class above does not.
    from ffgym.models.loading import checkpoint_folder
    from ffgym.models.origin import model_folder

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
