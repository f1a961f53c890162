"""A checkpoint's folder: which files hold its weights, and whether they are what its config says."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from ffgym.errors import ModelError
from ffgym.files import FileFormat
from ffgym.models.families import register_saved
from ffgym.models.loading_errors import AGAIN, explained, misfit, mxfp4, pickled
from ffgym.models.modeling_ffgym import PREFIX
from ffgym.models.towers import auto_class, check_towers
from ffgym.plugins.architectures import MODEL_CONFIG, check_architecture

LAYER = re.compile(r"(?:model\.)?(?:decoder\.)?layers\.(\d+)\.")
MOST_LAYERS = 10_000  # where no weights are there to count them
POSITIVE = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
NUMBERED_BLOCK = re.compile(r"[^\d]*?\.(?=\d+\.)")
ADAPTER = "adapter_config.json"
MERGE = "Merge it: merge_and_unload of PEFT's model, then save_pretrained into another folder"
PICKLED = ("*.bin", "*.pt", "*.pth")
# The names in a safetensors header of what torch calls otherwise.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
NAME_ONE = "Name the folder of a run or of a saved model, e.g. runs/x or runs/x/model."
MODEL_OF_RUN = re.compile(r"model(-[01]\.\d+)?(-recovered)*")

Shapes = dict[str, tuple[int, ...]]


class _WeightIndex(BaseModel):
    """Which file holds each weight."""

    weight_map: dict[str, str]


WEIGHT_INDEX = FileFormat("index of weights", _WeightIndex, ModelError, AGAIN)


class TensorFile:
    """A safetensors file whose tensors are read one at a time, also after it was deleted.

    It is read, not mapped, so that limits on a process's memory do not count pages that only pass through.

    Raises:
        SafetensorError, OSError: it is none, or cannot be read; from its methods, there is no tensor of this name.
    """

    def __init__(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt", backend="pread")
        self._file = file
        self.path = path
        self.names: tuple[str, ...] = tuple(file.keys())
        self.metadata: dict[str, str] = file.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors calls it, e.g. ``"BF16"``."""
        return str(self._file.get_slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU."""
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read: a folder may hold the weights in other layouts too.

    They are ``model.safetensors``, or what its index names, or, without either, all of them.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    return [folder / name for name in sorted(set(WEIGHT_INDEX.read(index).weight_map.values()))]


def weight_tensors(folder: Path) -> dict[str, TensorFile]:
    """The file of every tensor in a folder's weight files.

    Raises:
        ModelError: a file is damaged, incomplete or missing.
    """
    tensors: dict[str, TensorFile] = {}
    for path in weight_files(folder):
        try:
            file = TensorFile(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{str(path)!r} is damaged or incomplete: {error}", hint=AGAIN) from error
        tensors |= dict.fromkeys(file.names, file)
    return tensors


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


def models_of_run(folder: Path) -> list[str]:
    """Names of the models in the folder of a run: ``model``, or one for each budget; and what training made of them."""
    names = [path.parent.name for path in folder.glob("model*/config.json")]
    return sorted(filter(MODEL_OF_RUN.fullmatch, names))


def model_folder(folder: Path) -> Path:
    """The folder of a saved model: the one given, or ``model`` in the folder of a run that holds no other.

    Raises:
        ModelError: it is a file, or it holds no model, or it is that of a run and holds several.
    """
    place = folder.expanduser()
    if not place.exists():
        raise ModelError(f"{str(folder)!r} does not exist", hint=NAME_ONE)
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
        hint=NAME_ONE,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Content of the ``config.json`` in a folder."""
    config = folder / "config.json"
    if not config.is_file():
        if models := [repr(str(folder / name)) for name in models_of_run(folder)]:
            raise ModelError(f"{str(folder)!r} is the folder of a run", hint=f"Name {' or '.join(models)}.")
        if (folder / ADAPTER).is_file():
            raise ModelError(f"folder {str(folder)!r} holds an adapter without its model", hint=f"{MERGE}.")
        raise ModelError(
            f"folder {str(folder)!r} holds no model: config.json is missing",
            hint="Name a folder that save_pretrained wrote.",
        )
    return MODEL_CONFIG.read(config)


def check_folder(folder: Path) -> dict[str, Any]:
    """Say what a folder lacks before transformers says it at length; the content of its ``config.json``."""
    config = read_config(folder)
    if any(folder.glob("*.safetensors")):
        if lacking := [path.name for path in weight_files(folder) if not path.is_file()]:
            raise ModelError(f"folder {str(folder)!r} lacks {', '.join(lacking)}, which its index names", hint=AGAIN)
        return config
    if any(path for pattern in PICKLED for path in folder.glob(pattern)):
        raise pickled(str(folder), Path(f"{folder.resolve()}-safetensors"))
    raise ModelError(f"folder {str(folder)!r} holds no weights: there is no .safetensors file", hint=AGAIN)


def check_config(name: str, config: dict[str, Any], *, any_family: bool, depth: int) -> None:
    """Refuse a config of an unsupported family, of MXFP4 codes, of no layers or more than ``depth``, of no heads.

    A family of ours is registered.
    """
    register_saved(config)
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise misfit(name, f"text_config = {text!r} is no JSON object")
    if not any_family:
        check_architecture(config)
    quantisation = config.get("quantization_config")
    if not any_family and isinstance(quantisation, dict) and quantisation.get("quant_method") == "mxfp4":
        raise mxfp4(name)
    layers = (text or config).get("num_hidden_layers")
    if isinstance(layers, int) and not 0 < layers <= depth:
        allowed = f"not 1 to {depth:,}" if depth == MOST_LAYERS else f"and the checkpoint has {depth} layers"
        raise misfit(name, f"num_hidden_layers = {layers}, {allowed}")
    for key in () if any_family else POSITIVE:
        if isinstance(value := (text or config).get(key), int) and value < 1:
            raise misfit(name, f"{key} = {value}, and it should be 1 or more")
    if not any_family and text is not None and not str(config.get("model_type")).startswith(PREFIX):
        check_towers(config)


def check_sizes(name: str, folder: Path, *, any_family: bool) -> dict[str, Any]:
    """Compare a folder's config with the shapes in its weight files, before a model of the config's size is built.

    Returns:
        The content of ``config.json``.
    """
    from transformers import AutoConfig

    config = MODEL_CONFIG.read(folder / "config.json")
    if not any_family and (folder / ADAPTER).is_file():
        raise ModelError(
            f"folder {str(folder)!r} holds an adapter: where PEFT is installed, transformers puts it on the model that "
            f"{ADAPTER} names, and leaves out the weights beside it",
            hint=f"{MERGE}. If these weights hold it already, delete {ADAPTER}.",
        )
    shapes: Shapes = {key: file.shape(key) for key, file in weight_tensors(folder).items()}
    check_config(name, config, any_family=any_family, depth=depth_of(LAYER, shapes) or MOST_LAYERS)
    if any_family or "quantization_config" in config:  # names and shapes in the files may be others than the model's
        return config
    with explained(str(folder), name), torch.device("meta"):
        model = auto_class(config).from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    for key, tensor in sorted(model.state_dict().items()):
        if (in_file := shapes.get(key, tuple(tensor.shape))) != tuple(tensor.shape):
            raise misfit(name, f"{key} is {in_file} in the checkpoint and {tuple(tensor.shape)} by the config")
    return config


def depth_of(numbered: re.Pattern[str], names: Iterable[str]) -> int:
    """How many decoder layers there are by the names of their tensors."""
    return max((int(match[1]) + 1 for name in names if (match := numbered.match(name))), default=0)


def check_complete(name: str, model: Any, report: dict[str, Any]) -> None:
    """Refuse a model with weights that transformers made up, or left out because its config has no place for them."""
    for key, in_file, by_config in sorted(report["mismatched_keys"]):
        raise misfit(name, f"{key} is {tuple(in_file)} in the checkpoint and {tuple(by_config)} by the config")
    check_surplus(name, model, report["unexpected_keys"])
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"model {name!r} is incomplete: {len(missing)} weights are missing, {missing[0]} first", hint=AGAIN
        )


def check_surplus(name: str, model: Any, unexpected: Iterable[str]) -> None:
    """Refuse weights of the model's own numbered blocks that it has no place for.

    Weights elsewhere (a vision tower, old rotary buffers) do not matter.

    Args:
        unexpected: what the checkpoint holds and the model does not, by the model's way of naming.
    """
    blocks = {match[0] for key in model.state_dict() if (match := NUMBERED_BLOCK.match(key))}
    weights = (key for key in unexpected if key.endswith((".weight", ".bias")))
    surplus = sorted(key for key in weights if (match := NUMBERED_BLOCK.match(key)) and match[0] in blocks)
    if surplus:
        raise misfit(name, f"it has no place for {len(surplus)} weights of the checkpoint, {surplus[0]} first")
