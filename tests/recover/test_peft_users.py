"""Adapters as users put them on a saved model themselves: PEFT and transformers alone, in a process without ffgym."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distinct_families import DISTINCT_FAMILIES
from processes import fresh

from ffgym.export.checkpoint import save_pruned
from ffgym.models.cut import PrunableModel
from ffgym.testing.models import tiny_model

UNEVEN, EMPTIED = (1, 17, 2, 48, 1, 5), (1, 17, 0, 48, 2, 0)

USE = """
import json, pathlib, sys
sys.modules["ffgym"] = None  # as if it were not installed
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()

ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
found = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    places = [folder.parent.parent / f"{folder.name}-{what}" for what in ("adapter", "merged")]
    before = load(folder)(ids).logits
    model = get_peft_model(load(folder), LoraConfig(r=4, target_modules=json.loads(sys.argv[2])[folder.name]))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.eval()
    adapted = model(ids).logits
    model.save_pretrained(places[0])
    merged = model.merge_and_unload()
    merged.save_pretrained(places[1])
    with torch.no_grad():
        again = load(places[1])(ids).logits
        readapted = PeftModel.from_pretrained(load(folder), places[0])(ids).logits
        found[folder.name] = {
            "learns": losses[-1] < losses[0],
            "changed": not torch.equal(adapted, before),
            "merged": torch.allclose(merged(ids).logits, adapted, atol=1e-4),
            "reloaded": torch.equal(again, merged(ids).logits),
            "adapter": torch.allclose(readapted, adapted, atol=1e-5),
            "ships its class": (places[1] / "modeling_ffgym.py").is_file(),
        }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("users")
    for family in DISTINCT_FAMILIES:
        for name, kept in (("uneven", UNEVEN), ("emptied", EMPTIED)):
            prunable = PrunableModel(tiny_model(family))
            prunable.cut(kept)
            save_pruned(prunable, None, root / "models" / f"{family}-{name}")
    return root


def test_adapters_train_merge_and_reload_without_ffgym(saved: Path) -> None:
    names = sorted(path.name for path in (saved / "models").iterdir())
    gated = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    targets = {name: "all-linear" if "uneven" in name else gated for name in names}
    targets["opt-emptied"] = ["q_proj", "v_proj"]
    found = fresh(USE, saved / "models", json.dumps(targets), hub=saved / "hub")
    assert sorted(found) == names
    for name, result in found.items():
        assert all(result.values()), (name, result)
