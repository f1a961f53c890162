"""How much of what a search compares is noise of the text: differences of mirrored pairs in loss and in divergence.

    python experiments/development/noise.py SPARSITY [SEED]

The pairs are those that `reinforce` would ask for at first if it explored with all tokens: the prior with noise shared
over depth, and with its opposite. Each pair is measured on the same windows of search text.
"""

from __future__ import annotations

import sys

import numpy as np
from rich.console import Console

from ffgym.agents.exploration import depth_covariance, square_root
from ffgym.agents.reinforce import ReinforceConfig
from ffgym.config.toml import load_config
from ffgym.envs.pruning_env import Trial
from ffgym.pipeline.task import open_task
from ffgym.report.progress import Reporter

WINDOW, WINDOWS, PAIRS = 1024, 32, 8


def signal_and_noise(differences: np.ndarray) -> tuple[float, float]:
    """Root mean squares over pairs: of the true difference, estimated without bias, and of one window's noise.

    Args:
        differences: shape (pairs, windows).
    """
    noise = differences.var(axis=1, ddof=1)
    signal = differences.mean(axis=1) ** 2 - noise / differences.shape[1]
    return float(np.sqrt(max(0.0, signal.mean()))), float(np.sqrt(noise.mean()))


def main(sparsity: float, seed: int) -> None:
    """Measure, and print a table."""
    config = load_config(
        seed=seed,
        reward={"name": "kl"},
        prune={"sparsity": sparsity},
        data={"search_tokens": 2 * WINDOWS * WINDOW, "report": "demo:c4", "report_tokens": WINDOW},
        search={"final_tokens": WINDOWS * WINDOW},
    )
    task = open_task(config, [(config.prior.name, config.prior.options)], Reporter(Console(stderr=True)))
    env, options = task.env, ReinforceConfig.model_validate({})
    prior = task.prior(config.prior.name, config.prior.options)
    root = options.spread * square_root(depth_covariance(len(prior), smooth=options.smooth))
    noise = np.random.default_rng(seed).standard_normal((PAIRS, len(prior))) @ root
    actions = np.clip(np.concatenate([prior + noise, prior - noise]), -1, 1).astype(np.float32)
    trials = [Trial(env.budget.project(action, sparsity), tuple(range(WINDOWS))) for action in actions]
    measured = [outcome.pruned for outcome in env.outcomes(trials)]
    found = {
        "loss": np.array([each.losses for each in measured]),
        "kl": np.array([each.kls for each in measured]),
    }
    differences = {name: values[:PAIRS] - values[PAIRS:] for name, values in found.items()}
    print(f"| {sparsity:.0%}, {PAIRS} pairs, {WINDOWS} windows | difference, mnats | noise of a window | of it |")
    print("|---|---:|---:|---:|")
    for name, values in differences.items():
        signal, spread = signal_and_noise(values)
        print(f"| `{name}` | {1000 * signal:.1f} | {1000 * spread:.1f} | {signal / spread:.2f} |")
    means = [values.mean(axis=1) for values in differences.values()]
    print(f"\nCorrelation of the pairs' mean differences: {np.corrcoef(means)[0, 1]:.2f}")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
