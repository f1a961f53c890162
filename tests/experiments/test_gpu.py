"""The GPU experiment on a tiny model and a CPU: it works, which is all that can be said there."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "gpu"


def test_it_measures_both_placements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("FFGYM_CACHE", "FFGYM_CACHE_SIZE"):
        monkeypatch.setenv(name, "")  # put back afterwards
    (work := tmp_path / "work").mkdir()
    (work / "mine.txt").touch()
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--shape", "tiny", "--device", "cpu", "--work", str(work)])
    importlib.import_module("on_gpu").main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| in memory", "| streamed"]
    assert all(row[1].endswith(" s") and "%" in row[3] for row in rows)
    assert [path.name for path in work.iterdir()] == ["mine.txt"]
