"""Depth pruning for a latency budget: whole attentions and MLPs of the demo model go, one by one.

    python experiments/serving/depth.py TABLE SPARSITY FOLDER

Each step drops the sublayer whose loss on search text grows least for the time that it saves, until the share that is
gone of the time in TABLE (of `ffgym latency`) is as near to SPARSITY as it gets. What dropping one costs is measured
again whenever it seems to be the next (lazy greedy). FOLDER gets the model.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from rich.console import Console

from ffgym.config.toml import load_config
from ffgym.evaluation.perplexity import evaluate
from ffgym.export.checkpoint import save_pruned
from ffgym.pipeline.task import open_task
from ffgym.report.progress import Reporter

TOKENS = 4096


def main(table: Path, sparsity: float, folder: Path) -> None:
    context = json.loads(table.read_text())["context"]
    config = load_config(
        prune={
            "sparsity": sparsity,
            "resource": "latency",
            "latency_table": str(table),
            "context": context,
            "min_units": 0,
        },
        tracking={"enabled": False},
    )
    task = open_task(config, [], Reporter(Console(stderr=True)))
    prunable, budget = task.prepared.prunable, task.env.budget
    windows = task.splits.search.windows[: TOKENS // config.data.window]
    kept = list(prunable.dense_units)
    names = [sublayer.name for sublayer in prunable.sublayers]

    def without(index: int) -> list[int]:
        return [*kept[:index], 0, *kept[index + 1 :]]

    def loss(units: list[int]) -> float:
        prunable.cut(units, calibrated=False)
        return evaluate(prunable.model, windows).loss

    # All but the attention of layer 0, where transformers reads the length of the KV cache: no checkpoint can lack it.
    now, prices = loss(kept), dict.fromkeys(range(1, len(kept)), -math.inf)
    while True:
        known: dict[int, float] = {}
        while (best := min(prices, key=lambda index: prices[index])) not in known:
            known[best] = loss(without(best))
            saved = budget.allocation(without(best)).sparsity - budget.allocation(kept).sparsity
            prices[best] = (known[best] - now) / saved
        if budget.allocation(kept).sparsity + budget.allocation(without(best)).sparsity > 2 * sparsity:
            break
        kept[best], now = 0, known[best]
        del prices[best]
        done = budget.allocation(kept).sparsity
        print(f"without {names[best]}: loss {now:.4f}, {done:.1%} of the time saved", flush=True)
    prunable.cut(kept, calibrated=False)
    save_pruned(prunable, task.loaded.tokenizer, folder)
    print(f"saved: {folder}, without {', '.join(n for n, k in zip(names, kept, strict=True) if not k)}")


if __name__ == "__main__":
    if Path(sys.argv[3]).exists():  # it would be refused when the search is over
        sys.exit(f"{sys.argv[3]} exists: name another folder, or delete it")
    main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
