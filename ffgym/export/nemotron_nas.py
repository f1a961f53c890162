"""Write a model as a ``nemotron-nas`` folder, which some engines read without code beside the weights.

The format knows one number of query heads for all layers, MLPs of a multiple of 256 channels, and layers without
attention or MLP. What a pruned layer has fewer of is filled up with zeros, so the function stays the same.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ffgym.errors import ModelError
from ffgym.export.checkpoint import refuse_occupied
from ffgym.export.format import OTHERWISE, Exported, ExportFormat
from ffgym.export.tensors import EMBEDDING, OUTPUT, SavedWeights, read_checkpoint
from ffgym.files import OUTPUT_OPTION, replacing
from ffgym.models.checkpoint import DTYPES
from ffgym.models.families import family_of_type
from ffgym.models.loading import load_tokenizer
from ffgym.models.loading_errors import quiet
from ffgym.report.layout import counted, humane
from ffgym.types import OnStep

CHANNELS = 256  # engines round an MLP's width up to a multiple
NORM = "model.norm.weight"
FAMILIES = ("llama", "mistral")
SETTINGS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "vocab_size"),
    *("hidden_act", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
TRY = "--ignore-chat-template --max-tokens 32 --prompt 'Once upon a time'"


@dataclass(frozen=True)
class _Linear:
    """A matrix of a layer: its shape in the checkpoint and the larger one, with zeros, in the export."""

    name: str
    shape: tuple[int, int]
    padded: tuple[int, int]

    def fill(self, weight: torch.Tensor) -> torch.Tensor:
        full = weight.new_zeros(self.padded)
        full[: self.shape[0], : self.shape[1]] = weight
        return full


class NemotronNas(ExportFormat):
    """A folder in the format of NVIDIA's Nemotron-NAS models, which MLX reads."""

    name = "nemotron-nas"

    def write(self, folder: Path, target: Path, *, overwrite: bool, progress: OnStep) -> Exported:
        """Write a folder of safetensors files, one a layer, with config and tokenizer."""
        place = target.expanduser().resolve()
        refuse_occupied(place, overwrite)
        config, saved = read_checkpoint(folder)
        config.allow_global_per_layer_attribute_access = True  # the dense model's sizes
        with quiet(), replacing(place, OUTPUT_OPTION) as part:  # transformers warns wherever those sizes are read
            _check(config, saved)
            layers = [_layer(index, config) for index in range(config.num_hidden_layers)]
            part.mkdir()
            written = _write(part, config, layers, saved, progress)
            _write_config(part, config, layers, DTYPES[saved.dtype(EMBEDDING)])
            load_tokenizer(folder).save_pretrained(part)
            if (folder / "generation_config.json").is_file():
                shutil.copyfile(folder / "generation_config.json", part / "generation_config.json")
        return Exported(
            path=place,
            bytes=sum(file.stat().st_size for file in place.glob("*.safetensors")),
            parameters=written,
            architecture=self.name,
            dtype=saved.dtype(EMBEDDING).lower(),
            notes=tuple(_notes(layers)),
            run=f"python -m mlx_lm generate --model {shlex.quote(str(place))} {TRY}",
            needs="pip install mlx-lm, on Linux 'mlx[cpu]' as well",
        )


def _check(config: Any, saved: SavedWeights) -> None:
    """Refuse what the format cannot represent."""
    family = family_of_type(str(config.model_type))
    head_dim = family.head_dim(config)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    window = getattr(config, "sliding_window", None)
    if family.name not in FAMILIES:
        reason = f"the format computes as Llama does, and this model is of family {family.name!r}"
    elif head_dim * config.num_attention_heads != config.hidden_size:
        reason = f"the format's heads have hidden size / heads channels each, and this model's have {head_dim}"
    elif rope not in ("default", "llama3"):
        reason = f"the format has no rotary embeddings of type {rope!r}"
    elif window and window < config.max_position_embeddings:
        reason = f"the format attends to everything, and this model to {window:,} tokens"
    elif bias := next((name for name in saved.left if name.endswith(".bias")), None):
        reason = f"the format has no bias in a layer, and this model has {bias}"
    else:
        return
    hint = "Prune with --calibration ridge, which adds no biases. " if "no bias" in reason else ""
    raise ModelError(f"this model cannot be written as nemotron-nas: {reason}", hint=hint + OTHERWISE)


@dataclass(frozen=True)
class _Layer:
    """What a layer of the export holds: its matrices and norms, and the config's block that says their sizes."""

    linears: tuple[_Linear, ...]
    norms: tuple[str, ...]
    block: dict[str, dict[str, Any]]


def _layer(index: int, config: Any) -> _Layer:
    sizes, where, hidden = config.per_layer_config[index], f"model.layers.{index}", config.hidden_size
    norms = {"attention": f"{where}.input_layernorm.weight", "mlp": f"{where}.post_attention_layernorm.weight"}
    skip = getattr(sizes, "skip", ())
    linears: list[_Linear] = []
    block: dict[str, dict[str, Any]] = {"attention": {"no_op": True}, "ffn": {"no_op": True}}
    if "attention" not in skip:
        head_dim = hidden // config.num_attention_heads
        rows = {"q": sizes.num_attention_heads * head_dim, "k": sizes.num_key_value_heads * head_dim}
        full = {"q": hidden, "k": config.num_key_value_heads * head_dim}
        for name, like in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "k")):
            linears.append(_Linear(f"{where}.self_attn.{name}.weight", (rows[like], hidden), (full[like], hidden)))
        linears.append(_Linear(f"{where}.self_attn.o_proj.weight", (hidden, rows["q"]), (hidden, hidden)))
        block["attention"] = {"n_heads_in_group": config.num_attention_heads // config.num_key_value_heads}
    if "mlp" not in skip:
        channels = sizes.intermediate_size
        width = -(-channels // CHANNELS) * CHANNELS
        for name in ("gate_proj", "up_proj"):
            linears.append(_Linear(f"{where}.mlp.{name}.weight", (channels, hidden), (width, hidden)))
        linears.append(_Linear(f"{where}.mlp.down_proj.weight", (hidden, channels), (hidden, width)))
        block["ffn"] = {"ffn_mult": 3 * width / (2 * hidden)}
    kept = tuple(name for kind, name in norms.items() if kind not in skip)
    return _Layer(tuple(linears), kept, block)


def _write(folder: Path, config: Any, layers: list[_Layer], saved: SavedWeights, progress: OnStep) -> int:
    """Write the weights, a file a layer and one for the rest; returns how many numbers they are."""
    count, places, written = len(layers) + 1, dict[str, str](), 0
    progress(0, count)
    for number, tensors in enumerate((_ends(config, saved), *(_read(layer, saved) for layer in layers)), 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        written += sum(tensor.numel() for tensor in tensors.values())
        progress(number, count)
    index = {"metadata": {"total_parameters": written}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return written


def _ends(config: Any, saved: SavedWeights) -> dict[str, torch.Tensor]:
    shape = (config.vocab_size, config.hidden_size)
    shapes = {EMBEDDING: shape, NORM: (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[OUTPUT] = shape
    return {name: saved.take(name, size)() for name, size in shapes.items()}


def _read(layer: _Layer, saved: SavedWeights) -> dict[str, torch.Tensor]:
    weights = {each.name: each.fill(saved.take(each.name, each.shape)()) for each in layer.linears}
    hidden = layer.linears[0].shape[1] if layer.linears else 0
    return weights | {name: saved.take(name, (hidden,))() for name in layer.norms}


def _write_config(folder: Path, config: Any, layers: list[_Layer], dtype: str) -> None:
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta", 10000.0)
    said = {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        **{name: getattr(config, name) for name in SETTINGS},
        "block_configs": [layer.block for layer in layers],
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": theta,
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _notes(layers: list[_Layer]) -> Iterator[str]:
    for part, what in (("self_attn", "heads"), ("mlp", "channels")):
        own = [each for layer in layers for each in layer.linears if part in each.name]
        padded = sum(each.padded[0] * each.padded[1] - each.shape[0] * each.shape[1] for each in own)
        filled = {each.name.split(".")[2] for each in own if each.shape != each.padded}
        if padded:
            yield (
                f"The format cannot hold the number of {what} of {counted(len(filled), 'layer')}: zeros fill them up,"
                f" {humane(padded)} parameters that change no result."
            )
