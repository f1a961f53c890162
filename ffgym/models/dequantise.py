"""A GGUF file as a folder of safetensors, made once and kept in the cache."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ffgym.data.cache import cache_dir, is_whole, sha256, write_folder_once
from ffgym.errors import ModelError, first_line
from ffgym.models.checkpoint import Shapes, check_complete, depth_of
from ffgym.models.families import family_of_type
from ffgym.models.loading_errors import AGAIN, quiet

# float16 keeps 11 significant bits of weights that were quantised to 4 (a few tensors to 8). On the demo model that
# moves the loss by 1e-5 nats per token (KL 2e-6); bfloat16 would move it by 2e-4 (KL 6e-5), float32 doubles the disk.
GGUF_DTYPE = torch.float16
GGUF_NAMES = {"gemma3": "gemma3_text"}
"""Families by llama.cpp's names, where they differ from those of transformers."""
LARGEST_GEMMAS = (46, 62)  # depths of Gemma 2 27B and Gemma 3 27B
BLOCK = re.compile(r"blk\.(\d+)\.")
USE_THE_SOURCE = "Name the safetensors folder that it was made from, or start from the dense model."


def dequantised(gguf: Path, content: str, *, any_family: bool = False) -> Path:
    """The folder of a GGUF's safetensors copy, made on the first call; ``content`` is a hash of the file."""

    def convert(folder: Path) -> None:
        Console(stderr=True).print(f"Converting {gguf.name} to safetensors, once", soft_wrap=True, highlight=False)
        model, tokenizer = _read_gguf(gguf, any_family=any_family)
        with quiet():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write_folder_once(_folder_of(gguf, content), convert)


def converted(gguf: Path) -> Path | None:
    """The folder of a GGUF's safetensors copy; ``None`` where it was not made yet, or is damaged.

    A GGUF with a large vocabulary takes half a minute to parse, even for its sizes alone.
    """
    if not any(each.name.startswith(gguf.stem) for each in _folder_of(gguf, "").parent.glob("*")):
        return None  # before the file is read
    folder = _folder_of(gguf, sha256(gguf))
    return folder if is_whole(folder) else None


def _folder_of(gguf: Path, content: str) -> Path:
    return cache_dir() / "models" / f"{gguf.stem}-{content[:12]}-float16"


def _read_gguf(gguf: Path, *, any_family: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    numbers = refuse_what_would_be_lost(gguf, any_family=any_family)
    # transformers keeps the blocks packed where it finds a kernel for them, unless told not to.
    dense = {"quantization_config": GgufConfig(dequantize=True)}
    try:
        # transformers' bar over the tensors knows no switch.
        with quiet(), contextlib.redirect_stderr(io.StringIO()), _in_own_folder(gguf) as place:
            model, report = AutoModelForCausalLM.from_pretrained(
                place, gguf_file=gguf.name, dtype=GGUF_DTYPE, output_loading_info=True, trust_remote_code=False, **dense
            )
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=gguf.name, trust_remote_code=False)
    except Exception as error:  # damaged files fail in as many ways as there are parsers
        said = first_line(error)
        raise ModelError(
            f"{str(gguf)!r} cannot be read as a GGUF model: {said}",
            hint="It may be damaged, or of an architecture that transformers cannot read from GGUF: download it again,"
            " or use the model's safetensors.",
        ) from error
    check_complete(gguf.name, model, report)
    _refuse_lost_weights(gguf, numbers, model)
    # The weights are plain tensors now; without these marks save_pretrained takes them for quantised and refuses.
    model.hf_quantizer = None
    model.is_quantized = False
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hasattr(config, "query_pre_attn_scalar"):  # no file holds it: llama.cpp has a rule, transformers its default
        heads, by_hidden = config.num_attention_heads, config.num_hidden_layers in LARGEST_GEMMAS
        config.query_pre_attn_scalar = config.hidden_size // heads if by_hidden else config.head_dim
    return model, tokenizer


def _check_gguf_sizes(path: Path, fields: dict[str, Any], architecture: str, shapes: Shapes) -> None:
    """Compare the sizes that a file states with its tensors, before a model of these sizes is built."""
    rows = shapes.get("blk.0.attn_q.weight", (0,))[0]
    in_tensors = {
        "block_count": [depth_of(BLOCK, shapes)],
        "embedding_length": shapes.get("token_embd.weight", ())[1:],
        "feed_forward_length": shapes.get("blk.0.ffn_down.weight", ())[1:],
        "attention.head_count": range(1, rows + 1),
        "attention.head_count_kv": range(1, rows + 1),
    }
    for size, possible in in_tensors.items():
        key = f"{architecture}.{size}"
        if possible and key in fields and fields[key] not in possible:
            raise ModelError(f"{str(path)!r}: {key} = {fields[key]} does not fit its tensors", hint=AGAIN)


@contextlib.contextmanager
def _in_own_folder(gguf: Path) -> Iterator[str]:
    """A folder with nothing but the file: transformers also reads adapters and configs that lie beside it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / gguf.name).symlink_to(gguf.resolve())
        yield folder


def refuse_what_would_be_lost(path: Path, *, any_family: bool) -> int:
    """Refuse what transformers' reader would silently leave out or mistake.

    Returns:
        how many numbers the tensors of the file hold; 0 for a damaged file, which fails when transformers reads it.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields, tensors = reader.fields, {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
        architecture = fields["general.architecture"].contents()
        stretched = [
            fields[key].name
            for key in (f"{architecture}.rope.scaling.type", f"{architecture}.rope.scale_linear")
            if key in fields and fields[key].contents() not in ("none", 1.0)
        ]
    except Exception:
        return 0
    if "split.count" in fields and (parts := int(fields["split.count"].contents())) > 1:
        joined = re.sub(r"-\d+-of-\d+$", "", path.stem) + ".gguf"
        raise ModelError(
            f"{str(path)!r} is one of {parts} parts of a GGUF",
            hint=f"Join them with llama.cpp, and name what it writes: llama-gguf-split --merge "
            f"{shlex.quote(str(path))} {shlex.quote(joined)}",
        )
    for size in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        field = fields.get(f"{architecture}.{size}")
        if field is not None and field.types[0] == gguf.GGUFValueType.ARRAY:
            # transformers would take the list for a number, and fail elsewhere.
            raise ModelError(
                f"the layers in {str(path)!r} differ in size ({field.name} is a list): it was pruned or built that way,"
                " and transformers cannot read it",
                hint=USE_THE_SOURCE,
            )
    if not any_family:
        try:
            family_of_type(GGUF_NAMES.get(architecture, architecture))
        except ModelError as error:
            raise ModelError(f"{str(path)!r}: {error.message}", hint=error.hint) from None
    if not tensors:  # a vocabulary, for example: transformers would build a model of its default size, of gigabytes
        raise ModelError(f"{str(path)!r} holds no weights", hint=AGAIN)
    _check_gguf_sizes(path, {key: field.contents() for key, field in fields.items()}, architecture, shapes)
    stretched += [name for name in tensors if name.startswith(("rope_freqs", "rope_factors"))]
    if stretched:
        raise ModelError(
            f"the rotary positions in {str(path)!r} are scaled ({stretched[0]}), which transformers would ignore",
            hint=USE_THE_SOURCE,
        )
    return sum(tensors.values())


def _refuse_lost_weights(path: Path, numbers: int, model: Any) -> None:
    """Refuse a model that has not all the numbers of its file: transformers drops what its config has no place for."""
    lost = numbers - sum(parameter.numel() for parameter in model.parameters())
    if numbers and lost:
        raise ModelError(
            f"{str(path)!r} holds {numbers:,} numbers, and transformers would take {numbers - lost:,} of them: it"
            " leaves out biases of linears, for example",
            hint=USE_THE_SOURCE,
        )
