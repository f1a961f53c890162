"""Whether a model's architecture is supported, by its ``config.json``; torch and transformers are not imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ffgym.errors import ModelError, UnknownNameError
from ffgym.files import FileFormat
from ffgym.plugins.built_ins import BUILTINS
from ffgym.plugins.manager import get_class

SAVED = "ffgym_"  # what the model_type of a pruned model begins with
MODEL_CONFIG = FileFormat("model configuration", dict[str, Any], ModelError, "Write or download the model again.")

# What configs call the number of their experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_folder_architecture(name: str) -> None:
    """Check the ``config.json`` of a model that is a folder; see :func:`check_architecture`."""
    file = Path(name).expanduser() / "config.json"
    if name != "demo" and file.is_file():
        check_architecture(MODEL_CONFIG.read(file))


def check_architecture(config: Mapping[str, Any]) -> None:
    """Refuse a ``config.json`` of no supported family; of a checkpoint of several towers, by its text model.

    Raises:
        ModelError: names the architecture, the nearest supported one, and all of them.
    """
    kind, text = config.get("model_type"), config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else kind
    if not isinstance(inner, str) or ("auto_map" in config and not inner.startswith(SAVED)):
        return  # loading says what is wrong
    try:
        family_name(inner)
    except ModelError as error:
        if isinstance(text, Mapping):
            message = f"{kind!r} is a checkpoint of several towers, and the one for text, {inner!r}, is of no supported"
            raise ModelError(f"{message} family", hint=error.hint) from None
        if any(isinstance(config.get(name), int) for name in EXPERT_COUNTS):
            message = f"architecture {kind!r} has mixtures of experts of a kind that ffgym does not know"
            raise ModelError(message, hint=f"{error.hint} `ffgym eval` measures any.") from None
        raise


def family_name(model_type: str) -> str:
    """The name of the family of a config's ``model_type``, of a dense checkpoint or of one that ffgym saved.

    Raises:
        ModelError: the architecture is not supported; names the nearest one that is, and all of them.
    """
    name = model_type.removeprefix(SAVED)
    if name not in BUILTINS["family"]:
        try:
            get_class("family", name)
        except UnknownNameError as error:
            raise ModelError(
                f"architecture {model_type!r} is not supported",
                hint=f"{error.hint} docs/models.md#adding-a-family shows how to add one: say what differs from Llama.",
            ) from None
    return name
