"""Folders of finished runs, written by hand: no model anywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tomli_w
from pydantic_core import to_json
from table_costs import table_costs

from ffgym.pipeline.artifacts import write_table
from ffgym.pipeline.folder import RunFolder, RunRecord
from ffgym.report.front import Front, FrontPoint
from ffgym.report.table import ReportTable, Row
from ffgym.types import Allocation

LOSSES = {"one": (2.0, 3.0, 4.0), "better": (1.9, 2.91, 3.9), "tied": (1.9, 3.1, 4.05), "broken": (9.0, 9.0, math.inf)}


def row(label: str, losses: tuple[float, ...], sparsity: float, **changes: Any) -> Row:
    loss = sum(losses) / len(losses)
    costs = table_costs(1e8 * (1 - sparsity), 1e8, 2e4)
    return Row(label, math.exp(loss) if loss < 700 else math.inf, 0.1, sparsity, sparsity, costs, losses, **changes)


def write_run(parent: Path, name: str, *, windows: str = "abc", **data: Any) -> Path:
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps({"data": data, "output": {"dir": str(folder)}}))
    rows = (
        row("dense", (1.0, 2.0, 3.0), 0.0),
        row("uniform + ridge", (2.5, 3.5, 4.5), 0.2, is_heuristic=True, refit="ridge"),
        row("reinforce + ridge", LOSSES.get(name, LOSSES["one"]), 0.2, is_found=True, is_saved=True, refit="ridge"),
    )
    write_table(folder, ReportTable(rows, "how it was measured", windows))
    RunFolder(folder).note(RunRecord(results=("report.json",)))
    return folder


def a_front() -> Front:
    """Three points, a tie among them, and a rule that broke down at the last one."""

    def point(target: float, found: tuple[float, ...], uniform: tuple[float, ...]) -> FrontPoint:
        kept, rule = Allocation((1, 2), 100 * (1 - target), 100.0), row("uniform + ridge", uniform, target)
        return FrontPoint(target, row("reinforce + ridge", found, target), {"uniform": rule}, kept, "policy", 3.0)

    points = (
        point(0.1, (2.4, 2.5, 2.3), (2.5, 2.4, 2.6)),
        point(0.225, LOSSES["one"], (2.5, 3.5, 4.5)),
        point(0.35, (3.5, 3.6, 3.4), LOSSES["broken"]),
    )
    return Front("reinforce", points, row("dense", (1.0, 2.0, 3.0), 0.0), "how it was measured", 327_680, 98_304, 330.0)


def write_front(folder: Path) -> Path:
    path = folder / "front.json"
    path.write_bytes(to_json(a_front(), inf_nan_mode="strings"))
    return path
