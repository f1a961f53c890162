"""What each criterion's order of units is worth: the same allocations, measured after each order.

    python experiments/development/orders.py CRITERION ...

Losses are of 32 development windows (develop.py). An allocation says how many units each sublayer keeps; the criterion
says which. A result goes to results/orders-CRITERION.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from develop import DATA, RESERVED, WINDOW, on_development
from rich.console import Console

from ffgym.config.toml import load_config
from ffgym.pipeline.task import open_task
from ffgym.report.progress import Reporter

RESULTS = Path(__file__).parent / "results"
SPARSITIES = (0.2, 0.3, 0.4, 0.5)
FOUND = ("half-units-40-seed3", "half-units-50-seed0", "half-units-50-seed1")  # searches that removed KV groups


def main(criterion: str) -> None:
    """Measure every allocation after the order of one criterion, and write the losses."""
    config = load_config(data=DATA, criterion={"name": criterion}, search={"final_tokens": RESERVED * WINDOW})
    task = open_task(config, [("uniform", {}), ("mlp-first", {})], Reporter(Console(stderr=True)))
    kept = {}
    for heuristic in ("uniform", "mlp-first"):
        for sparsity in SPARSITIES:
            kept[f"{heuristic}, {sparsity:.0%}"] = task.project(heuristic, {}, sparsity).kept
    for name in FOUND:
        kept[name] = tuple(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["kept"]["final"])
    losses = dict(zip(kept, on_development(task, *kept.values()), strict=True))
    for name, values in losses.items():
        print(f"{criterion}, {name}: {np.mean(values):.4f} nats, perplexity {np.exp(np.mean(values)):.2f}")
    file = RESULTS / f"orders-{criterion}.json"
    file.write_text(json.dumps({"criterion": criterion, "losses": losses}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
