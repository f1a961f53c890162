"""Two workers of one thread against one process of two, and what Ray adds: ``make bench``.

The first part measures updates of the demo model in turns, so that a busy machine is busy for both. The second has two
workers sleep a second for each episode: whatever is beyond that is Ray's, and the pool's.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ffgym.config.tables import RunConfig
from ffgym.evaluation.evaluator import Request
from ffgym.execute.ray import Workers, connected
from ffgym.pipeline.task import open_task
from ffgym.prepare.workers import shared_executor
from ffgym.report.progress import Reporter
from ffgym.types import Evaluation, OnShare, do_nothing

EPISODES, REPETITIONS, SLEPT = 8, 5, 1.0


@dataclass(frozen=True)
class Sleeper:
    """Makes an evaluator that sleeps for every request."""

    def __call__(self) -> Sleeper:
        return self

    def measure(self, requests: Sequence[Request], on_progress: OnShare = do_nothing) -> list[Evaluation]:
        for _ in requests:
            time.sleep(SLEPT)
        return [Evaluation((0.0,), 1) for _ in requests]


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def overhead() -> None:
    with connected(Workers(2), print) as cluster:
        executor = cluster.executor(Sleeper(), Sleeper(), ())
        asked = [Request((i,), (0,)) for i in range(EPISODES)]
        executor.measure(asked)  # until both have started
        taken = [seconds(lambda: executor.measure(asked)) for _ in range(REPETITIONS)]
    least = SLEPT * EPISODES / 2
    shares = sorted(each / least - 1 for each in taken)
    print(
        f"updates of {EPISODES} episodes of {SLEPT:g} s on 2 workers: "
        f"{statistics.median(taken):.3f} s, at least {least:g}"
    )
    print(f"overhead, median (largest)  {statistics.median(shares):.2%} ({shares[-1]:.2%}), wanted at most 2 %")


def throughput(config: RunConfig) -> None:
    torch.set_num_threads(1)  # workers open what is prepared here, and have one each
    task = open_task(config, [], Reporter(Console(stderr=True)))
    env, subset = task.env, tuple(range(task.env.episode_windows))
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(EPISODES)]
    asked = [Request(env.budget.project(action, config.prune.target).kept, subset) for action in actions]
    with connected(Workers(2), print) as cluster:
        executor = shared_executor(cluster, config, task.loaded, task.prepared, task.splits)
        executor.measure(asked)
        ratios = []
        for _ in range(REPETITIONS):
            torch.set_num_threads(2)
            alone = seconds(lambda: env.executor.measure(asked))
            torch.set_num_threads(1)
            ratios.append(alone / seconds(lambda: executor.measure(asked)))
    tokens = config.search.episode_tokens
    print(f"{config.model.name}, updates of {EPISODES} episodes of {tokens} tokens, {REPETITIONS} in turns")
    print(f"2 workers of 1 thread are {statistics.median(ratios):.2f} times as fast as 1 process of 2 threads")
    print(f"from {min(ratios):.2f} to {max(ratios):.2f} times")


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])  # workers import this file
    sys.modules["throughput"] = sys.modules["__main__"]
    overhead()
    if "--overhead" not in sys.argv:
        throughput(RunConfig())
