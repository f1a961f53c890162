"""What searches had found after a part of their tokens: the tables in the docs are what the script prints."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bench", ["final-20", "final-50"])
def test_the_tables_of_the_docs_are_what_the_script_prints(bench):
    printed = runpy.run_path(str(ROOT / "experiments/bench/lengths.py"))["table"](bench)
    assert printed in (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    assert printed.splitlines()[2].startswith("| reinforce | ")
