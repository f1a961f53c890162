"""Two settings that `develop.py` has searched with, seed by seed on the same windows.

python experiments/development/paired.py NAME OTHER

Without OTHER, what searches recommend that have tried units is held against where their slopes ended.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def results(name: str) -> dict[tuple[float, int], Any]:
    """By sparsity and seed."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.glob(f"{name}-[0-9]*-seed*.json")]
    return {(each["sparsity"], each["seed"]): each["losses"] for each in found if each["name"] == name}


def gains(worse: list[float], better: list[float]) -> str:
    """Mnats per token, with one standard error over windows."""
    each = 1000 * (np.array(worse) - np.array(better))
    return f"{each.mean():.1f} ± {each.std(ddof=1) / len(each) ** 0.5:.1f}"


def main(name: str, other: str = "") -> None:
    one = results(name)
    tried = {key: losses for key, losses in one.items() if "slopes" in losses}  # not all searches have tried units
    two = results(other) if other else {key: {**losses, "final": losses["slopes"]} for key, losses in tried.items()}
    other = other or "slopes alone"
    print(f"| sparsity | seed | `{name}` | `{other}` | `{name}` better by |\n|---:|---:|---:|---:|---:|")
    for sparsity in sorted({sparsity for sparsity, _ in one.keys() & two.keys()}):
        differences = []
        for seed in sorted(seed for found, seed in one.keys() & two.keys() if found == sparsity):
            mine, others = one[sparsity, seed], two[sparsity, seed]
            cells = [gains(each["prior"], each["final"]) for each in (mine, others)]
            print(f"| {sparsity:.0%} | {seed} | {cells[0]} | {cells[1]} | {gains(others['final'], mine['final'])} |")
            differences.append(1000 * float(np.mean(others["final"]) - np.mean(mine["final"])))
        if len(differences) > 1:
            error = statistics.stdev(differences) / len(differences) ** 0.5
            print(f"| {sparsity:.0%} | all | | | {statistics.mean(differences):.1f} ± {error:.1f} over seeds |")


if __name__ == "__main__":
    main(*sys.argv[1:])
