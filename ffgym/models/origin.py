"""Where a saved model is, which dense model it was made from, and what its files hold."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel

from ffgym.config.mixture import Corpora
from ffgym.data.hub import is_hub_id
from ffgym.errors import ConfigError, ModelError
from ffgym.files import FileFormat
from ffgym.models.checkpoint import models_of_run, weight_files, weight_tensors
from ffgym.models.loading import DEMO_BASE
from ffgym.models.loading_errors import AGAIN

# The names in a safetensors header of what torch calls otherwise.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


class _RecordedModel(BaseModel):
    name: str | None = None
    revision: str | None = None


class _Record(BaseModel):
    model: _RecordedModel = _RecordedModel()


class _Began(BaseModel):
    dense: str | None = None


class _RecordedTexts(BaseModel):
    calibration: Corpora = ()
    search: Corpora = ()


class _Named(BaseModel):
    name: str = ""
    corpus: str = ""


class _Making(BaseModel):
    data: _RecordedTexts = _RecordedTexts()
    agent: _Named = _Named()
    recover: _Named = _Named()


SAY_WHICH = "Name the dense model with --dense MODEL."
RECORD = FileFormat("record of a dense model", _Record, ConfigError, SAY_WHICH)
MAKING = FileFormat("record of a model's texts", _Making, ConfigError, SAY_WHICH)
BEGAN = FileFormat("record of a run's sessions", _Began, ConfigError, SAY_WHICH)
LICENSE_KEYS = ("license", "license_name", "license_link")
CARD = FileFormat("model card", str, ModelError, "Write it again as UTF-8 text, or delete it.")


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


def model_folder(folder: Path) -> Path:
    """The folder of a saved model: the one given, or ``model`` in the folder of a run that holds no other.

    Raises:
        ModelError: it is a file, or it holds no model, or it is that of a run and holds several.
    """
    place = folder.expanduser()
    if not place.exists():
        raise ModelError(f"{str(folder)!r} does not exist", hint="Name the folder of a saved model, e.g. runs/x/model.")
    if place.is_file():
        raise ModelError(
            f"{str(folder)!r} is a file, not the folder of a saved model",
            hint="Name the folder that it lies in or was made from, e.g. runs/x/model. ffgym makes GGUF files itself.",
        )
    if (place / "config.json").is_file():
        return place
    if models := models_of_run(place):
        if models == ["model"]:
            return place / "model"
        raise ModelError(
            f"{str(folder)!r} holds several models: {', '.join(models)}", hint=f"Name one, e.g. {folder / models[0]}."
        )
    if (place / "config.toml").is_file():
        go_on = f"ffgym run --resume {shlex.quote(str(folder))}"
        if (place / "report.json").is_file():
            go_on += " --set output.save_model=true"
        raise ModelError(f"the run in {str(folder)!r} has saved no model", hint=f"Continue it: {go_on}")
    raise ModelError(
        f"{str(folder)!r} holds no model: config.json is missing, also from model/ in it",
        hint="Name the folder of a saved model, e.g. runs/x/model.",
    )


def dense_model(folder: Path, given: str | None) -> DenseModel:
    """Which dense model a saved one is compared with: the one given, or the one that the folder's record names.

    The record is ``config.toml`` in it, which runs and trainings write, or in the folder of the run that saved it, or
    else ``base_model`` in its model card. ``run.json`` next to it says where a model lies that is a folder or a file.

    Args:
        given: what ``--dense`` says.

    Raises:
        ConfigError: nothing is given, and there is no record.
    """
    if given is not None:
        return DenseModel(given, None, "--dense")
    recorded = recorded_dense_model(folder)
    if recorded is not None:
        return recorded
    raise ConfigError(
        f"cannot tell which dense model {str(folder)!r} was made from: there is no config.toml in it or beside it, "
        "and no base_model in its README.md",
        hint="Name it with --dense MODEL, e.g. --dense demo.",
    )


def record_files(folder: Path) -> tuple[Path, Path]:
    """Where the configuration of the training or the run that saved a model may lie: in its folder, or beside it."""
    return folder / "config.toml", folder.resolve().parent / "config.toml"


def recorded_dense_model(folder: Path) -> DenseModel | None:
    """The dense model that the record of a saved one names; ``None`` where there is no record."""
    own, run = record_files(folder)
    for file in (own, run):
        model = RECORD.read(file).model if file.is_file() else _RecordedModel()
        # A run writes every key; somebody else may have left out a default. Training leaves the name out where it was
        # not known.
        if model.name is not None or (file == run and file.is_file()):
            return _found_again(DenseModel(model.name or "demo", model.revision or None, str(file)), file)
    card = folder / "README.md"
    base = _line(_front_matter(card), "base_model")
    return None if base is None else DenseModel("demo" if base == DEMO_BASE else base, None, str(card))


def texts_of(folder: Path) -> dict[str, Corpora]:
    """The text that a saved model was ``"calibrated"``, ``"searched"`` and ``"trained"`` on, by what its record says.

    Empty where there is no record that can be read. A ``config.toml`` beside a model that no run saved is not its own.
    """
    own, run = record_files(folder)
    files = [own, run] if folder.resolve().name in models_of_run(run.parent) else [own]
    file = next((file for file in files if file.is_file()), None)
    try:
        made = _Making() if file is None else MAKING.read(file)
    except ConfigError:
        return {}
    texts = {"calibrated": made.data.calibration, "searched": made.data.search}
    if made.agent.name == "one-shot":
        del texts["searched"]
    if (folder / "recovery.json").is_file():
        texts["trained"] = made.recover.corpus or made.data.calibration
    return texts


def _found_again(model: DenseModel, record: Path) -> DenseModel:
    """A model that was a folder or a file, by its place when the run began, unless its name leads to it from here."""
    began, here = record.with_name("run.json"), Path(model.name).expanduser()
    place = BEGAN.read(began).dense if began.is_file() else None
    there = Path(place or "").expanduser()
    # Both may have been moved, the run and its model.
    if place is None or (here.exists() and (not there.exists() or here.samefile(there))):
        return model
    return replace(model, name=place, called=model.name)


def absolute_name(name: str) -> str | None:
    """The absolute path of a model that is a folder or a file; ``None`` for the demo and for models of the hub."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name != "demo" and (path.exists() or path.is_absolute()) else None


def recorded_name(name: str) -> str | None:
    """As `absolute_name`, with ``~`` for the home folder: whoever gets a saved model gets its record, too."""
    place = absolute_name(name)
    return place and re.sub(f"^{re.escape(os.path.expanduser('~'))}(?=/)", "~", place)


def stated_license(folder: Path) -> dict[str, str]:
    """What the card of a model says of its licence, by the Hub's keys; empty where there is none that can be read."""
    try:
        front = _front_matter(folder / "README.md")
    except ModelError:
        return {}
    found = {key: _line(front, key) for key in LICENSE_KEYS}
    return {key: value for key, value in found.items() if value is not None}


def hub_base(name: str) -> str | None:
    """The Hub id of a dense model by its ``model.name``; ``None`` for files of the user's own."""
    if name == "demo":
        return DEMO_BASE
    return name if "/" in name and is_hub_id(name) and not Path(name).exists() else None


def weights_on_disk(folder: Path) -> tuple[int, str]:
    """Bytes of a checkpoint's safetensors files, those that are loaded, and what dtype most numbers in them have.

    Raises:
        ModelError: there are none, or one is damaged or missing.
    """
    tensors = weight_tensors(folder)
    if not tensors:
        raise ModelError(f"{str(folder)!r} holds no .safetensors file", hint=AGAIN)
    numbers: Counter[str] = Counter()
    for name, file in tensors.items():
        numbers[file.dtype(name)] += math.prod(file.shape(name))
    dtype = numbers.most_common(1)[0][0]
    return sum(file.stat().st_size for file in weight_files(folder)), DTYPES.get(dtype, dtype)


def _front_matter(card: Path) -> str:
    return split_card(CARD.text(card))[0] if card.is_file() else ""


def split_card(text: str) -> tuple[str, str]:
    """The YAML front matter of a model card with its dashes, empty where there is none, and the rest."""
    found = re.match(r"\s*(---\n.*?^---)$(.*)", text, flags=re.DOTALL | re.MULTILINE)
    return (found[1], found[2].strip()) if found else ("", text.strip())


def _line(front: str, key: str) -> str | None:
    """What the front matter of a model card says for a key in one line; ``None`` also for a list."""
    line = next((line for line in front.split("\n") if line.startswith(f"{key}:")), "")
    value = line.removeprefix(f"{key}:").partition(" #")[0].strip()
    return None if value.startswith("[") else value.strip("\"'") or None
