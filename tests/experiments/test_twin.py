"""The twin of a model with grouped queries: the same function, and every head can go by itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from ffgym.models.cut import PrunableModel
from ffgym.models.loading import load

FOLDER = Path(__file__).parents[2] / "experiments" / "twin"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_it_says_the_same_with_a_head_for_every_query(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word_tokenizer: Any
) -> None:
    from ffgym.testing.models import tiny_model

    monkeypatch.syspath_prepend(str(FOLDER))
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    importlib.import_module("expand").expand(str(tmp_path / "model"), tmp_path / "twin")
    twin = load(str(tmp_path / "twin"), dtype="float32", device="cpu").model
    ids = torch.randint(3, 128, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits)
    assert PrunableModel(twin).dense_units[::2] == (model.config.num_attention_heads,) * model.config.num_hidden_layers
