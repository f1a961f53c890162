"""What preparing a random model costs: CPU seconds and peak memory, by part.

    OMP_NUM_THREADS=1 FFGYM_CACHE_SIZE=0 python experiments/scale/preparing.py 0.36
    OMP_NUM_THREADS=1 FFGYM_CACHE_SIZE=0 python experiments/scale/preparing.py 1.07
    OMP_NUM_THREADS=1 FFGYM_CACHE_SIZE=0 python experiments/scale/preparing.py 1.07 4   # only so many of its layers

8,192 calibration tokens in windows of 1,024, criterion wanda, lambda chosen, bfloat16, no store. CPU seconds are user
and system time of the process, without making the model.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ffgym.criteria.wanda import Wanda
from ffgym.prepare import paths
from ffgym.pruning.calibration import NestedRidge
from ffgym.pruning.statistics import Moments

TOKENS, WINDOW = 8192, 1024
SIZES = {
    "0.36": (960, 2560, 32, 15, 5),
    "1.07": (2048, 5632, 22, 32, 4),
}
"""Hidden size, intermediate size, layers, query heads, key/value heads, by billions of parameters."""
PARTS = (
    (paths, "pick_ridge", "choosing lambda"),
    (NestedRidge, "__init__", "factors"),
    (Moments, "update", "moments"),
)
"""What is timed: its owner, its name there, and what it is called in the table."""


def random_model(size: str, layers: int | None) -> Any:
    """A Llama with random weights in bfloat16."""
    hidden, intermediate, depth, heads, groups = SIZES[size]
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def timed(times: dict[str, float], name: str, action: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with its CPU seconds added to ``times``."""

    @wraps(action)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        try:
            return action(*args, **kwargs)
        finally:
            times[name] += time.process_time() - begun

    return wrapped


def main(size: str, layers: int | None = None) -> None:
    model, times = random_model(size, layers), defaultdict[str, float](float)
    parameters = sum(p.numel() for p in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for owner, name, part in PARTS:
        setattr(owner, name, timed(times, part, getattr(owner, name)))
    windows = torch.randint(0, 49152, (TOKENS // WINDOW, WINDOW), generator=torch.Generator().manual_seed(0))
    begun = time.process_time()
    prepared = paths.prepare(model, Wanda(), windows)
    whole = time.process_time() - begun
    times["the rest, the model's forward pass most of it"] = whole - sum(times.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refits = [half.path for half in prepared.prunable.halves if isinstance(half.path, NestedRidge)]
    factors = sum(factor.nbytes for refit in refits for factor in refit.factors.values())
    print(f"{parameters / 1e9:.2f} billion parameters, {torch.get_num_threads()} thread, {TOKENS:,} tokens")
    for name, seconds in times.items():
        print(f"{seconds:7.1f} s  {name}")
    print(f"{whole:7.1f} s  in all, CPU time")
    print(f"{peak / 2**20:7.2f} GiB peak resident, {before / 2**20:.2f} before, {factors / 2**30:.2f} of it factors")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
