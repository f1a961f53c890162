"""A small twin of the proof that a model larger than memory runs: inside a limit that it does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "scale" / "streaming.py"
SIZES = ["--hidden", "1024", "--intermediate", "1024", "--layers", "24", "--vocabulary", "1000", "--window", "32"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_model_that_does_not_fit_runs(tmp_path: Path) -> None:
    """280 MB of weights and 320 MB of factors; the libraries alone have asked for 600 MB."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), *SIZES, "--placement", "auto", "--limit", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    printed = [line.split()[0] for line in done.stdout.splitlines()]
    assert {"store", "episodes", "report", "saved"} <= set(printed)
