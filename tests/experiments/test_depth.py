"""Depth pruning by hand: whole sublayers go until the share of the time is saved, and the model that is left loads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from latency_tables import made_up_table

from ffgym.config.toml import load_config
from ffgym.costs.latency_table import to_json
from ffgym.models.loading import load

FOLDER = Path(__file__).parents[2] / "experiments" / "serving"


def test_the_model_without_whole_sublayers_can_be_saved(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the attention of layer 0 would be the cheapest to lose: it takes all of the time here."""
    monkeypatch.syspath_prepend(str(FOLDER))
    depth = importlib.import_module("depth")
    monkeypatch.setattr(depth, "load_config", lambda **tables: load_config(**{**tiny_run, **tables}))
    table = tmp_path / "times.json"
    dense = load(tiny_run["model"]["name"], dtype="float32", device="cpu").model
    table.write_text(to_json(made_up_table(dense, mlp=0.0)), encoding="utf-8")
    depth.main(table, 0.5, tmp_path / "model")
    pruned = load(str(tmp_path / "model"), dtype="float32", device="cpu").model
    assert pruned.num_parameters() < dense.num_parameters()
