"""The Hugging Face hub, and its cache where it cannot be reached."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ffgym.data.hub import hub_error
from ffgym.errors import first_line
from ffgym.models.checkpoint import MOST_LAYERS, check_config, weight_files
from ffgym.models.loading_errors import loading_error, not_from_hub
from ffgym.plugins.architectures import MODEL_CONFIG


def only_cached(name: str, revision: str | None) -> bool:
    """Whether the hub cannot be reached and the model has to come from its cache.

    One short request finds out. transformers would ask for every file, several times each, before it gives up.

    Raises:
        ModelError: the hub cannot be reached, and its cache does not have the model.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    error = hub_error("model", name, revision)
    if error is None or isinstance(error, HfHubHTTPError):  # what is wrong with the name, transformers says
        return False
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision or "main"), str):
        return True
    raise not_from_hub(name, f"the hub cannot be reached ({first_line(error)})") from error


def check_hub_config(name: str, revision: str | None, *, any_family: bool, local_files_only: bool) -> dict[str, Any]:
    """Refuse what a hub model's config says before its weights are downloaded.

    Returns:
        The content of its ``config.json``; nothing where there is none.
    """
    from transformers.utils import cached_file

    try:
        file = cached_file(name, "config.json", revision=revision or "main", local_files_only=local_files_only)
    except OSError:  # loading says what is wrong
        return {}
    config = MODEL_CONFIG.read(Path(file))
    check_config(name, config, any_family=any_family, depth=MOST_LAYERS)
    return config


def hub_folder(name: str, revision: str | None, *, local_files_only: bool) -> Path:
    """The folder in the hub's cache that holds a model's files, downloaded where they are not there.

    Only weights that transformers would read are: many repositories hold them once more, in other layouts.

    Raises:
        ModelError: the hub has no such model, or none of its weights are safetensors.
    """
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, name, local_files_only=local_files_only)
    try:
        folder = Path(fetch(revision=revision, allow_patterns=["*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]))
        weights = [file.name for file in weight_files(folder)] or ["model.safetensors"]
        fetch(revision=folder.name, allow_patterns=weights)  # of the same commit
        if not weight_files(folder):
            raise OSError("there is no model.safetensors")
        return folder
    except Exception as error:  # as many types as there are ways to fail
        raise loading_error(error, name, name, only_cached=local_files_only) from error


def own_card(name: str, revision: str | None) -> Path | None:
    """The README.md that a model's folder or its page on the hub has; ``None`` where none can be had."""
    from transformers.utils import cached_file

    options = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    with suppress(OSError):  # no hub id, such as a .gguf file, or no connection
        if found := cached_file(str(Path(name).expanduser()), "README.md", **options):
            return Path(found)
    return None
