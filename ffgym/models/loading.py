"""Loading: a model and its tokenizer from the embedded default, a folder, a ``.gguf`` file, or the Hugging Face hub.

Only safetensors are read, code from a checkpoint is never run, and a checkpoint that lacks weights is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ffgym.data.assets import SMOLLM2, fetch
from ffgym.data.cache import sha256
from ffgym.data.hub import is_hub_id
from ffgym.errors import ModelError
from ffgym.models.checkpoint import (
    MOST_LAYERS,
    check_complete,
    check_config,
    check_folder,
    check_sizes,
    read_config,
    weight_files,
    weights_on_disk,
)
from ffgym.models.dequantise import converted, dequantised, refuse_what_would_be_lost
from ffgym.models.families import register_saved
from ffgym.models.hub import check_hub_config, hub_folder, only_cached
from ffgym.models.loading_errors import explained
from ffgym.models.placement import choose_device, choose_dtype, devices_of, move, named_dtype, narrower_dtype
from ffgym.models.stream import LayerStream, streamed_model
from ffgym.models.towers import BY_ITSELF, PROCESSOR_FILES, Towers, auto_class, has_towers, text_model_of

logger = logging.getLogger("ffgym")

DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_DESCRIPTION = "SmolLM2-135M-Instruct, dequantised from Q4_1 GGUF"
DEMO_SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "float16",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM ready to be measured, with its tokenizer."""

    model: Any  # the transformers model, in eval mode, without gradients
    tokenizer: Any
    name: str  # what the user called it
    description: str  # one line for tables: what it is and where it came from
    dtype: torch.dtype
    device: torch.device  # where its first parameter lies
    # reads the decoder layers, which are then on the meta device; None where they are in memory
    stream: LayerStream | None = None
    towers: Towers | None = None  # the checkpoint that the model is the text model of; None where it is the whole
    # the checkpoint's dtype, where that is narrower: what was cut or trained is saved in it
    saved_dtype: torch.dtype | None = None

    @property
    def dtype_name(self) -> str:
        """``"bfloat16"``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def context_limit(self) -> int:
        """The longest window that the model takes, in tokens."""
        return int(self.model.config.max_position_embeddings)

    def check_ids(self, ids: torch.Tensor, what: str) -> None:
        """Refuse token ids that the embedding has no row for; a GPU could not be used any more after one.

        Args:
            ids: integers, of any shape, not empty.
            what: the text that they are of.

        Raises:
            ModelError: the tokenizer is not the model's.
        """
        rows = self.model.get_input_embeddings().num_embeddings
        if (largest := int(ids.max())) >= rows:
            raise ModelError(
                f"token {largest} of {what}: the embedding of model {self.name!r} has {rows} rows, "
                "its tokenizer has more",
                hint="Put the tokenizer that the model was trained with into its folder.",
            )


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    any_family: bool = False,
    streamed: bool = False,
) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    Args:
        name: ``"demo"``, a ``.gguf`` file, a folder, or a hub id.
        revision: branch, tag or commit of a hub model.
        dtype: ``"auto"`` (see :mod:`ffgym.models.placement`), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"auto"`` (cuda where there is one, else cpu), a torch device, or ``"balanced"`` to spread the layers
            over all GPUs.
        any_family: also load architectures that cannot be pruned, as long as they are measured right.
        streamed: leave the decoder layers in the checkpoint, for models larger than memory.

    Raises:
        ModelError: a checkpoint that is missing, damaged, incomplete, pickled, of another family or needs code of its
            own, a hub that cannot be reached, an unknown dtype or device. The hint says what to do.
        AssetError: the embedded default could not be fetched.
        OutputError: the cache cannot be written.
    """
    target = choose_device(device)
    chosen = choose_dtype(target) if dtype == "auto" else named_dtype(dtype)
    logger.info("dtype %s on %s%s", str(chosen).removeprefix("torch."), target, " (auto)" if dtype == "auto" else "")
    _check_revision(name, revision)
    local, description = _locate(name, any_family=any_family)
    offline = local is None and only_cached(name, revision)
    if local is None:
        config = check_hub_config(name, revision, any_family=any_family, local_files_only=offline)
    else:
        config = check_sizes(name, local, any_family=any_family)
    saved = narrower_dtype(_dtype_in(config) or (local and weights_on_disk(local)[1]), chosen)
    if has_towers(config) and (streamed or device == "balanced"):
        raise ModelError(
            f"model {name!r} has several towers, so that it is loaded into memory as a whole: its layers can neither be"
            " streamed nor spread over GPUs",
            hint=f"Use model.placement resident and one device, or a larger machine. {BY_ITSELF}",
        )
    if streamed:
        folder = local or hub_folder(name, revision, local_files_only=offline)
        if local is None:
            check_sizes(name, folder, any_family=any_family)
            description += f" at {folder.name[:12]}"  # the folder is named by the commit
        model, stream = streamed_model(name, folder, chosen, target)
        tokenizer = load_tokenizer(folder)
        return LoadedModel(model, tokenizer, name, description, chosen, target, stream, saved_dtype=saved)
    place = str(local or name)
    origin = {"revision": revision or "main", "local_files_only": offline, "trust_remote_code": False}
    with explained(place, name, only_cached=offline):
        model, report = auto_class(config).from_pretrained(
            place,
            dtype=chosen,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            return_dict=True,  # whatever config.json says: results are read by name
            output_attentions=False,
            device_map="balanced" if device == "balanced" else None,
            **origin,
        )
    check_complete(name, model, report)
    tokenizer = _tokenizer(place, name, **origin) if local is None else load_tokenizer(local)
    model.eval()
    model.requires_grad_(False)
    towers = None
    if has_towers(config):
        model, towers = text_model_of(model, name, _processor_files(place, revision, offline))
    if device != "balanced":
        model = move(model, target)
    elif any(place.type != "cuda" for place in devices_of(model)):  # "meta": on the disk, brought in for each call
        raise ModelError(
            f"model {name!r} does not fit the GPUs: part of it would stay on the CPU or the disk,"
            " where it cannot be pruned",
            hint="Use more or larger GPUs, model.dtype bfloat16, or model.device cpu.",
        )
    if local is None:
        description += f" at {checkpoint_folder(name, revision=revision).name[:12]}"
    if towers is not None:
        description += ", its text model"
    first = next(model.parameters())
    return LoadedModel(model, tokenizer, name, description, first.dtype, first.device, towers=towers, saved_dtype=saved)


def check_source(name: str, *, revision: str | None = None) -> None:
    """Raise what :func:`load` would raise before it reads weights, so that no model waits in vain for another."""
    local, _ = _locate(name)
    if local is None:
        _hub_config(name, revision, any_family=True)


def checkpoint_folder(name: str, *, revision: str | None = None) -> Path:
    """The folder that a model's files are read from: of a hub model, its snapshot in the hub's cache.

    Args:
        name: see :func:`load`, which must have loaded it once.
    """
    from transformers.utils import cached_file

    local, _ = _locate(name)
    return local or Path(cached_file(name, "config.json", revision=revision or "main", local_files_only=True)).parent


def config_of(name: str, *, revision: str | None = None) -> Any:
    """The config of whatever `load` takes.

    No weights are read or downloaded, and a folder need not hold any; the shapes of those that it holds are checked.

    Raises:
        ModelError: as `load`, as far as a config shows it.
    """
    from transformers import AutoConfig

    _check_revision(name, revision)
    path = Path(name).expanduser()
    options: dict[str, Any] = {}
    if name == "demo":
        return AutoConfig.for_model("llama", **DEMO_SIZES)
    is_gguf = path.suffix.lower() == ".gguf" and path.is_file()
    if is_gguf and (folder := converted(path)) is not None:
        path = folder
    if path.is_dir():
        source, content = str(path), read_config(path)
        if all(file.is_file() for file in weight_files(path)):
            check_sizes(name, path, any_family=False)
        else:  # the config and an index of weights are enough for a plan
            check_config(name, content, any_family=False, depth=MOST_LAYERS)
    elif is_gguf:
        refuse_what_would_be_lost(path, any_family=False)
        source, options = str(path.parent), {"gguf_file": path.name}
    else:
        _locate(name)
        return _hub_config(name, revision, any_family=False)
    return _config(source, name, options)


def context_limit(name: str, *, revision: str | None = None) -> int:
    """The longest window that whatever `load` takes would take, in tokens, by its config alone; see `config_of`."""
    return int(config_of(name, revision=revision).get_text_config().max_position_embeddings)


def check_weights(name: str) -> None:
    """Refuse a model that is a folder without all of its weights; none is read."""
    path = Path(name).expanduser()
    if name != "demo" and path.is_dir():
        check_folder(path)


def _hub_config(name: str, revision: str | None, *, any_family: bool) -> Any:
    offline = only_cached(name, revision)
    check_hub_config(name, revision, any_family=any_family, local_files_only=offline)
    return _config(name, name, {"revision": revision or "main", "local_files_only": offline})


def _config(source: str, name: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    with explained(source, name):
        return AutoConfig.from_pretrained(source, **options, trust_remote_code=False)


def load_config(folder: Path) -> Any:
    """The config of a folder that holds a language model, without its weights.

    Raises:
        ModelError: a folder that lacks a part, a config that cannot be read, or one of several towers.
    """
    content = check_folder(folder)
    if content.get("text_config") is not None:
        raise ModelError(
            f"the model in {str(folder)!r}, of type {content.get('model_type')!r}, has several towers, and only"
            " language models can be exported or served",
            hint=BY_ITSELF,
        )
    register_saved(content)
    return _config(str(folder), str(folder), {})


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder that holds a model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"folder {str(folder)!r} holds no tokenizer",
            hint="Copy tokenizer.json and tokenizer_config.json of the model that it comes from into it.",
        )
    return _tokenizer(str(folder), str(folder), trust_remote_code=False)


def _dtype_in(config: Mapping[str, Any]) -> str | None:
    """The dtype of a checkpoint by its ``config.json``: that of the whole, or where it says none, of its text model."""
    parts = (config, config.get("text_config") or {})
    return next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)


def _check_revision(name: str, revision: str | None) -> None:
    """Refuse the revision of what is on this machine."""
    if revision is not None and (name == "demo" or Path(name).expanduser().exists()):
        raise ModelError(
            f"model.revision = {revision!r} only applies to hub models, and {name!r} is none",
            hint="Leave model.revision out.",
        )


def _locate(name: str, *, any_family: bool = True) -> tuple[Path | None, str]:
    """The folder of a model, ``None`` for one of the hub, and a line for tables."""
    if name == "demo":
        file = next(fetch(SMOLLM2).glob("*.gguf"))
        return dequantised(file, SMOLLM2.sha256), DEMO_DESCRIPTION
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"model file {name!r} does not exist", hint="Check the path.")
        folder = dequantised(path, sha256(path), any_family=any_family)
        return folder, f"{path.name}, dequantised from GGUF"
    if path.is_dir():
        check_folder(path)
        return path, f"folder {path.resolve().name}"
    if path.exists():
        raise ModelError(f"model {name!r} is a file", hint="Name the folder that holds it, a .gguf file, or a hub id.")
    if is_hub_id(name):
        return None, f"hub model {name}"
    raise ModelError(
        f"model folder {name!r} does not exist", hint="Check the path, or name 'demo', a .gguf file or a hub id."
    )


def _processor_files(source: str, revision: str | None, offline: bool) -> tuple[Path, ...]:
    """What a checkpoint of several towers holds for its images; of a hub model, downloaded."""
    from transformers.utils import cached_file

    options = {
        "revision": revision or "main",
        "local_files_only": offline,
        "_raise_exceptions_for_missing_entries": False,
    }
    found = (cached_file(source, name, **options) for name in PROCESSOR_FILES)
    return tuple(Path(file) for file in found if file is not None)


def _tokenizer(source: str, name: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    with explained(source, name):
        return AutoTokenizer.from_pretrained(source, **options)
