"""What a run's numbers and settings are called in MLflow, the same in runs, cells of a bench and points of a range.

Runs of earlier versions have other names, which `earlier_result` knows.
"""

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
    """The result of a run, measured on the report split; ``None`` for what was not measured.

    Attributes:
        perplexity: of the model that was saved, or would be.
        sparsity: share of the budget's resource removed over the prunable sublayers, in [0, 1].
        search_tokens: tokens that the agent's episodes took.
        seconds: wall time of search and finals.
        accuracy: share of task examples answered right, where the reward weighs it; on examples of the search split.
    """

    perplexity: float
    dense_perplexity: float | None = None
    sparsity: float | None = None
    params: float | None = None
    search_tokens: int | None = None
    seconds: float | None = None
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
        flat["agent.name"] = f"{flat.get('prior.name')} (one-shot)"  # named as in the report, after the heuristic
    unused = {
        table for table, switches in SWITCHES.items() if all(flat.get(f"{table}.{key}") == "none" for key in switches)
    }
    named: dict[str, str] = {}
    for key, value in flat.items():
        table = key.partition(".")[0]
        if value is None or table in INDIFFERENT or (table in unused and key not in SHORT_NAMES):
            continue
        name = SHORT_NAMES.get(key) or OTHERS + re.sub(r"[^\w\-.:/ ]", "_", key)
        while name in named:  # keys that differ only in characters that MLflow does not take
            name += "_"
        named[name] = str(value)
    return named


def setting(params: Mapping[str, str], key: str) -> str | None:
    """A setting of a tracked run by its key in ``config.toml``, whatever version logged it."""
    return params.get(SHORT_NAMES.get(key, OTHERS + key), params.get(key))


def earlier_result(params: Mapping[str, str], metrics: Mapping[str, float]) -> Result | None:
    """The result of a run that was tracked before there were metrics under ``result/``.

    A run had ``report/perplexity/LABEL`` for every row of its table, a cell of a bench ``report/perplexity``, a run
    over a range ``front/perplexity/LABEL``. The row that was saved was not marked: of the found allocation's refits,
    the one with the lowest perplexity is taken.
    """
    if (cell := metrics.get("report/perplexity")) is not None:
        return Result(cell)
    agent = params.get("agent.name", "")
    found = slug(f"{params.get('prior.name')} (one-shot)" if agent == "one-shot" else agent)
    own = re.compile(rf"(report|front)/perplexity/{re.escape(found)}(-.+)?")
    rows = {name: value for name, value in metrics.items() if own.fullmatch(name) and not name.endswith("-plain")}
    if not agent or not rows:
        return None
    best = min(rows, key=lambda name: (name.startswith("front/"), math.isnan(rows[name]), rows[name]))
    row = best.rpartition("/")[2]
    return Result(
        rows[best],
        metrics.get("report/perplexity/dense"),
        metrics.get(f"report/sparsity_prunable/{row}"),
        metrics.get(f"report/parameters/{row}"),
    )


def slug(label: str) -> str:
    """What the label of a row became in a name: ``"uniform + ridge"`` is ``"uniform-ridge"``."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
