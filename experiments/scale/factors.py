"""What factors and refits come to at scale, by count, and measured on single layers.

    python experiments/scale/factors.py             # the tables of factors.md: bytes and operations, nothing is run
    OMP_NUM_THREADS=1 python experiments/scale/factors.py 8B    # one layer of that shape; 70B takes 6 GB

A refit is that of an update of 8 episodes at 20 %, as `ffgym plan` counts it; its share is of the update's operations.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaModel

from ffgym.plan.counts import factors, forward, refit
from ffgym.plan.shape import ModelShape, RunLoad, shape_of
from ffgym.pruning.calibration import NestedRidge
from ffgym.pruning.factors import factor_dtype, packed_size

EPISODES, SPARSITY, WINDOW = 8, 0.2, 1024
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
MEASURED_TOKENS, REPETITIONS = 2048, 5
SIZES = {
    "demo": (576, 1536, 30, 9, 3, 49152),
    "1.3B": (2048, 5632, 28, 32, 4, 32000),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "13B": (5120, 13824, 40, 40, 40, 32000),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
"""Hidden size, intermediate size, layers, query heads, key/value heads, vocabulary."""


def config_of(name: str, layers: int | None = None, vocabulary: int | None = None) -> LlamaConfig:
    hidden, intermediate, depth, heads, groups, tokens = SIZES[name]
    return LlamaConfig(
        vocab_size=vocabulary or tokens,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=name == "demo",
        dtype=torch.bfloat16,
    )


def one_by_one(shape: ModelShape) -> float:
    """Operations of an update's refits, each made directly from the whole square of D."""
    kept = 1 - SPARSITY
    return EPISODES * sum(2 * shape.hidden * s.channels**2 * kept * (1 - kept) for s in shape.sublayers)


def tables() -> None:
    """Print bytes, and shares of an update's operations."""
    print(
        f"Factors, and the refits' share of an update of {EPISODES} episodes at {SPARSITY:.0%}, by tokens an episode."
    )
    print("In brackets: factors as float32 squares, and refits made one by one from them.\n")
    print("| shape | factors, GiB | " + " | ".join(f"{tokens:,}" for tokens in TOKENS) + " |")
    print("|---" * (2 + len(TOKENS)) + "|")
    for name in SIZES:
        shape = shape_of(config_of(name), name)
        load = RunLoad(WINDOW, 0, (SPARSITY,), torch.bfloat16, WINDOW)
        before = sum(4 * s.channels * (shape.hidden + s.channels) for s in shape.sublayers)
        cells = [f"{factors(shape) / 2**30:.1f} ({before / 2**30:.1f})"]
        for tokens in TOKENS:
            others = EPISODES * tokens * forward(shape, load, sparsity=SPARSITY)
            now, then = refit(shape, SPARSITY, EPISODES), one_by_one(shape)
            cells.append(f"{now / (now + others):.1%} ({then / (then + others):.1%})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def cpu_seconds(action: Callable[[], object]) -> float:
    begun = time.process_time()
    action()
    return time.process_time() - begun


@torch.inference_mode()
def measure(name: str) -> None:
    """Print what the MLP's refits of an update cost beside the layer's forward pass."""
    config = config_of(name, layers=1, vocabulary=128)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaModel(config).eval()
    torch.set_default_dtype(torch.float32)
    weight = model.layers[0].mlp.down_proj.weight
    n, dtype = weight.shape[1], factor_dtype(weight.shape[1])
    made = {
        "projected": torch.randn(weight.shape).to(dtype),
        "inverse": torch.randn(packed_size(n), dtype=dtype),
        "removal_error": torch.zeros(n + 1),
    }
    path = NestedRidge.restored(weight, made, None)
    spread = torch.linspace(-0.5, 0.5, EPISODES).tolist()
    levels = [round((1 - SPARSITY * (1 + each)) * n) for each in spread]
    ids = torch.zeros(MEASURED_TOKENS // WINDOW, WINDOW, dtype=torch.long)

    def refits() -> None:
        for _, refitted in path.weights_at(levels):
            refitted.to(weight.dtype)

    pairs = [(cpu_seconds(refits), cpu_seconds(lambda: model(ids))) for _ in range(REPETITIONS + 1)][1:]
    one = statistics.median(seconds for seconds, _ in pairs) / EPISODES
    whole = statistics.median(seconds for _, seconds in pairs)
    share = statistics.median(seconds / EPISODES / own for seconds, own in pairs)
    print(f"{name}: n = {n:,}, {torch.get_num_threads()} thread, CPU seconds, medians of {REPETITIONS} pairs")
    print(f"refit of an episode, in an update of {EPISODES}: {one:.3f} s")
    print(f"the dense layer on {MEASURED_TOKENS:,} tokens: {whole:.3f} s")
    print(f"refit / layer: {share:.3f}; at 8,192 tokens an episode {share * MEASURED_TOKENS / 8192:.3f}")


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else tables()
