"""How fast an update is, in one process, medians of interleaved repetitions: ``make bench``.

The first eight episodes of a search at 20 %, measured layer by layer in one call, against eight evaluations of the
dense model on the same tokens.
"""

from __future__ import annotations

import statistics

import numpy as np
import torch
from episode import TOKENS, seconds, spread
from rich.console import Console

from ffgym.agents.reinforce import Reinforce
from ffgym.config.tables import RunConfig
from ffgym.evaluation.evaluator import Request
from ffgym.evaluation.perplexity import evaluate
from ffgym.pipeline.task import give_prior, open_task
from ffgym.report.progress import Reporter

EPISODES = 8
REPETITIONS = 5
WANTED = 0.90


def main() -> None:
    config = RunConfig.model_validate({"search": {"episode_tokens": TOKENS}})
    task = open_task(config, [(config.prior.name, config.prior.options)], Reporter(Console(quiet=True)))
    env, agent = task.env, Reinforce()
    give_prior(agent, task)
    agent.begin(dimensions=len(env.budget.sublayers), batch=EPISODES, seed=config.seed)
    actions = agent.ask(np.array([[config.prune.target, 1.0]] * EPISODES, np.float32))
    subset = tuple(range(TOKENS // config.data.window))
    kept = [env.budget.project(action, config.prune.target).kept for action in actions]
    windows = env.windows[list(subset)]

    def dense() -> None:
        for _ in range(EPISODES):
            evaluate(env.prunable.model, windows, tokens_per_batch=env.tokens_per_batch)

    def update() -> None:
        env.executor.measure([Request(each, subset) for each in kept])

    times = [(seconds(dense), seconds(update)) for _ in range(REPETITIONS + 1)][1:]  # the first one warms up
    ratio = statistics.median(one / eight for eight, one in times)
    print(f"threads {torch.get_num_threads()}, {task.loaded.dtype}, {EPISODES} episodes of {TOKENS} tokens at 20 %")
    print(f"dense, {EPISODES} times  {spread([eight for eight, _ in times])}")
    print(f"update          {spread([one for _, one in times])}")
    print(f"update / dense  {ratio:.3f}, wanted at most {WANTED:.2f}")


if __name__ == "__main__":
    main()
