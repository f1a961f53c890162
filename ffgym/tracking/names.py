"""What a run's numbers and settings are called in MLflow, the same in runs, cells of a bench and points of a range."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ffgym.config.toml import INDIFFERENT, flatten

# Results that people compare have short names that sort before all others: MLflow plots the first three.
SHORT_NAMES = {
    "agent.name": "agent",
    "criterion.name": "criterion",
    "search.episodes": "episodes",
    "model.name": "model",
    "prior.name": "prior",
    "prune.resource": "resource",
    "reward.name": "reward",
    "seed": "seed",
    "prune.sparsity": "sparsity",
}
OTHERS = "toml."  # prefix of all other parameters, which are keys of config.toml
SWITCHES = {"recover": ["method"], "prior": ["name"], "schedule": ["sparsity", "fidelity"]}  # all "none": unused


@dataclass(frozen=True)
class Result:
    """The result of a run, measured on the report split; ``None`` for what was not measured."""

    perplexity: float  # of the model that was saved, or would be
    dense_perplexity: float | None = None
    sparsity: float | None = None  # share of the budget's resource removed over the prunable sublayers, in [0, 1]
    params: float | None = None
    search_tokens: int | None = None  # tokens that the agent's episodes took
    seconds: float | None = None  # wall time of search and finals
    # share of task examples answered right, where the reward weighs it; on examples of the search split
    accuracy: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics that MLflow has of it, all under ``result/``."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        if dense := named.pop("dense_perplexity"):
            ratio = self.perplexity / dense
            named |= {"ratio_to_dense": ratio, "nats_above_dense": math.log(ratio) if ratio > 0 else math.nan}
        return {f"result/{name}": float(value) for name, value in named.items() if value is not None}


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that decide a run, by the names that MLflow knows them by.

    Args:
        config: nested tables; ``{"agent": {"name": "ppo", "epochs": 4}}`` gives ``agent`` and ``toml.agent.epochs``.
    """
    flat = flatten(config)
    if flat.get("agent.name") == "one-shot":
        flat["agent.name"] = flat.get("prior.name")  # named as in the report, after the heuristic
    unused = {
        table for table, switches in SWITCHES.items() if all(flat.get(f"{table}.{key}") == "none" for key in switches)
    }
    named: dict[str, str] = {}
    for key, value in flat.items():
        table = key.partition(".")[0]
        if value is None or table in INDIFFERENT or (table in unused and key not in SHORT_NAMES):
            continue
        named[SHORT_NAMES.get(key) or OTHERS + re.sub(r"[^\w\-.:/ ]", "_", key)] = str(value)
    return named
