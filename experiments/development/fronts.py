"""Two searches over a range of sparsities, target by target: what their policies recommend, on development windows.

    python experiments/development/fronts.py RUN OTHER TARGET ...

RUN and OTHER are folders of `ffgym run --sparsity LOW:HIGH` on the demo model; a search that was interrupted before its
finals will do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from ffgym.config.toml import load_config
from ffgym.envs.pruning_env import PruningEnv, Trial
from ffgym.pipeline.task import open_task
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.report.progress import Reporter

WINDOWS = 32


def main(runs: list[str], targets: list[float]) -> None:
    data = {"report": "demo:c4", "report_tokens": WINDOWS * 1024}
    task = open_task(load_config(data=data), [("mlp-first", {})], Reporter(Console(stderr=True)))
    env = task.env
    development = PruningEnv(
        env.prunable, env.reward, task.splits.report.windows, env.budget, sparsity=0.2, calibrated=env.calibrated
    )
    print(f"| sparsity | `{runs[0]}` | `{runs[1]}` | `{runs[0]}` better by, mnats |\n|---:|---:|---:|---:|")
    for target in targets:
        trials = []
        for run in runs:
            policy = json.loads((Path(run) / "policy.json").read_text(encoding="utf-8"))
            agent: Agent = manager.create("agent", policy["agent"])
            agent.load_state(policy["state"])
            importance = agent.recommend(np.array([target, 1.0], dtype=np.float32))[-1]
            allocation = env.budget.allocation(env.budget.project(importance, target).kept)
            trials.append(Trial(allocation, tuple(range(WINDOWS))))
        one, other = (np.array(outcome.pruned.losses) for outcome in development.outcomes(trials))
        gains = 1000 * (other - one)
        error = gains.std(ddof=1) / len(gains) ** 0.5
        perplexities = " | ".join(f"{np.exp(losses.mean()):.2f}" for losses in (one, other))
        print(f"| {target:.0%} | {perplexities} | {gains.mean():.1f} ± {error:.1f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:3], [float(target) for target in sys.argv[3:]])
