"""What one KV group of each layer is worth around a found allocation: measured, and by the first-order estimate.

    python experiments/development/groups.py RESULT SPARSITY WINDOWS

RESULT is the stem of a file in results/. In every layer one group is removed, and its cost goes to the other sublayers.
Losses are of development windows, slopes of the first 16 search windows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from develop import DATA, RESERVED, WINDOW, on_development
from rich.console import Console
from scipy.stats import spearmanr

from ffgym.config.toml import load_config
from ffgym.evaluation.evaluator import ModelEvaluator, Request
from ffgym.pipeline.task import open_task
from ffgym.pruning.budget import Budget
from ffgym.report.progress import Reporter

SLOPE_WINDOWS = 16


def without_a_group(budget: Budget, kept: tuple[int, ...], index: int, sparsity: float) -> tuple[int, ...] | None:
    """The allocation that has one unit less of a sublayer and is as large; ``None`` where it cannot lose one."""
    start = budget.importance(kept)
    for step in np.linspace(0, 2, 81):
        importance = start.copy()
        importance[index] -= step
        found = budget.project(np.clip(importance, -1, 1), sparsity).kept
        if found[index] == kept[index] - 1:
            return found
    return None


def main(result: str, sparsity: float, windows: int) -> None:
    """Print a line a layer, the greatest gain first."""
    stored = json.loads((Path(__file__).parent / "results" / f"{result}.json").read_text(encoding="utf-8"))
    config = load_config(data=DATA, prune={"sparsity": sparsity}, search={"final_tokens": RESERVED * WINDOW})
    task = open_task(config, [(config.prior.name, config.prior.options)], Reporter(Console(stderr=True)))
    env, budget = task.env, task.env.budget
    base = budget.project(budget.importance(stored["kept"]["final"]), sparsity).kept
    evaluator = ModelEvaluator(env.prunable, env.windows, calibrated=env.calibrated)
    request = Request(base, tuple(range(SLOPE_WINDOWS)), needs=frozenset({"slopes"}))
    slopes = evaluator.measure([request])[0].slopes
    assert slopes is not None
    attentions = [index for index, sublayer in enumerate(budget.sublayers) if sublayer.kind == "attention"]
    tried = ((index, without_a_group(budget, base, index, sparsity)) for index in attentions)
    cuts = {index: fewer for index, fewer in tried if fewer is not None}
    found, *losses = map(np.array, on_development(task, base, *cuts.values(), windows=windows))
    rows = []
    for (index, fewer), others in zip(cuts.items(), losses, strict=True):
        gains = 1000 * (found - others)
        changes = zip(slopes, base, fewer, strict=True)
        estimate = -1000 * sum(s[a:b].sum() if b > a else -s[b:a].sum() for s, a, b in changes)
        rows.append((gains.mean(), gains.std(ddof=1) / windows**0.5, estimate, budget.sublayers[index].name))
    for gain, error, estimate, name in sorted(rows, reverse=True):
        print(f"{gain:7.1f} ± {error:4.1f} mnats, first-order estimate {estimate:6.1f}  {name}")
    print(f"rank correlation {spearmanr([row[0] for row in rows], [row[2] for row in rows]).statistic:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
