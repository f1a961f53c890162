"""What a random model takes on a GPU, with its layers in memory and streamed: time, refits' share, memory, the plan.

    python experiments/gpu/on_gpu.py [--shape 8B | 1B | tiny] [--device cuda] [--work DIR]

Prepares with 32,768 calibration tokens (criterion wanda, lambda 0.01, bfloat16), then measures an update of 16 episodes
of 2,048 tokens, each cut by 20 % elsewhere. The share of refits is what the same update takes less without them, in
interleaved repetitions. Peak memory is the allocator's. Prints the table, and writes it to SHAPE.md beside this file.
``tiny`` runs anywhere, and says only that the script works.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ffgym.costs.timing import timed
from ffgym.criteria.wanda import Wanda
from ffgym.evaluation.evaluator import ModelEvaluator, Request
from ffgym.models.placement import tokens_per_batch
from ffgym.models.stream import streamed_model
from ffgym.plan.counts import stages
from ffgym.plan.shape import RunLoad, shape_of
from ffgym.prepare.paths import OnLayer, Prepared, prepare
from ffgym.prepare.store import opened_or_prepared, store_key, weights_digest

WINDOW, EPISODE_WINDOWS, EPISODES, CALIBRATION, SPARSITY, RIDGE = 1024, 2, 16, 32, 0.2, 0.01
REPETITIONS = 3
SHAPES = {  # hidden, intermediate, layers, query heads, key/value heads, vocabulary
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (64, 192, 3, 4, 2, 512),
}


def checkpoint(shape: str, folder: Path) -> Path:
    """Write random weights in bfloat16, in shards."""
    hidden, intermediate, layers, heads, groups, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="2GB")
    return folder


def prepared(folder: Path, windows: torch.Tensor, device: torch.device, *, streamed: bool) -> Prepared:
    """The model with its refits, in memory or layer by layer through the store."""
    criterion, size = Wanda(), tokens_per_batch(device)
    if not streamed:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device)
        return prepare(model.eval().requires_grad_(False), criterion, windows, ridge=RIDGE, tokens_per_batch=size)
    model, stream = streamed_model(folder.name, folder, torch.bfloat16, device)
    key = store_key(model, criterion, windows, {}, weights_digest(model, stream))

    def make(on_layer: OnLayer) -> Prepared:
        return prepare(model, criterion, windows, ridge=RIDGE, tokens_per_batch=size, source=stream, on_layer=on_layer)

    return opened_or_prepared(key, model, make, {"model": folder.name}, lambda line: None, stream)


def planned(folder: Path, device: torch.device, *, streamed: bool) -> int:
    """Bytes that the plan counts on the device at the peak of preparing and searching."""
    from transformers import AutoConfig

    load = RunLoad(
        window=WINDOW,
        calibration_tokens=CALIBRATION * WINDOW,
        targets=(SPARSITY,),
        dtype=torch.bfloat16,
        batch_tokens=tokens_per_batch(device),
        choose_ridge=False,
        episode_tokens=EPISODE_WINDOWS * WINDOW,
        episodes_per_update=EPISODES,
        streamed=streamed,
    )
    shape = replace(shape_of(AutoConfig.from_pretrained(folder), folder.name), saved_as="")  # as plans for a GPU do
    counted = stages(shape, load)
    return max(stage.peak - stage.memory["libraries"] for stage in counted)


def allocations(dense: tuple[int, ...]) -> list[tuple[int, ...]]:
    """As many as there are episodes: MLPs that lose 10 to 30 %, each another share in every layer."""
    rng = torch.Generator().manual_seed(0)
    shares = 1 - SPARSITY * (0.5 + torch.rand(EPISODES, len(dense), generator=rng))
    return [
        tuple(units if i % 2 == 0 else round(units * float(row[i])) for i, units in enumerate(dense)) for row in shares
    ]


def measured(folder: Path, device: torch.device, *, streamed: bool) -> list[str]:
    """A row of the table."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    vocabulary = SHAPES[folder.name][-1]
    tokens = torch.randint(3, vocabulary, (CALIBRATION + 4, WINDOW), generator=torch.Generator().manual_seed(1))
    found, preparing = timed(lambda: prepared(folder, tokens[:CALIBRATION], device, streamed=streamed), {device})
    prunable = found.prunable
    requests = [Request(kept, tuple(range(EPISODE_WINDOWS))) for kept in allocations(prunable.dense_units)]
    ways = [
        ModelEvaluator(prunable, tokens[CALIBRATION:], calibrated=refits, tokens_per_batch=tokens_per_batch(device))
        for refits in (True, False)
    ]
    times: list[list[float]] = [[], []]
    for _ in range(1 + REPETITIONS):  # the first one warms up
        for way, taken in zip(ways, times, strict=True):
            taken.append(timed(partial(way.measure, requests), {device})[1])
    update, plain = (statistics.median(taken[1:]) for taken in times)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    plan = planned(folder, device, streamed=streamed)
    return [
        "streamed" if streamed else "in memory",
        f"{preparing:.1f} s",
        f"{update:.2f} s ({min(times[0][1:]):.2f} to {max(times[0][1:]):.2f})",
        f"{1 - plain / update:.0%}",
        f"{peak / 1e9:.2f} GB" if peak else "not known",
        f"{plan / 1e9:.2f} GB",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8B")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--work", type=Path, default=Path(), help="where there is room for the model and its store")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="on-gpu-", dir=options.work.resolve()) as scratch:
        os.environ |= {"FFGYM_CACHE": str(Path(scratch, "cache")), "FFGYM_CACHE_SIZE": "1TB"}
        folder = checkpoint(options.shape, Path(scratch, options.shape))
        rows = [measured(folder, options.device, streamed=streamed) for streamed in (False, True)]
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else str(options.device)
    head = ["layers", "preparing", f"an update of {EPISODES}", "refits of it", "peak memory", "planned"]
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *rows)]
    table = f"Llama of {options.shape} shape on {name}, torch {torch.__version__}\n\n" + "\n".join(
        f"| {line} |" for line in lines
    )
    print(table)
    if options.shape != "tiny":
        (Path(__file__).parent / f"{options.shape}.md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
