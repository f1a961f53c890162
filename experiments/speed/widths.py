"""What the width of an MLP does to the speed of its products, on one thread: ``python experiments/speed/widths.py``.

The demo model's MLP, 576 channels in and out, on 2,048 tokens in bfloat16. Widths take turns, so that whatever else the
machine does slows all of them down.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn.functional import linear

WIDTHS = (1536, 1280, 1256, 1248, 1244, 1241, 1216, 1210)
TOKENS, HIDDEN, REPETITIONS = 2048, 576, 60


def milliseconds(states: torch.Tensor, weight: torch.Tensor) -> float:
    begun = time.process_time()
    linear(states, weight)
    return 1e3 * (time.process_time() - begun)


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    states = random(TOKENS, HIDDEN)
    products = {n: [(states, random(n, HIDDEN)), (random(TOKENS, n), random(HIDDEN, n))] for n in WIDTHS}
    first = {n: sum(milliseconds(*each) for each in pair) for n, pair in products.items()}
    times: dict[int, list[list[float]]] = {n: [[], []] for n in WIDTHS}
    for _ in range(REPETITIONS):
        for n, pair in products.items():
            for found, each in zip(times[n], pair, strict=True):
                found.append(milliseconds(*each))
    print("| width | up, ms | down, ms | up, GFLOP/s | down, GFLOP/s | first time, ms more |")
    print("|---:|---:|---:|---:|---:|---:|")
    for n in WIDTHS:
        up, down = map(statistics.median, times[n])
        speeds = [2e-6 * TOKENS * HIDDEN * n / each for each in (up, down)]
        print(f"| {n} | {up:.2f} | {down:.2f} | {speeds[0]:.0f} | {speeds[1]:.0f} | {first[n] - up - down:.1f} |")


if __name__ == "__main__":
    main()
