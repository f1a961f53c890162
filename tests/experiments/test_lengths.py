"""What searches had found after a part of their tokens: the committed tables are what the script prints."""

from __future__ import annotations

import runpy
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "experiments" / "bench"


def test_the_committed_tables_are_what_the_script_prints():
    table = runpy.run_path(str(FOLDER / "lengths.py"))["table"]
    committed = (FOLDER / "lengths.md").read_text(encoding="utf-8")
    assert committed == f"{table(FOLDER / 'final-20.toml')}\n\n{table(FOLDER / 'final-50.toml')}\n"
    assert committed.startswith("| final-20, tokens | 16,384 |")
