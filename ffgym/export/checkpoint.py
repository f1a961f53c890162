"""Save a pruned model as a checkpoint that loads without ffgym: safetensors, its sizes, and the class beside them.

Where all layers have the same shape, the checkpoint can also be a stock one, which needs no class of its own.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import nn
from transformers.utils import CHAT_TEMPLATE_DIR

from ffgym.errors import ModelError, OutputError, first_line
from ffgym.files import replacing, write_text
from ffgym.models.cut import PrunableModel
from ffgym.models.loading_errors import quiet
from ffgym.models.origin import FILE, RECORD, Origin
from ffgym.models.towers import ABOUT_THE_SOURCE, PROCESSOR_FILES, Towers, filled
from ffgym.plugins.architectures import MODEL_CONFIG
from ffgym.report.card import LOAD_CODE
from ffgym.types import Kind

# What a saved model consists of, whatever its tokenizer; any other file in its folder is the user's own.
REPLACED = (
    *("config.json", "generation_config.json", "model*.safetensors*", "modeling_ffgym.py"),
    *("*token*.json", "tekken.json", "vocab.*", "merges.txt", "*.model", f"{CHAT_TEMPLATE_DIR}/", *PROCESSOR_FILES),
    *("README.md", "config.toml", "recovery.json", FILE),
)
KINDS: tuple[Kind, Kind] = ("attention", "mlp")


@dataclass(frozen=True)
class SavedModel:
    """What lies on the disk now."""

    path: Path
    parameters: int  # numbers in its safetensors files; tied weights count once

    @property
    def bytes(self) -> int:
        """Size of its safetensors files."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))


def save_pruned(
    prunable: PrunableModel,
    tokenizer: Any | None,
    directory: str | Path,
    *,
    card: str | None = None,
    files: Sequence[Path] = (),
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    stock: bool = False,
    towers: Towers | None = None,
    dtype: torch.dtype | None = None,
    origin: Origin | None = None,
) -> SavedModel:
    """Write a pruned model to a folder, whole or not at all.

    Args:
        prunable: as it is cut now. A model whose layers are not in memory is written with a layer to a file.
        tokenizer: saved beside it; ``None`` leaves it out.
        directory: the folder; its parents are created.
        card: text of the model card, Markdown.
        files: copied beside the weights.
        overwrite: replace a checkpoint that is there. A folder that holds anything else is never replaced.
        max_shard_size: weights beyond it are written as several files, e.g. ``"5GB"``.
        stock: write a stock checkpoint of the family; all layers must have kept the same shape.
        towers: what the model was taken out of: it is written with the model in it.
        dtype: of the weights in the files; ``None`` for the model's own.
        origin: what it was made from, written beside the weights; ``None`` leaves it out.

    Raises:
        OutputError: the folder is occupied, cannot be written, or the disk is full.
        ModelError: no checkpoint of this kind can say what was kept, or its generation config is invalid.
    """
    model = (stock_model if stock else uneven_model)(prunable)

    def write(model: Any, folder: Path) -> None:
        if prunable.source is not None:
            _save_by_layer(model, prunable, folder)
        else:
            model.save_pretrained(folder, max_shard_size=max_shard_size)

    return save_model(
        model,
        tokenizer,
        directory,
        card=card,
        files=files,
        overwrite=overwrite,
        towers=None if towers is None else towers.around(model, prunable.family),
        dtype=dtype,
        origin=origin,
        write=write,
    )


def save_model(
    model: Any,
    tokenizer: Any | None,
    directory: str | Path,
    *,
    card: str | None,
    files: Sequence[Path] = (),
    overwrite: bool = False,
    towers: Towers | None = None,
    dtype: torch.dtype | None = None,
    origin: Origin | None = None,
    write: Callable[[Any, Path], None] = lambda model, folder: model.save_pretrained(folder),
) -> SavedModel:
    """Write a model to a folder, whole or not at all; arguments and errors as in `save_pruned`.

    Args:
        model: of a class that ``save_pruned`` writes, which brings its own file along, or of a stock class.
        write: writes its weights, config and class to a folder.
    """
    place = Path(directory).expanduser().resolve()
    refuse_occupied(place, overwrite, files)
    if towers is not None:
        model, files = towers.whole, [*files, *towers.files]
    if dtype is not None:
        _convert(model, dtype)
    with replacing(place) as folder:
        folder.mkdir()
        with quiet():  # our own bar may be on the screen
            try:
                write(model, folder)
            except ValueError as error:  # e.g. of a generation config that was changed since it was loaded
                raise ModelError(
                    f"this model cannot be saved: {first_line(error)}",
                    hint="Correct what the message names, in model.generation_config for example, and save it again.",
                ) from error
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if origin is not None:
            RECORD.write(folder / FILE, origin)
    return SavedModel(place, sum(parameter.numel() for parameter in model.parameters()))


def _convert(model: Any, dtype: torch.dtype) -> None:
    """Give the model weights of a dtype; a model that it shares weights with keeps its own."""
    converted: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if weight not in converted:
                converted[weight] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            setattr(module, name, converted[weight])


def is_stock(model: Any) -> bool:
    """Whether a model is of one of transformers' own classes, which load its checkpoint without custom code."""
    return type(model).__module__.startswith("transformers.")


def _save_by_layer(pruned: Any, prunable: PrunableModel, folder: Path) -> None:
    """Do what ``pruned.save_pretrained(folder)`` does, one layer in memory at a time.

    Args:
        pruned: of the saved class; what is in no layer is in memory.
    """
    pruned.save_pretrained(folder, state_dict={})
    for empty in folder.glob("*.safetensors"):
        empty.unlink()
    tied = pruned.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(tied.items())}
    outline = {name: tensor.data for name, tensor in tied.items() if first[id(tensor)] == name}
    numbered = re.compile(re.escape(f"{prunable.family.decoder}.layers.") + r"(\d+)\.")

    def layer_of(name: str) -> int:
        match = numbered.match(name)
        return int(match[1]) if match else -1

    sizes = Counter[int]()
    for name, tensor in outline.items():
        sizes[layer_of(name)] += tensor.nbytes
    shards = split_torch_state_dict_into_shards(
        {name: tensor.to("meta") for name, tensor in outline.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max(size for index, size in sizes.items() if index >= 0),
    )
    for file, names in shards.filename_to_tensors.items():
        content: dict[str, torch.Tensor] = {}
        for index, group in itertools.groupby(names, layer_of):
            with nullcontext() if index < 0 else prunable.layer(index):
                known = _checkpoint_weights(prunable)
                for name in group:
                    tensor = known.get(name, outline[name])
                    content[name] = tensor.to("cpu", outline[name].dtype, copy=True).contiguous()
        save_file(content, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        numbers = {"total_parameters": sum(tensor.numel() for tensor in outline.values()), **shards.metadata}
        index_file = {"metadata": numbers, "weight_map": shards.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index_file, indent=2, sort_keys=True) + "\n")


def load_line(directory: Path) -> str:
    """The one line of Python that loads a saved model, in a process that need not have ffgym."""
    loader, options = _loader(directory)
    return f"from transformers import {loader}; model = {loader}.from_pretrained({str(directory)!r}{options})"


def load_code(directory: Path) -> str:
    """Python that loads a saved model and its tokenizer."""
    loader, options = _loader(directory)
    return LOAD_CODE.format(loader=loader, folder=str(directory), options=options)


def _loader(directory: Path) -> tuple[str, str]:
    """The class that loads a saved model, and further arguments."""
    config = MODEL_CONFIG.read(directory / "config.json")
    loader = f"AutoModelFor{'CausalLM' if config.get('text_config') is None else 'ImageTextToText'}"
    return loader, ", trust_remote_code=True" if "auto_map" in config else ""


def uneven_model(prunable: PrunableModel) -> Any:
    """The same weights in the class that a saved model is loaded with. Nothing is copied; it is made to be saved.

    Returns:
        The model. Buffers that are not part of a checkpoint are on the meta device, so it cannot be run.

    Raises:
        ModelError: no model can keep this, e.g. no attention in the first layer.
    """
    config_class, model_class, _ = prunable.family.saved_classes()
    sizes = _sizes_per_layer(prunable)
    for index, size in enumerate(sizes):
        halves = zip(KINDS, prunable.halves[2 * index : 2 * index + 2], strict=True)
        if biased := [kind for kind, half in halves if half.new_bias_params()]:
            size["consumer_bias"] = biased
    with _named_misfits():
        with torch.device("meta"):
            config = config_class(**_settings(prunable.model), per_layer_config=dict(enumerate(sizes)))
            pruned = model_class(config)
        return filled(pruned, _checkpoint_weights(prunable), prunable.model)


def stock_model(prunable: PrunableModel) -> Any:
    """The same weights in the family's stock class, with a config that says the one shape of all layers.

    Biases that calibration gave the consumers switch on the config's biases of that half, where the family has such a
    switch; the half's other linears get zeros then, so the function is the same.

    Returns:
        The model. Buffers that are not part of a checkpoint are on the meta device, so it cannot be run.

    Raises:
        ModelError: the layers differ, or the stock classes do not take this shape.
    """
    model = prunable.model
    settings = _settings(model) | _shared_sizes(prunable)
    for place, kind in enumerate(KINDS):
        if any(half.new_bias_params() for half in prunable.halves[place::2]):
            settings[prunable.family.bias_switch(kind)] = True
    weights: dict[str, torch.Tensor] = dict(model.state_dict())
    with _named_misfits():
        with torch.device("meta"):
            pruned = type(model)(type(model.config)(**settings))
        for name, parameter in pruned.state_dict().items():
            if name.endswith(".bias") and name not in weights:
                weights[name] = torch.zeros(parameter.shape, dtype=model.dtype)
        return filled(pruned, weights, model)


@contextmanager
def _named_misfits() -> Iterator[None]:
    """Turn what transformers says of sizes that do not fit together into a `ModelError`."""
    try:
        yield
    except (RuntimeError, ValueError, StrictDataclassError) as error:
        raise ModelError(
            f"this model cannot be saved as a checkpoint: {first_line(error)}",
            hint="Prune it to other sizes, e.g. with --set prune.min_units=1.",
        ) from error


def _settings(model: Any) -> dict[str, Any]:
    """The model's own settings; whether its output matrix is the embedding is seen from the weights.

    A checkpoint that holds both keeps both, whatever its config says.
    """
    settings = {name: value for name, value in model.config.to_dict().items() if name not in ABOUT_THE_SOURCE}
    if model.config.tie_word_embeddings:
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        settings["tie_word_embeddings"] = head is embedding or torch.equal(head.to(embedding.device), embedding)
    return settings


def _shared_sizes(prunable: PrunableModel) -> dict[str, Any]:
    """What a stock config says about all layers: heads, KV heads, channels, and the width of a head."""
    family = prunable.family
    legal = family.stock_shapes(prunable.model)
    hint = "Save it as an uneven checkpoint (stock=False), or search with --uniform."
    shared: dict[str, Any] = {}
    for size in _sizes_per_layer(prunable):
        if any(shared.setdefault(name, number) != number for name, number in size.items()):
            raise ModelError("the layers differ in size, and a stock checkpoint has one shape for all", hint=hint)
    for sublayer, units in zip(prunable.sublayers, prunable.kept, strict=True):
        possible = legal[sublayer.kind]
        if units not in possible:
            raise ModelError(
                f"a stock {family.name} checkpoint cannot keep {units} of {sublayer.units} units of its"
                f" {sublayer.kind}; it can keep {_listed(possible)}",
                hint=hint,
            )
    if family.known_stock().heads == "dense":  # its code divides the hidden size by the number of heads
        return shared
    return shared | {"head_dim": family.head_dim(prunable.model.config)}


def _listed(units: Sequence[int]) -> str:
    """``1, 2, 4``, or ``1 to 48`` where none between is left out."""
    if len(units) > 2 and units[-1] - units[0] == len(units) - 1:
        return f"{units[0]} to {units[-1]}"
    return ", ".join(map(str, units))


def _sizes_per_layer(prunable: PrunableModel) -> list[dict[str, Any]]:
    """What ``per_layer_config`` says about each layer."""
    family, kept = prunable.family, prunable.kept
    counts = {"mlp": family.intermediate, "experts": family.expert_count}  # the config's names
    sizes: list[dict[str, Any]] = []
    for index in range(0, len(kept), 2):
        size: dict[str, Any] = {}
        if skip := [kind for kind, units in zip(KINDS, kept[index : index + 2], strict=True) if units == 0]:
            size["skip"] = skip
        # vLLM keeps keys and values of a skipped attention too: those of one head.
        heads, kv_heads, _ = (kept[index] * count or 1 for count in prunable.sublayers[index].heads_per_unit)
        size[family.heads] = heads
        if family.kv_heads is not None:
            size[family.kv_heads] = kv_heads
        if kept[index + 1]:
            size[counts[prunable.sublayers[index + 1].kind]] = kept[index + 1]
        sizes.append(size)
    return sizes


def _checkpoint_weights(prunable: PrunableModel) -> dict[str, torch.Tensor]:
    """The model's weights under the names of the saved class: of an emptied sublayer nothing but a bias is left."""
    family = prunable.family
    weights: dict[str, torch.Tensor] = dict(prunable.model.state_dict())
    for sublayer in [sublayer for sublayer, units in enumerate(prunable.kept) if units == 0]:
        layer = f"{family.decoder}.layers.{sublayer // 2}"
        consumer = f"{layer}.{family.mlp_consumer if sublayer % 2 else family.attention_consumer}"
        holder = consumer.rpartition(".")[0]
        for name in [name for name, weight in weights.items() if name.startswith(f"{holder}.") and not weight.numel()]:
            del weights[name]
        if f"{consumer}.bias" in weights:
            # `Skipped` replaces the half's module, or the consumer where the layer itself holds its linears, as OPT's.
            skipped = consumer if holder == layer else holder
            weights[f"{skipped}.bias"] = weights.pop(f"{consumer}.bias")
    return weights


def refuse_occupied(place: Path, overwrite: bool, files: Sequence[Path] = ()) -> None:
    """Raise ``OutputError`` where a model, with these files, may not be written: a file, or a folder that is in use."""
    if place.exists() and not place.is_dir():
        raise OutputError(f"{place} is a file, not a folder", hint="Choose another folder.")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{place} exists and is not empty", hint="Choose another folder, or pass --overwrite.")
    replaced = (*REPLACED, *(file.name for file in files))
    names = [f"{path.name}/" if path.is_dir() else path.name for path in place.iterdir()]
    others = sorted(name for name in names if not any(fnmatchcase(name, ours) for ours in replaced))
    if others or not (place / "config.json").is_file() or not any(place.glob("*.safetensors")):
        what = f"holds {others[0]}" if others else "holds no model"
        raise OutputError(
            f"{place} is not empty and {what}: replacing it would delete other files",
            hint="Choose another folder, or empty this one yourself.",
        )
