"""A run of a model that its process has no memory for: inside a limit, with the bits of a run without one.

    python experiments/scale/streaming.py FOLDER [--limit GIB] [--placement stream] [--layers 45 ...]

makes a random Llama and a text in FOLDER (1.3 billion parameters in bfloat16 by default), prepares it, searches two
updates of 4 episodes of 512 tokens, reports and saves, and prints what came out: time, the largest memory, and digests
of the store, the log of episodes, the report and the saved model.

The limit is RLIMIT_DATA: it counts all private memory that the process asks for, used or not. Files are read, not
mapped, so that nothing escapes it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

GIB = 2**30
WORDS = [f"w{i}" for i in range(500)]


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """Write a random Llama with a tokenizer: a shard for each layer, which is all that is in memory at a time."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=max(1, options.hidden // 512),
        vocab_size=options.vocabulary,
        max_position_embeddings=options.window,
        tie_word_embeddings=False,
    )
    with init_empty_weights():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.3f} billion parameters")
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    for file, group in itertools.groupby(model.state_dict().items(), lambda item: _shard(item[0])):
        tensors = {
            name: torch.randn(outline.shape, generator=generator).mul_(0.02).add_(outline.ndim == 1).bfloat16()
            for name, outline in group
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)


def _shard(name: str) -> str:
    parts = name.split(".")
    return f"model-{int(parts[2]):03}.safetensors" if parts[1] == "layers" else f"model-{parts[-2]}.safetensors"


def write_texts(folder: Path, window: int) -> None:
    """Random words: enough for the splits."""
    import numpy as np

    for seed, name in enumerate(("search.txt", "report.txt")):
        text = " ".join(np.random.default_rng(seed).choice(WORDS, 8 * window))
        (folder / name).write_text(text, encoding="utf-8")


def run_in(folder: Path, placement: str, window: int) -> None:
    """The run, and what came out of it."""
    from rich.console import Console

    from ffgym import run
    from ffgym.config.toml import load_config

    config = load_config(
        model={"name": str(folder / "model"), "dtype": "bfloat16", "device": "cpu", "placement": placement},
        data={
            "calibration": str(folder / "search.txt"),
            "search": str(folder / "search.txt"),
            "report": str(folder / "report.txt"),
            "window": window,
            "calibration_tokens": 2 * window,
            "search_tokens": 2 * window,
            "report_tokens": window,
        },
        prune={"ridge": 0.01, "sparsity": 0.2},
        search={
            "episodes": 8,
            "episodes_per_update": 4,
            "episode_tokens": window,
            "final_tokens": window,
            "random_baseline": False,
        },
        output={"dir": str(folder / "runs" / placement)},
        tracking={"enabled": False},
    )
    begun, cpu = time.monotonic(), time.process_time()
    result = run(config, progress=Console(stderr=True))
    memory = _status()
    print(f"placement {placement}: {time.monotonic() - begun:.0f} s, {time.process_time() - cpu:.0f} s of CPU time")
    print(f"largest resident memory {memory['VmHWM'] / GIB:.2f} GiB, private memory asked for at the end "
          f"{memory['VmData'] / GIB:.2f} GiB")  # fmt: skip
    report = [(row.label, row.perplexity) for row in result.table.rows]
    episodes = []
    for line in (result.folder / "episodes.jsonl").read_text().splitlines():
        episode = json.loads(line)
        episodes.append([episode.get(key) for key in ("kept", "loss", "reward", "importance")])
    store = Path(os.environ["FFGYM_CACHE"]) / "prepared"
    print(f"store    {_digest(sorted(store.glob('*/layer-*.safetensors')))}")
    print(f"episodes {hashlib.sha256(json.dumps(episodes).encode()).hexdigest()[:16]} ({len(episodes)})")
    print(f"report   {hashlib.sha256(json.dumps(report).encode()).hexdigest()[:16]} ({report[-1][0]} {report[-1][1]})")
    print(f"saved    {_digest_weights(result.folder / 'model')}")


def _digest(files: Iterable[Path]) -> str:
    digest, size = hashlib.sha256(), 0
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        size += path.stat().st_size
    return f"{digest.hexdigest()[:16]} ({size / 1e9:.2f} GB)"


def _digest_weights(folder: Path) -> str:
    """Of names and bits, however they are spread over files."""
    import torch

    from ffgym.models.checkpoint import TensorFile

    tensors: dict[str, str] = {}
    size = 0
    for path in folder.glob("*.safetensors"):
        file = TensorFile(path)
        for name in file.names:
            tensor = file.read(name)
            size += tensor.nbytes
            tensors[name] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
    return f"{hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()[:16]} ({size / 1e9:.2f} GB)"


def _status() -> dict[str, int]:
    """Bytes, by the names in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def main() -> None:
    """Make what is not there, then run in a fresh cache."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=float, help="GiB of private memory; none where left out")
    parser.add_argument("--placement", default="stream", choices=["auto", "stream", "resident"])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=2560)
    parser.add_argument("--layers", type=int, default=45)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--window", type=int, default=512, help="tokens of a window, and of an episode")
    parser.add_argument("--make-only", action="store_true", help="make model and text, run nothing")
    options = parser.parse_args()
    folder: Path = options.folder
    if not (folder / "search.txt").exists():
        make_model(folder / "model", options)
        write_texts(folder, options.window)
    if options.make_only:
        return
    if options.limit:
        limit = int(options.limit * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        print(f"RLIMIT_DATA is {options.limit:g} GiB")
    cache = folder / f"cache-{options.placement}"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ |= {"FFGYM_CACHE": str(cache), "FFGYM_CACHE_SIZE": "50GB"}
    try:
        run_in(folder, options.placement, options.window)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(folder / "runs" / options.placement, ignore_errors=True)


if __name__ == "__main__":
    main()
