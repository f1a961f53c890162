"""One search on reward windows, and its recommendation on development windows: how settings of searches are chosen.

    python experiments/development/develop.py NAME SPARSITY SEED TOKENS [TABLES as JSON, {"agent": {"name": "ppo"}}]

The finals are left out: what is compared is what the policy recommends. The development windows follow the search split
in its corpus, so neither rewards nor the report text have anything to do with them. A result goes to results/.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ffgym.config.toml import load_config
from ffgym.envs.pruning_env import PruningEnv, Trial
from ffgym.envs.vector import PruningVectorEnv
from ffgym.pipeline.agent import make_agent
from ffgym.pipeline.task import Task, give_prior, open_task
from ffgym.prepare.configured import schedule_of
from ffgym.report.progress import Reporter

WINDOW, SEARCH_WINDOWS, RESERVED, DEVELOPMENT_WINDOWS = 1024, 128, 32, 32
EPISODE_TOKENS = 2 * WINDOW
DATA = {"search_tokens": SEARCH_WINDOWS * WINDOW, "report": "demo:c4", "report_tokens": DEVELOPMENT_WINDOWS * WINDOW}


def on_development(task: Task, *allocations: Sequence[int], windows: int = DEVELOPMENT_WINDOWS) -> list[list[float]]:
    """Losses of allocations, as units kept, on each of the first development windows."""
    env, everywhere = task.env, tuple(range(windows))
    development = PruningEnv(
        env.prunable,
        env.reward,
        task.splits.report.windows,
        env.budget,
        sparsity=env.sparsity,
        calibrated=env.calibrated,
    )
    outcomes = development.outcomes([Trial(env.budget.allocation(kept), everywhere) for kept in allocations])
    return [list(outcome.pruned.losses) for outcome in outcomes]


def main(name: str, sparsity: float, seed: int, tokens: int, tables: dict[str, Any]) -> None:
    """Search, measure and write results/NAME-PERCENT-seedN.json."""
    search = {
        "episode_tokens": EPISODE_TOKENS,
        "episodes": tokens // EPISODE_TOKENS,
        "final_tokens": RESERVED * WINDOW,
        **tables.pop("search", {}),
    }
    prune = {"sparsity": sparsity, **tables.pop("prune", {})}
    config = load_config(seed=seed, data=DATA, prune=prune, search=search, **tables)
    task = open_task(config, [(config.prior.name, config.prior.options)], Reporter(Console(stderr=True)))
    agent, env = make_agent(config), task.env
    give_prior(agent, task)
    size = agent.update_size(config.search.episodes_per_update)
    vector = PruningVectorEnv(
        env,
        schedule_of(config),
        num_envs=size,
        token_budget=tokens,
        slope_episodes=agent.slope_episodes,
        pair_text=agent.pair_text,
    )
    observation = np.array([sparsity, 1.0], dtype=np.float32)
    kept = {"prior": task.project(config.prior.name, config.prior.options).kept}

    agent.learn(vector, seed=seed, on_update=lambda update: None)
    labels = ("final", "clearer", "slopes")  # three of `reinforce` where it has tried units, one of others
    for label, importance in zip(labels, agent.recommend(observation), strict=False):
        kept[label] = env.budget.project(importance, sparsity).kept
    losses = dict(zip(kept, on_development(task, *kept.values()), strict=True))
    gains = 1000 * (np.array(losses["prior"]) - np.array(losses["final"]))
    error = gains.std(ddof=1) / len(gains) ** 0.5
    print(f"{name}, {sparsity:.0%}, seed {seed}: {gains.mean():.1f} ± {error:.1f} mnats better than the prior")
    tables = {**tables, "prune": prune}
    result = {"name": name, "sparsity": sparsity, "seed": seed, "tokens": vector.tokens_spent, "tables": tables}
    file = Path(__file__).parent / "results" / f"{name}-{sparsity * 100:.0f}-seed{seed}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**result, "losses": losses, "kept": kept}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    name, sparsity, seed, tokens, *tables = sys.argv[1:]
    main(name, float(sparsity), int(seed), int(tokens), json.loads(tables[0]) if tables else {})
