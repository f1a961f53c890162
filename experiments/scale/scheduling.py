"""How well the pool keeps workers busy: ``python experiments/scale/scheduling.py``.

Workers are threads that sleep a known time for each episode, so two cores can stand in for a cluster of 64. What is
measured is the scheduling alone: no model, no network, no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sleeping import SleepingCrew

from ffgym.evaluation.evaluator import Request
from ffgym.execute.pool import Pool
from ffgym.execute.shares import Shares, Speeds

EPISODES, SECONDS, UPDATES, LOADING = 128, 1.0, 4, 3.0
STRAGGLERS, SLOWER, LOST = 4, 3.0, 10  # the first four workers take three times as long; worker 10 dies


def updates(crew: SleepingCrew, size: int) -> list[float]:
    """Seconds that each of some updates takes, the first after all workers have started."""
    pool, speeds, found = Pool(crew, size, print), Speeds(), []
    pool.work(Shares([Request((-i,), (0,)) for i in range(1, size + 1)], Speeds()), size)
    for update in range(UPDATES):
        asked = [Request((update, i), (0,)) for i in range(EPISODES)]
        begun = time.monotonic()
        pool.work(Shares(asked, speeds), EPISODES)
        found.append(time.monotonic() - begun)
    pool.close()
    return found


def best(seconds: list[float]) -> float:
    """The shortest time in which these workers, each with its seconds for an episode, can do all episodes."""
    ends = sorted(s * count for s in seconds for count in range(1, EPISODES + 1))
    return next(end for end in ends if sum(int(end / s + 1e-9) for s in seconds) >= EPISODES)


def row(label: str, taken: list[float], bounds: list[float]) -> str:
    shown = " / ".join(f"{each:.2f}" for each in taken)
    least = " / ".join(f"{each:.2f}" for each in bounds)
    over = " / ".join(f"{bound / each:.1%}" for each, bound in zip(taken, bounds, strict=True))
    return f"| {label} | {shown} | {least} | {over} |"


def main() -> None:
    lines = [
        f"Updates of {EPISODES} episodes of {SECONDS:g} s, {UPDATES} in a row. Workers are threads that sleep.",
        "*Best* is the shortest time in which any schedule could end, had it known everything beforehand.",
        "",
        "| workers | seconds of each update | best | best / taken |",
        "|---|---|---|---|",
    ]
    for size in (8, 16, 32, 64):
        crew = SleepingCrew(lambda worker: SECONDS)
        lines.append(row(f"{size}, equal", updates(crew, size), [SECONDS * -(-EPISODES // size)] * UPDATES))

    pace: Callable[[int], float] = lambda worker: SECONDS * (SLOWER if worker < STRAGGLERS else 1.0)  # noqa: E731
    crew = SleepingCrew(pace, LOADING, dies=lambda worker, job: (worker, job) == (LOST, 2))
    taken = updates(crew, 64)
    all_of_them = [pace(worker) for worker in range(64)]
    others = [each for worker, each in enumerate(all_of_them) if worker != LOST]
    bounds = [best(others), *[best(all_of_them)] * (UPDATES - 1)]
    label = f"64, {STRAGGLERS} of them {SLOWER:g} times slower, one dies in the first update, back {LOADING:g} s later"
    lines.append(row(label, taken, bounds))
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
