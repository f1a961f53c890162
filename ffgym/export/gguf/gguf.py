"""Write a model as one GGUF file, the format that llama.cpp runs."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
from pydantic import BaseModel, Field

from ffgym.errors import ModelError
from ffgym.export.format import OTHERWISE, Exported, ExportFormat
from ffgym.export.gguf.architectures import Architecture, Contents, choose_architecture, read_contents
from ffgym.export.gguf.vocabulary import Vocabulary, read_vocabulary
from ffgym.export.tensors import EMBEDDING, OUTPUT, SavedWeights, read_checkpoint
from ffgym.files import FileFormat, check_file, replacing
from ffgym.models.loading import load_tokenizer
from ffgym.models.loading_errors import AGAIN
from ffgym.plugins.bases import PluginConfig
from ffgym.types import OnStep

FILE_TYPES = gguf.LlamaFileType
# GGUF's name of a dtype, safetensors' in lower case -> torch's, what the tensors are marked with, and what the file is.
DTYPES: dict[str, tuple[torch.dtype, Any, Any]] = {
    "f32": (torch.float32, gguf.GGMLQuantizationType.F32, FILE_TYPES.ALL_F32),
    "f16": (torch.float16, gguf.GGMLQuantizationType.F16, FILE_TYPES.MOSTLY_F16),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, FILE_TYPES.MOSTLY_BF16),
}


class _GenerationConfig(BaseModel):
    eos_token_id: int | list[int] | None = None


GENERATION_CONFIG = FileFormat("generation configuration", _GenerationConfig, ModelError, AGAIN)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: its name, its shape as torch has it, and how to get it, float32 or as it was saved."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


class Gguf(ExportFormat):
    """One file with weights, sizes and tokenizer, which llama.cpp runs."""

    name = "gguf"

    class Config(PluginConfig):
        """Options of the format."""

        dtype: Literal["f32", "f16", "bf16"] | None = Field(
            default=None,
            description="of the matrices: f32, f16 or bf16; what the weights are in when left out; for fewer bits, "
            "quantise an f16 file with llama-quantize",
        )

    def write(self, folder: Path, target: Path, *, overwrite: bool, progress: OnStep) -> Exported:
        """Write a file whose name ends in ``.gguf``, one tensor in memory at a time; norms and biases as float32.

        Raises:
            ModelError: also of a weight that float16 cannot hold.
        """
        place = target.resolve()
        check_file(place, [".gguf"], overwrite=overwrite)
        config, saved = read_checkpoint(folder)
        contents = read_contents(config, saved)
        architecture = choose_architecture(contents)
        tensors = list(_Tensors(architecture, contents, saved).every())
        if left := [name for name in saved.left if not name.endswith("rotary_emb.inv_freq")]:
            raise ModelError(
                f"a GGUF file of architecture {architecture.name} has no place for {left[0]}"
                + (f" and {len(left) - 1} more tensors" if len(left) > 1 else ""),
                hint=OTHERWISE,
            )
        vocabulary = read_vocabulary(load_tokenizer(folder), config.vocab_size, _ends(folder))
        chosen = self.config.dtype or saved.dtype(EMBEDDING).lower()
        with replacing(place) as part, contextlib.closing(gguf.GGUFWriter(part, architecture.name)) as writer:
            _add_metadata(writer, architecture, contents, vocabulary, name=place.stem, dtype=chosen)
            _write(writer, tensors, chosen, progress)
        return Exported(
            path=place,
            bytes=place.stat().st_size,
            parameters=sum(torch.Size(tensor.shape).numel() for tensor in tensors),
            architecture=architecture.name,
            dtype=chosen,
            notes=tuple(_notes(architecture, contents)),
            run=run_line(place),
            needs="pip install 'ffgym[llama-cpp]', or llama.cpp itself",
        )


def run_line(path: Path) -> str:
    """The command that generates from a file, where llama-cpp-python is installed."""
    model = f"Llama({json.dumps(str(path))}, verbose=False)"
    code = f'from llama_cpp import Llama; print({model}("Once upon a time", max_tokens=32)["choices"][0]["text"])'
    return f"python -c {shlex.quote(code)}"


def _ends(folder: Path) -> list[int]:
    """Ids that end a text, as the generation config lists them."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    ends = GENERATION_CONFIG.read(file).eos_token_id
    return [ends] if isinstance(ends, int) else ends or []


def _notes(architecture: Architecture, contents: Contents) -> Iterator[str]:
    if empty := [str(index) for index, layer in enumerate(contents.layers) if not layer.channels]:
        yield (
            f"The MLPs that have nothing left (layers {', '.join(empty)}) stand as one channel of zeros:"
            " llama.cpp would drop the whole layer."
        )
    if (context := contents.context_length(architecture)) < contents.config.max_position_embeddings:
        yield (
            f"The context is limited to {context:,} tokens, the model's sliding window:"
            " llama.cpp's code for it attends to everything."
        )


# --- the tensors ------------------------------------------------------------------------------------------------------


class _Tensors:
    """What goes from a saved model into the file, under the names that llama.cpp's architecture has for it."""

    def __init__(self, architecture: Architecture, contents: Contents, saved: SavedWeights) -> None:
        self.architecture, self.contents, self.saved = architecture, contents, saved
        self.hidden = contents.config.hidden_size
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self.names = gguf.get_tensor_name_map(number, len(contents.layers))

    def every(self) -> Iterator[Tensor]:
        """All of them, in the order of the layers."""
        contents = self.contents
        matrix = (contents.config.vocab_size, self.hidden)
        yield self._tensor(EMBEDDING, matrix)
        if contents.config.tie_word_embeddings:
            self.saved.drop(OUTPUT)
        else:
            yield self._tensor(OUTPUT, matrix)
        yield self._norm("model.norm", self.hidden)
        if contents.rope["rope_type"] == "llama3":
            yield Tensor("rope_freqs.weight", (contents.head_dim // 2,), lambda: _rope_factors(contents))
        for index in range(len(contents.layers)):
            yield from self._attention(index)
            yield from self._mlp(index)

    def _tensor(self, name: str, shape: tuple[int, ...], read: Callable[[], torch.Tensor] | None = None) -> Tensor:
        """A tensor of the saved model, or another one in its place."""
        return Tensor(self.names.get_name(name, (".weight", ".bias")), shape, read or self.saved.take(name, shape))

    def _norm(self, name: str, size: int) -> Tensor:
        norm, shift = self._tensor(f"{name}.weight", (size,)), self.architecture.norm_shift
        return replace(norm, read=lambda: norm.read().float() + shift) if shift else norm

    def _bias(self, linear: str, size: int) -> list[Tensor]:
        return [self._tensor(f"{linear}.bias", (size,))] if f"{linear}.bias" in self.saved else []

    def _attention(self, index: int) -> Iterator[Tensor]:
        before, attention = f"model.layers.{index}.input_layernorm", f"model.layers.{index}.self_attn"
        layer, head_dim = self.contents.layers[index], self.contents.head_dim
        if not layer.heads:  # its remaining tensors belong to the MLP before it
            self.saved.drop(f"{before}.weight")
            self.saved.drop(f"{attention}.bias")
            return
        yield self._norm(before, self.hidden)
        parts = list[Tensor]()
        for name, heads in {"q_proj": layer.heads, "k_proj": layer.kv_heads, "v_proj": layer.kv_heads}.items():
            linear, rows = f"{attention}.{name}", heads * head_dim
            for part in (self._tensor(f"{linear}.weight", (rows, self.hidden)), *self._bias(linear, rows)):
                rotated = self.architecture.neighbours_rotate and name != "v_proj"
                parts.append(replace(part, read=_neighbours(part.read, heads)) if rotated else part)
        yield from [_stacked(parts, index)] if self.architecture.fused else parts
        for norm in (f"{attention}.q_norm", f"{attention}.k_norm"):
            if self.names.get_name(norm) and f"{norm}.weight" in self.saved:
                yield self._norm(norm, head_dim)
        if self.architecture.post_norms:
            yield self._norm(f"model.layers.{index}.post_attention_layernorm", self.hidden)
        yield self._tensor(f"{attention}.o_proj.weight", (self.hidden, layer.heads * head_dim))
        yield from self._bias(f"{attention}.o_proj", self.hidden)

    def _mlp(self, index: int) -> Iterator[Tensor]:
        where, layer, hidden = f"model.layers.{index}", self.contents.layers[index], self.hidden
        if self.architecture.post_norms:
            yield self._norm(f"{where}.pre_feedforward_layernorm", hidden)
            yield self._norm(f"{where}.post_feedforward_layernorm", hidden)
        else:
            yield self._norm(f"{where}.post_attention_layernorm", hidden)
        channels = layer.written_channels
        down = f"{where}.mlp.down_proj"
        for linear in (f"{where}.mlp.gate_proj", f"{where}.mlp.up_proj", down):
            shape = (hidden, channels) if linear == down else (channels, hidden)
            zeros = None if layer.channels else partial(torch.zeros, shape)
            yield self._tensor(f"{linear}.weight", shape, zeros)
            if linear != down:
                yield from self._bias(linear, channels)
        if names := self.contents.shifts(index):
            reads = [self.saved.take(name, (hidden,)) for name in names]
            yield self._tensor(f"{down}.bias", (hidden,), lambda: _sum(reads))


def _stacked(weights: Sequence[Tensor], layer: int) -> Tensor:
    """Query, key and value as one matrix."""
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    return Tensor(f"blk.{layer}.attn_qkv.weight", shape, lambda: torch.cat([weight.read() for weight in weights]))


def _sum(reads: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
    return torch.stack([read().float() for read in reads]).sum(0)


def _neighbours(read: Callable[[], torch.Tensor], heads: int) -> Callable[[], torch.Tensor]:
    """Rows of each head from (0, 1, ..., d/2, d/2 + 1, ...) to (0, d/2, 1, d/2 + 1, ...), of a matrix or a bias."""

    def reordered() -> torch.Tensor:
        rows = read()
        halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    return reordered


def _rope_factors(contents: Contents) -> torch.Tensor:
    """What llama.cpp divides the rotary frequencies by, shape (head_dim / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](contents.config, torch.device("cpu"))
    dim = contents.head_dim
    plain = 1.0 / float(contents.rope["rope_theta"]) ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return torch.div(plain, scaled)


# --- the file ---------------------------------------------------------------------------------------------------------


def _add_metadata(
    writer: Any, architecture: Architecture, contents: Contents, vocabulary: Vocabulary, *, name: str, dtype: str
) -> None:
    config, layers = contents.config, contents.layers
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(DTYPES[dtype][2]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(contents.context_length(architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(_one_or_all([layer.written_channels for layer in layers]))
    writer.add_head_count(_one_or_all([layer.heads for layer in layers]))
    writer.add_head_count_kv(_one_or_all([layer.kv_heads for layer in layers]))
    writer.add_key_length(contents.head_dim)
    writer.add_value_length(contents.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(contents.head_dim)
    writer.add_rope_freq_base(float(contents.rope["rope_theta"]))
    if contents.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(contents.rope["factor"]))
    if architecture.windows:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(contents.sliding)
        writer.add_rope_freq_base_swa(float(contents.window_rope["rope_theta"]))
    if architecture.soft_caps:
        writer.add_attn_logit_softcapping(float(config.attn_logit_softcapping))
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(float(cap))
    vocabulary.add_to(writer)


def _one_or_all(sizes: list[int]) -> int | list[int]:
    """One number where all layers are alike, which is what most architectures read."""
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _write(writer: Any, tensors: Sequence[Tensor], dtype: str, progress: OnStep) -> None:
    # Norms and biases stay float32, whatever the file's dtype: llama.cpp adds and multiplies in it.
    wanted = [DTYPES[dtype if len(tensor.shape) > 1 else "f32"] for tensor in tensors]
    sizes = [torch.Size(t.shape).numel() * w[0].itemsize for t, w in zip(tensors, wanted, strict=True)]
    for tensor, (_, kind, _), size in zip(tensors, wanted, sizes, strict=True):
        writer.add_tensor_info(tensor.name, tensor.shape, None, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    progress(0, len(tensors))
    for done, (tensor, (torch_dtype, *_)) in enumerate(zip(tensors, wanted, strict=True), start=1):
        converted = _converted(tensor, torch_dtype)
        numpy_knows = converted.view(torch.int16) if torch_dtype == torch.bfloat16 else converted
        writer.write_tensor_data(numpy_knows.numpy())
        progress(done, len(tensors))


def _converted(tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    read = tensor.read()
    converted = read.to(dtype).contiguous()
    if dtype == torch.float16 and not torch.equal(converted.isfinite(), read.isfinite()):
        raise ModelError(f"{tensor.name} has weights that float16 cannot hold", hint="Use --dtype bf16.")
    return converted
