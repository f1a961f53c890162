"""What the finals choose among the recommendations of searches that `develop.py` has stored, and what that gains.

    python experiments/development/chosen.py NAME

Each search's recommendations meet on the reserved windows, as in the finals of a run with its seed; the gain of the
chosen one over where slopes ended is on the stored development windows.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from develop import EPISODE_TOKENS, RESERVED, SEARCH_WINDOWS, WINDOW
from rich.console import Console

from ffgym.config.toml import load_config
from ffgym.pipeline.task import open_task
from ffgym.report.progress import Reporter
from ffgym.search.finalists import Candidate
from ffgym.search.finals import run_finals

RECOMMENDED = ("final", "clearer", "slopes")


def main(name: str) -> None:
    """Print a line of a table for every search."""
    files = sorted((Path(__file__).parent / "results").glob(f"{name}-[0-9]*-seed*.json"))
    print("| sparsity | seed | chosen | better than slopes alone by |\n|---:|---:|---|---:|")
    gained = defaultdict(list)
    for result in (json.loads(file.read_text(encoding="utf-8")) for file in files):
        if "slopes" not in result["kept"]:  # it has tried no units
            continue
        sparsity, seed = result["sparsity"], result["seed"]
        config = load_config(
            data={"search_tokens": SEARCH_WINDOWS * WINDOW},
            prune={"sparsity": sparsity},
            search={"episode_tokens": EPISODE_TOKENS, "final_tokens": RESERVED * WINDOW},
        )
        env = open_task(config, [], Reporter(Console(stderr=True, quiet=True))).env
        labels = {tuple(result["kept"][label]): label for label in reversed(RECOMMENDED) if label in result["kept"]}
        candidates = [
            Candidate(env.budget.importance(kept), env.budget.allocation(kept), "policy") for kept in reversed(labels)
        ]
        chosen = labels[run_finals(env, candidates, seed)[0][0].allocation.kept]
        gains = 1000 * (np.array(result["losses"]["slopes"]) - np.array(result["losses"][chosen]))
        gained[sparsity].append(gains.mean())
        error = gains.std(ddof=1) / len(gains) ** 0.5
        print(f"| {sparsity:.0%} | {seed} | {chosen} | {gains.mean():.1f} ± {error:.1f} |", flush=True)
    for sparsity, means in gained.items():
        if len(means) > 1:
            error = statistics.stdev(means) / len(means) ** 0.5
            print(f"| {sparsity:.0%} | all | | {statistics.mean(means):.1f} ± {error:.1f} over seeds |")


if __name__ == "__main__":
    main(sys.argv[1])
