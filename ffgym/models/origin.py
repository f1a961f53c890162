"""What a saved model was made from: the record that ffgym writes beside its weights, read again."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ffgym.config.mixture import Corpora
from ffgym.data.hub import is_hub_id
from ffgym.errors import ConfigError, ModelError
from ffgym.files import FileFormat
from ffgym.models.loading import DEMO_BASE

Use = Literal["calibrated", "searched", "trained"]


@dataclass(frozen=True)
class Origin:
    """The dense model and the texts that a saved model was made from, kept in ``ffgym.json`` in its folder."""

    dense: str | None = None  # as `load` took it; None where nobody said which it was
    revision: str | None = None
    place: str | None = None  # its path, absolute or in the home folder ~; None for the demo and for models of the hub
    texts: Mapping[Use, Corpora] = field(default_factory=dict)  # by what was done with them, as their user named them


FILE = "ffgym.json"
RECORD = FileFormat("record of a dense model", Origin, ConfigError, "Name the dense model with --dense MODEL.")


def origin_from(dense: str | None, revision: str | None, texts: Mapping[Use, Corpora]) -> Origin:
    """The record of a model that is made here and now."""
    return Origin(dense, revision, None if dense is None else recorded_name(dense), texts)


@dataclass(frozen=True)
class DenseModel:
    """Which model is the dense one, and who says so."""

    name: str  # as `load` takes it
    revision: str | None
    said_by: str  # an option or a file
    called: str | None = None  # what it is called there, where that name does not lead to it from here

    @property
    def identity(self) -> tuple[str, str | None]:
        """Its name and revision, the same for a folder or a file by whatever path."""
        place = absolute_name(self.name)
        return self.name if place is None else os.path.realpath(place), self.revision

    @contextmanager
    def named(self, hint: str = "Name it with --dense MODEL, as it is called from here.") -> Iterator[None]:
        """Say which record named a model that cannot be had."""
        try:
            yield
        except ModelError as error:
            if self.said_by == "--dense":
                raise
            was = "file" if self.name.endswith(".gguf") else "folder"
            began = "" if self.called is None else f"; it was the {was} {self.name} where the run began"
            raise ModelError(
                f"{self.said_by} names {self.called or self.name!r} as the dense model{began}: {error.message}",
                hint=hint,
            ) from error


def dense_model(folder: Path, given: str | None) -> DenseModel:
    """Which dense model a saved one is compared with: the one given, or the one that its record names.

    Args:
        given: what ``--dense`` says.

    Raises:
        ConfigError: nothing is given, and there is no record, or a damaged one.
    """
    if given is not None:
        return DenseModel(given, None, "--dense")
    recorded = recorded_dense_model(folder)
    if recorded is not None:
        return recorded
    raise ConfigError(
        f"cannot tell which dense model {str(folder)!r} was made from: it holds no {FILE} that names one",
        hint="Name it with --dense MODEL, e.g. --dense demo.",
    )


def recorded_dense_model(folder: Path) -> DenseModel | None:
    """The dense model that the record of a saved one names, by a name that leads to it from here.

    Returns:
        the model; ``None`` where there is no record, or one that names none.
    """
    file = folder / FILE
    origin = RECORD.read(file) if file.is_file() else Origin()
    if origin.dense is None:
        return None
    model = DenseModel(origin.dense, origin.revision, str(file))
    here, there = Path(origin.dense).expanduser(), Path(origin.place or "").expanduser()
    # Where its place is gone, both may have been moved, the saved model and the dense one.
    if origin.place is None or (here.exists() and (not there.exists() or here.samefile(there))):
        return model
    return replace(model, name=origin.place, called=origin.dense)


def texts_of(folder: Path) -> Mapping[Use, Corpora]:
    """The texts that a saved model was made from; empty where there is no record that can be read."""
    with suppress(ConfigError):
        return RECORD.read(folder / FILE).texts
    return {}


def absolute_name(name: str) -> str | None:
    """The absolute path of a model that is a folder or a file; ``None`` for the demo and for models of the hub."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name != "demo" and (path.exists() or path.is_absolute()) else None


def recorded_name(name: str) -> str | None:
    """As `absolute_name`, with ``~`` for the home folder: whoever gets a saved model gets its record, too."""
    place = absolute_name(name)
    return place and re.sub(f"^{re.escape(os.path.expanduser('~'))}(?=/)", "~", place)


def hub_base(name: str) -> str | None:
    """The Hub id of a dense model by its ``model.name``; ``None`` for files of the user's own."""
    if name == "demo":
        return DEMO_BASE
    return name if "/" in name and is_hub_id(name) and not Path(name).exists() else None
