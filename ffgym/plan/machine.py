"""What the machine offers: free memory within its limits, and speed, from a short probe."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from ffgym.costs.timing import timed
from ffgym.plan.counts import Operations
from ffgym.plan.shape import ModelShape

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
WIDEST = 2048  # channels of the probe's residual stream: wider ones are hardly faster
TOKENS = 4096  # of one pass of the probe, as in a run's: fewer would fit into the caches, and be faster than a run's
OPERATIONS = 4e10  # at most so many make a pass on a CPU
PASSES = 3
HEAD = 64  # channels of its attention heads


def free_memory(device: torch.device) -> int:
    """Bytes that this process may have in all: what it has now, and what is free.

    On a CPU, the limits of control groups (containers, Slurm, systemd) and of ``ulimit -d`` and ``-v`` count.
    """
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        return unused + torch.cuda.memory_reserved(device)
    own = int(psutil.Process().memory_info().rss)
    free: list[int] = [psutil.virtual_memory().available + psutil.swap_memory().free + own, *group_limits(own)]
    limits = [resource.getrlimit(each)[0] for each in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    free += [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return min(free)


def group_limits(own: int) -> Iterator[int]:
    """What each control group with a limit leaves for this process: the limit less what others in the group use."""
    with suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            names = ("memory.max", "memory.current") if not controllers else (
                "memory.limit_in_bytes", "memory.usage_in_bytes")  # fmt: skip
            root = CGROUPS / controllers
            group = root / path.lstrip("/")
            for folder in [group, *group.parents]:
                with suppress(OSError, ValueError):  # the root has no limit, and "max" is none
                    limit = int((folder / names[0]).read_text())
                    held = int((folder / names[1]).read_text()) - _file_pages(folder)
                    yield limit - max(0, held - own)
                if folder == root:
                    break


def _file_pages(group: Path) -> int:
    """Bytes of a group's page cache, which is given back when memory is wanted."""
    with suppress(OSError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("file", "total_cache"):
                return int(value)
    return 0


def measure_speed(shape: ModelShape, dtype: torch.dtype, device: torch.device, window: int) -> Operations:
    """Time a decoder layer of a model's proportions, a product in float32 and a factorisation in float64.

    It takes about a second, and some 100 MB. The result is operations a second.

    Args:
        shape: of the model; a wide one is made narrower in proportion.
        device: where it will run.
        window: tokens that attend to each other.
    """
    scale = min(1.0, WIDEST / shape.hidden)
    hidden = round(shape.hidden * scale)
    attention, mlp = (max(HEAD, round(shape.widest(kind) * scale)) for kind in ("attention", "mlp"))
    attention = attention // HEAD * HEAD

    def operations(tokens: int) -> float:
        weights = 4 * hidden * attention + 3 * hidden * mlp
        return tokens * 2 * (weights + min(window, tokens) * attention)

    affordable = int(64 * OPERATIONS / operations(64)) if device.type == "cpu" else TOKENS
    tokens = min(TOKENS, max(64, affordable))
    length, layer = min(window, tokens), _layer(hidden, attention, mlp, dtype, device)
    tokens = tokens // length * length  # only whole windows run
    states = layer.norm.weight.new_ones(tokens // length, length, hidden)
    with torch.inference_mode():
        model = operations(tokens) / _seconds(lambda: layer(inputs_embeds=states, use_cache=False), device)
    n = min(768, max(s.channels for s in shape.sublayers))
    square = torch.ones(n, n, device=device)  # random numbers would move the caller's generator
    float32 = 2 * n**3 / _seconds(lambda: square @ square, device)
    wide = torch.eye(n, dtype=torch.float64, device="cpu" if device.type == "mps" else device) * 2

    def factorise() -> None:
        torch.linalg.solve_triangular(torch.linalg.cholesky_ex(wide)[0], wide, upper=False)

    return Operations(model, float32, n**3 * 4 / 3 / _seconds(factorise, device))


def _layer(hidden: int, attention: int, mlp: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A decoder layer of a Llama, with multi-head attention, as a model without embeddings."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "head_dim": HEAD, "num_hidden_layers": 1}
    nothing = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None}
    with init_empty_weights(include_buffers=False):  # random numbers would take longer than the probe
        model = LlamaModel(LlamaConfig(num_attention_heads=attention // HEAD, **sizes, **nothing))
    state = {
        name: torch.full(p.shape, 1 / p.shape[-1], dtype=dtype, device=device) for name, p in model.named_parameters()
    }
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few passes, after one that warms up: another process may take its time beside some of them."""
    run()
    return min(timed(run, {device})[1] for _ in range(PASSES))
