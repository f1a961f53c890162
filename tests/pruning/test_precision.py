"""float64 is asked for where the device has it: everything else would fail on Apple's mps, which no test here has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ffgym
from ffgym.pruning.precision import float64_device

CPU, MPS, CUDA = torch.device("cpu"), torch.device("mps"), torch.device("cuda", 1)
PACKAGE = Path(ffgym.__file__).parent
ROOMS = ("models", "prepare", "pruning", "criteria", "heuristics", "evaluation", "rewards")


@pytest.mark.parametrize(("device", "wide"), [(CPU, CPU), (CUDA, CUDA), (MPS, CPU), (torch.device("mps", 0), CPU)])
def test_only_mps_sends_float64_to_the_cpu(device: torch.device, wide: torch.device) -> None:
    assert float64_device(device) == wide


def test_nobody_makes_a_tensor_wide_where_it_lies() -> None:
    """A float64 tensor beside the model's: `in_float64(x)`, or `.cpu().double()` for results."""
    direct = re.compile(r"(?<!\.cpu\(\))\.double\(\)|torch\.(float64|double)\b")
    on_the_cpu = (
        "device=wide",
        "torch.finfo(",
        "torch.zeros(len(grid)",
        "torch.tensor(numbers",
        "torch.tensor([[loss]]",
    )
    files = [file for room in ROOMS for file in sorted((PACKAGE / room).glob("*.py")) if file.name != "precision.py"]
    assert len(files) > 40
    lines = [f"{file.name}: {line.strip()}" for file in files for line in file.read_text("utf-8").splitlines()]
    assert not [line for line in lines if direct.search(line) and not any(word in line for word in on_the_cpu)]
