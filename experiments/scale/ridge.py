"""Whether the lambda that a third of the work chooses is as good on text that neither has seen as that of all of it.

    OMP_NUM_THREADS=1 FFGYM_CACHE_SIZE=0 python experiments/scale/ridge.py

prepares the demo model as a run does. In every fourth layer, half of the held-out inputs chooses lambda twice: as
`pick_ridge` does, and from all lambdas of the grid, at three levels, for all outputs. The other half, from other
windows, then says how far the output error of each is above that of the best lambda.
"""

from __future__ import annotations

import math
import statistics

import torch
from rich.console import Console

from ffgym.config.tables import RunConfig
from ffgym.criteria.wanda import Wanda
from ffgym.prepare import paths
from ffgym.prepare.parts import load_parts
from ffgym.pruning.calibration import RIDGE_GRID, cholesky_, pick_ridge, refit_outputs

LEVELS = (0.9, 0.75, 0.5)
EVERY = 4  # layers


def errors(weight: torch.Tensor, moment: torch.Tensor, inputs: torch.Tensor) -> dict[float, list[float]]:
    """Output errors by lambda, at every level."""
    W, X, G = weight.float(), inputs.float(), moment.float()
    found: dict[float, list[float]] = {}
    for ridge in RIDGE_GRID:
        lower = cholesky_(moment.clone(), ridge).float()
        found[ridge] = []
        for k in (round(level * len(G)) for level in LEVELS):
            outputs = refit_outputs(W, W[:, k:] @ G[k:, :k], lower, X, k)
            found[ridge].append(float((W @ X.T - outputs).square().sum()))
    return found


def main() -> None:
    calls, rows = 0, []

    def compare(weight: torch.Tensor, moment: torch.Tensor, held_out: torch.Tensor, mean: None) -> float:
        nonlocal calls
        calls += 1
        if (calls - 1) // 2 % EVERY == 1:
            one, other = held_out.chunk(2)
            all_of_it, elsewhere = errors(weight, moment, one), errors(weight, moment, other)
            thorough = min(RIDGE_GRID, key=lambda ridge: sum(map(math.log, all_of_it[ridge])))
            chosen = pick_ridge(weight, moment, one)
            best = [min(elsewhere[ridge][i] for ridge in RIDGE_GRID) for i in range(len(LEVELS))]
            above = [[100 * (elsewhere[r][i] / best[i] - 1) for i in range(len(LEVELS))] for r in (chosen, thorough)]
            rows.append(above)
            kind = "mlp" if calls % 2 == 0 else "attention"
            text = " | ".join("  ".join(f"{x:6.2f} %" for x in row) for row in above)
            print(
                f"layer {(calls - 1) // 2:2} {kind:9} chosen {chosen:<5g} thorough {thorough:<5g} | {text}", flush=True
            )
        return pick_ridge(weight, moment, held_out, mean)

    setattr(paths, "pick_ridge", compare)  # noqa: B010 - in place of what prepares the model
    loaded, splits = load_parts(RunConfig())
    Console().print(f"Output error above the best lambda's, at {LEVELS}: chosen | thorough")
    paths.prepare(loaded.model, Wanda(), splits.calibration.windows)
    for which, name in enumerate(("chosen", "thorough")):
        means = (statistics.mean(row[which][i] for row in rows) for i in range(len(LEVELS)))
        print(f"mean, {name:9}", "  ".join(f"{mean:6.2f} %" for mean in means))


if __name__ == "__main__":
    main()
