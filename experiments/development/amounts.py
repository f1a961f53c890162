"""What more calibration text is worth: `mlp-first`, prepared with more and more tokens, on equal development windows.

    python experiments/development/amounts.py TOKENS ...

Calibration and search text are 262,144 tokens together, so that the 32 development windows, which follow them in the
corpus, are the same for every amount. Losses of the dense model and of `mlp-first` go to results/amount-TOKENS.json.
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

TOGETHER = 262_144
SPARSITIES = (0.2, 0.5)


def main(tokens: int) -> None:
    """Prepare, measure and write the losses."""
    data = {**DATA, "calibration_tokens": tokens, "search_tokens": TOGETHER - tokens}
    config = load_config(data=data, search={"final_tokens": RESERVED * WINDOW})
    task = open_task(config, [("mlp-first", {})], Reporter(Console(stderr=True)))
    kept = {"dense": task.env.prunable.dense_units}
    kept |= {f"{sparsity:.0%}": task.project("mlp-first", {}, sparsity).kept for sparsity in SPARSITIES}
    losses = dict(zip(kept, on_development(task, *kept.values()), strict=True))
    for name, values in losses.items():
        print(f"{tokens:,} tokens, {name}: {np.mean(values):.4f} nats, perplexity {np.exp(np.mean(values)):.2f}")
    file = Path(__file__).parent / "results" / f"amount-{tokens}.json"
    file.write_text(json.dumps({"tokens": tokens, "losses": losses}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for amount in sys.argv[1:]:
        main(int(amount))
