"""How fast an episode is, in one process, medians of interleaved repetitions: ``make bench``.

Prints the cost of prune + calibrate + evaluate against the dense model's evaluation of the same tokens, what of it is
calibration, what summing up the loss tile by tile saves over a full matrix of logits, the peak memory of preparing and
searching, and how long the command line takes to answer.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ffgym.config.tables import RunConfig
from ffgym.evaluation.evaluator import Request
from ffgym.evaluation.perplexity import evaluate, predicting, token_losses
from ffgym.plugins import manager
from ffgym.plugins.bases import Heuristic
from ffgym.plugins.contracts import check_importance
from ffgym.prepare.parts import build_env, load_parts, make_budget, prepare_model
from ffgym.pruning.calibration import NestedRidge

TOKENS = 4096
REPETITIONS = 9


def seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} s (min {min(values):.3f}, max {max(values):.3f})"


def command(*arguments: str) -> list[float]:
    call = [sys.executable, "-m", "ffgym", *arguments]
    return [seconds(lambda: subprocess.run(call, check=True, capture_output=True)) for _ in range(5)]


def megabytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


@torch.inference_mode()
def loss_ratio(model: Any, windows: torch.Tensor) -> float:
    """Time of ``token_losses`` over that of the plain way, cross-entropy of all logits in float32; after a warm-up."""
    hidden, targets = predicting(model, windows)
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    head = model.get_output_embeddings()

    def plain() -> None:
        cross_entropy(head(hidden).float(), targets, reduction="none")

    rows = [(seconds(lambda: token_losses(model, hidden, targets)), seconds(plain)) for _ in range(REPETITIONS + 1)]
    return statistics.median(tiled / full for tiled, full in rows[1:])


def main() -> None:
    print(f"ffgym --help       {spread(command('--help'))}, wanted at most 0.5 s")
    print(f"ffgym ls criteria  {spread(command('ls', 'criteria'))}, wanted at most 1 s")
    config = RunConfig.model_validate({"search": {"episode_tokens": TOKENS}})
    loaded, splits = load_parts(config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    prepared = prepare_model(config, loaded, splits.calibration.windows)
    env = build_env(config, prepared, splits.search.windows, make_budget(config, loaded.model), loaded)
    prunable = prepared.prunable
    heuristic: Heuristic = manager.create("heuristic", "mlp-first", {"spare_first": 3, "spare_last": 1})
    allocation = env.budget.project(check_importance(heuristic, prepared.views), config.prune.target)
    subset = tuple(range(TOKENS // config.data.window))
    windows = splits.search.windows[list(subset)]
    batch = env.tokens_per_batch

    def forward() -> None:
        evaluate(prunable.model, windows, tokens_per_batch=batch)

    def episode() -> None:
        env.executor.measure([Request(allocation.kept, subset)])

    def cut(calibrated: bool) -> None:
        prunable.cut(allocation.kept, calibrated=calibrated)

    times: dict[str, list[float]] = {name: [] for name in ("dense", "episode", "calibration", "pruned forward")}
    for repetition in range(REPETITIONS + 1):
        row = {"dense": seconds(forward), "episode": seconds(episode)}
        plain = seconds(lambda: cut(False))
        row["calibration"] = max(0.0, seconds(lambda: cut(True)) - plain)
        row["pruned forward"] = seconds(forward)
        prunable.restore()
        if repetition:  # the first one warms up
            for name, value in row.items():
                times[name].append(value)
    print(f"threads {torch.get_num_threads()}, {loaded.dtype}, {TOKENS} tokens, sparsity {allocation.sparsity:.4f}")
    for name, values in times.items():
        print(f"{name:16}   {spread(values)}")
    ratio = [e / d for e, d in zip(times["episode"], times["dense"], strict=True)]
    share = [c / e for c, e in zip(times["calibration"], times["episode"], strict=True)]
    floor = [f / d for f, d in zip(times["pruned forward"], times["dense"], strict=True)]
    print(f"episode / dense    {statistics.median(ratio):.3f}, wanted at most 1.0")
    print(f"forward / dense    {statistics.median(floor):.3f}, the floor")
    print(f"calibration share  {statistics.median(share):.3f} of the episode, wanted at most 0.10")
    paths = [half.path for half in prunable.halves if isinstance(half.path, NestedRidge)]
    factors = sum(factor.nbytes for path in paths for factor in path.factors.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory        {megabytes(peak)}: {megabytes(before)} with model and text loaded, then")
    print(f"                   {megabytes(factors)} of factors; beyond both {megabytes(peak - before - factors)}")
    # last: the full matrix of logits would be the peak
    print(f"loss / full logits {loss_ratio(prunable.model, windows):.3f}")


if __name__ == "__main__":
    main()
