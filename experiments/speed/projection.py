"""How long one budget projection takes, on one thread: ``python experiments/speed/projection.py``.

It does not depend on the number of units, so that it stays far below an episode's cost at every size of model.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np

from ffgym.pruning.budget import Budget
from ffgym.types import Sublayer

REPETITIONS = 201

# hidden size, layers, KV groups, query heads a group, head size, intermediate channels, milliseconds wanted at most
SHAPES = {
    "SmolLM2-135M": (576, 30, 3, 3, 64, 1_536, 1.0),
    "Llama-3-8B": (4_096, 32, 8, 4, 128, 14_336, 2.0),
    "Llama-3-70B": (8_192, 80, 8, 8, 128, 28_672, 5.0),
}


def sublayers(hidden: int, layers: int, groups: int, heads: int, size: int, channels: int) -> list[Sublayer]:
    group = hidden * size * (2 * heads + 2)
    attention = Sublayer(0, "attention", groups, heads * size, group, group, query_heads_per_unit=heads, head_dim=size)
    mlp = Sublayer(0, "mlp", channels, 1, 3 * hidden, 3 * hidden)
    return [replace(half, layer=layer) for layer in range(layers) for half in (attention, mlp)]


def main() -> None:
    rng = np.random.default_rng(0)
    print("| model | levels | median, ms | max, ms | wanted at most, ms |\n|---|---|---|---|---|")
    for name, (*shape, wanted) in SHAPES.items():
        model = sublayers(*(int(size) for size in shape))
        budget = Budget(model)
        times = []
        for _ in range(REPETITIONS):
            importance, sparsity = rng.uniform(-1, 1, len(model)), rng.uniform(0.1, 0.5)
            begun = time.perf_counter()
            budget.project(importance, sparsity)
            times.append(1e3 * (time.perf_counter() - begun))
        levels = sum(sublayer.units for sublayer in model)
        print(f"| {name} | {levels:,} | {statistics.median(times):.2f} | {max(times):.2f} | {wanted:g} |")


if __name__ == "__main__":
    main()
