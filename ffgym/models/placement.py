"""Devices and dtypes: where a model is put, and in which numbers."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffgym.errors import ModelError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_FACTS = Path("/proc/cpuinfo")
# oneDNN keeps the code that it makes for each shape of a product, 0.4 MB and more, of 1,024 shapes. Where MLPs keep any
# number of channels, every cut brings new shapes; where their widths are aligned, all shapes of a search find room.
KEPT_KERNELS = 256
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_KERNELS))
# On a GPU, transformers 5.25 and later would fetch kernels from the hub: no training works offline then, and what is
# found would depend on what the hub has. Who wants them sets this to YES.
os.environ.setdefault("USE_HUB_KERNELS", "NO")


def devices_of(model: nn.Module) -> set[torch.device]:
    """Every device that a parameter lies on."""
    return {parameter.device for parameter in model.parameters()}


def choose_dtype(device: torch.device) -> torch.dtype:
    """The dtype that ``"auto"`` means on a device.

    CUDA: bfloat16 where the GPU has it, else float16. CPU: bfloat16 where it has instructions for its products, which
    take longer than float32's without them, else float32: a rule and not a timing, which what else the machine does
    would decide. Elsewhere: float32.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):  # the question is always about the current one
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        with suppress(OSError):  # not Linux
            if re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", CPU_FACTS.read_text("utf-8")):
                return torch.bfloat16
    return torch.float32


def tokens_per_batch(device: torch.device | str) -> int:
    """Tokens of one forward pass: what keeps the caches warm on a CPU, and an accelerator busy."""
    return 4096 if torch.device(device).type == "cpu" else 16384


def named_dtype(dtype: str) -> torch.dtype:
    """The dtype of a name; raises ``ModelError`` where it is none of ``DTYPES``."""
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype = {dtype!r} is unknown", hint=f"Use one of auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def narrower_dtype(checkpoint: object, working: torch.dtype) -> torch.dtype | None:
    """The dtype of a checkpoint, in which its model is saved; ``None`` where it is no narrower than the working one.

    Args:
        checkpoint: as its config says it, e.g. ``"bfloat16"``; ``None`` where it does not.
    """
    own = DTYPES.get(str(checkpoint).removeprefix("torch."), working)
    return own if own.itemsize < working.itemsize else None


def choose_device(device: str) -> torch.device:
    """The device that a configuration means; for ``"balanced"``, the kind of device that layers are spread over.

    Raises:
        ModelError: no such device here.
    """
    cuda = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "cpu")
    if device == "balanced":
        if not cuda:
            raise ModelError("model.device = 'balanced' needs GPUs, and torch sees none", hint="Use model.device auto.")
        return torch.device("cuda")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ModelError(
            f"model.device = {device!r} is no device", hint="Use auto, cpu, cuda, cuda:1 or balanced."
        ) from error
    if chosen.type == "cuda" and (not cuda or (chosen.index or 0) >= torch.cuda.device_count()):
        raise ModelError(
            f"model.device = {device!r}, but torch sees {torch.cuda.device_count()} GPUs", hint="Use auto or cpu."
        )
    return chosen


def move(model: Any, device: torch.device) -> Any:
    """The model on a device.

    Raises:
        ModelError: the device has too little memory, or this torch was not built for it.
    """
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # out of memory, or a device this torch was not built for
        raise ModelError(
            f"the model cannot be moved to {device}: {first_line(error)}",
            hint="Use model.device cpu, or balanced over several GPUs, in a run model.placement stream, or a smaller"
            " model.",
        ) from error
