"""A small twin of the proof that a model larger than memory runs: the same bits inside a limit that it does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "scale" / "streaming.py"
SIZES = ["--hidden", "1024", "--intermediate", "1024", "--layers", "24", "--vocabulary", "1000", "--window", "32"]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), *SIZES, *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_model_that_does_not_fit_runs_with_the_same_bits(tmp_path: Path) -> None:
    """280 MB of weights and 320 MB of factors; the libraries alone have asked for 600 MB."""
    inside, free = run(tmp_path, "--placement", "auto", "--limit", "1"), run(tmp_path, "--placement", "resident")
    assert (inside.returncode, free.returncode) == (0, 0), inside.stderr + free.stderr
    found = [[line for line in done.stdout.splitlines() if line[:8] in NAMES] for done in (inside, free)]
    assert len(found[0]) == 4
    assert found[0] == found[1]


NAMES = ("store   ", "episodes", "report  ", "saved   ")
