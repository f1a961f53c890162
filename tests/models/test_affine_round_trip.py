"""A model that was calibrated with biases is the same bits in a process that does not have ffgym, for every family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from safetensors.torch import save_file

from ffgym.criteria.wanda import Wanda
from ffgym.export.checkpoint import save_pruned
from ffgym.prepare.paths import prepare
from ffgym.prepare.sequential import calibrate_sequentially
from ffgym.testing.models import tiny_model

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(7))
ALLOCATIONS = {"uneven": (1, 17, 2, 48, 1, 5), "emptied": (1, 17, 0, 48, 2, 0)}
REFITS = ("nested", "sequential")

CHECK = """
import json, pathlib, sys
sys.modules["ffgym"] = None  # as if it were not installed
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
found = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    expected = load_file(folder.parent.parent / f"{folder.name}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        found[folder.name] = torch.equal(model(expected["ids"]).logits, expected["logits"])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, random_windows: Any) -> dict[str, Any]:
    """Every family after affine calibration, nested and sequential: in memory's logits, and on the disk."""
    root = tmp_path_factory.mktemp("affine")
    biases: dict[str, list[bool]] = {}
    parameters: dict[str, tuple[int, int]] = {}
    windows = random_windows(8, 24)
    for family in DISTINCT_FAMILIES:
        prepared = prepare(tiny_model(family), Wanda(), windows, calibration="affine", ridge=0.01)
        prunable = prepared.prunable
        for name, kept in ALLOCATIONS.items():
            for refit in REFITS:
                if refit == "sequential":
                    calibrate_sequentially(prunable, kept, windows, prepared.ridges)
                else:
                    prunable.cut(kept)
                label = f"{family}-{name}-{refit}"
                with torch.no_grad():
                    content = {"ids": IDS, "logits": prunable.model(IDS).logits}
                save_file(content, root / f"{label}.safetensors")
                biases[label] = [half.consumer.bias is not None for half in prunable.halves]
                written = save_pruned(prunable.model, None, root / "models" / label, kept=kept, family=prunable.family)
                parameters[label] = written.parameters, sum(p.numel() for p in prunable.model.parameters())
                prunable.restore()
    return {"root": root, "biases": biases, "parameters": parameters}


def test_every_family_has_the_same_logits_in_a_fresh_process(saved: dict[str, Any]) -> None:
    root: Path = saved["root"]
    environment = {**os.environ, "HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHECK, str(root / "models")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(DISTINCT_FAMILIES) * len(ALLOCATIONS) * len(REFITS)
    assert all(found.values()), found


def test_calibration_did_give_biases_to_what_was_cut(saved: dict[str, Any]) -> None:
    for label, has in saved["biases"].items():
        kept = ALLOCATIONS[label.split("-")[1]]
        dense = (4 if label.startswith("opt") else 2, 48) * 3
        cut = [units < whole for units, whole in zip(kept, dense, strict=True)]
        assert all(bias for bias, was_cut in zip(has, cut, strict=True) if was_cut), label


def test_the_numbers_in_the_checkpoint_are_those_in_memory(saved: dict[str, Any]) -> None:
    for label, (written, in_memory) in saved["parameters"].items():
        assert written == in_memory, label
