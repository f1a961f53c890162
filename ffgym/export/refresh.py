"""Bring what lies beside the weights of a saved model up to date: its class file and its config, never its weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoConfig

from ffgym.errors import ModelError
from ffgym.files import write_text
from ffgym.models.checkpoint import MODEL_CONFIG
from ffgym.models.families import register_saved
from ffgym.models.modeling_ffgym import PREFIX
from ffgym.models.origin import model_folder


def refresh(folder: Path) -> list[Path]:
    """Replace the class file and the config of a model that an earlier ffgym saved by those of today.

    Models that were saved before name no class for `AutoModel`, which servers such as vLLM ask for.

    Args:
        folder: the model's; or a run's, whose model is meant.

    Returns:
        the files that were written.

    Raises:
        ModelError: no model, none with layers of different sizes, or of a family that is not there.
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
    register_saved(config)
    with tempfile.TemporaryDirectory() as scratch:
        AutoConfig.from_pretrained(place, trust_remote_code=False).save_pretrained(scratch)
        written = [place / made.name for made in sorted(Path(scratch).iterdir())]
        for path in reversed(written):  # the class file first: the config names classes in it
            write_text(path, (Path(scratch) / path.name).read_text(encoding="utf-8"))
    return written
