"""How hard sequential refits should pull towards the nested ones: losses above dense, for a few strengths.

    python experiments/calibration/strength.py RUN_FOLDER

takes the allocation of a finished run and prints nats per token above the dense model on the report split and on search
windows that no refit has seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from ffgym.config.toml import load_config
from ffgym.evaluation.perplexity import evaluate
from ffgym.pipeline import task
from ffgym.prepare.sequential import calibrate_sequentially
from ffgym.report.progress import Reporter

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
WINDOWS = 16


def main(folder: Path) -> None:
    """Measure nested ridge, then every strength."""
    config = load_config(folder / "config.toml", ["tracking.enabled=false"])
    space = task.open_task(config, [], Reporter(Console(stderr=True)))
    prunable = space.prepared.prunable
    kept = json.loads((folder / "allocation.json").read_text())["kept"]
    texts = {"report": space.splits.report.windows[:WINDOWS], "search": space.splits.search.windows[-WINDOWS:]}
    dense = {name: evaluate(prunable.model, windows).loss for name, windows in texts.items()}

    def show(label: str) -> None:
        losses = {name: evaluate(prunable.model, windows).loss - dense[name] for name, windows in texts.items()}
        print(f"{label:24}" + "".join(f"  {name} +{loss:.4f}" for name, loss in losses.items()))

    prunable.cut(kept)
    show("nested ridge")
    for strength in STRENGTHS:
        ridges = [strength * ridge for ridge in space.prepared.ridges]
        calibrate_sequentially(prunable, kept, space.splits.calibration.windows, ridges)
        show(f"sequential, strength {strength:g}")
    prunable.restore()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
