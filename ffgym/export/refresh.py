"""Bring what lies beside the weights of a saved model up to date: its class file and its config, never its weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoConfig

from ffgym.errors import ModelError
from ffgym.files import COPY, check_writable, write_text
from ffgym.models.checkpoint import model_folder
from ffgym.models.families import register_saved
from ffgym.models.loading_errors import explained
from ffgym.models.modeling_ffgym import PREFIX
from ffgym.plugins.architectures import MODEL_CONFIG, check_architecture


def refresh(folder: Path) -> list[Path]:
    """Replace the class file and the config of a model that an earlier ffgym saved by those of today.

    Models that were saved before name no class for `AutoModel`, which servers such as vLLM ask for.

    Args:
        folder: the model's; or a run's, whose model is meant.

    Returns:
        the files that were written: those that were not of today.

    Raises:
        ModelError: no model, none with layers of different sizes, of a family that is not there, or a damaged config.
        OutputError: the folder cannot be written.
    """
    place = model_folder(folder)
    config = MODEL_CONFIG.read(place / "config.json")
    model_type = str(config.get("model_type"))
    if not model_type.startswith(PREFIX):
        raise ModelError(
            f"the model in {place} is of the stock architecture {model_type!r}: nothing lies beside its weights",
            hint="Only models with layers of different sizes have a class file.",
        )
    check_architecture(config)
    with tempfile.TemporaryDirectory() as scratch:
        renewed = _renewed(place, Path(scratch))
        old = [made for made in renewed if not _is_same(place / made.name, made)]
        if old:
            check_writable(place / "config.json", COPY)
        for made in reversed(old):  # the class file first: config.json names classes in it
            write_text(place / made.name, made.read_text(encoding="utf-8"))
        return [place / made.name for made in old]


def is_current(folder: Path) -> bool:
    """Whether the class file beside the weights of a saved model is the one that this ffgym writes, byte for byte."""
    with tempfile.TemporaryDirectory() as scratch:
        code = [made for made in _renewed(folder, Path(scratch)) if made.suffix == ".py"]
        return all(_is_same(folder / made.name, made) for made in code)


def _is_same(there: Path, made: Path) -> bool:
    return there.is_file() and there.read_bytes() == made.read_bytes()


def _renewed(folder: Path, scratch: Path) -> list[Path]:
    """Config and class file as this ffgym writes them, the config first."""
    register_saved(MODEL_CONFIG.read(folder / "config.json"))
    with explained(str(folder), str(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.save_pretrained(scratch)
    return sorted(scratch.iterdir())
