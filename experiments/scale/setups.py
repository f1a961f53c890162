"""What `ffgym plan` says of the set-ups in docs/scale.md, without their hardware: GPUs of 80 GB are made up.

    python experiments/scale/setups.py

Only sizes are printed: speeds come from the hardware itself.
"""

from __future__ import annotations

import tempfile

import torch
from factors import config_of

from ffgym.config.toml import load_config
from ffgym.pipeline.plan import plan_run
from ffgym.plan import counts
from ffgym.plugins import manager
from ffgym.report.layout import humane

EPISODE = "search.episode_tokens"
SETUPS = [
    ("a laptop", "demo", "model.device=cpu"),
    ("a laptop, 2 workers", "demo", "model.device=cpu workers.count=2"),
    ("one GPU", "8B", ""),
    ("one GPU", "70B", ""),
    ("eight GPUs, 8 workers", "8B", f"workers.count=8 {EPISODE}=8192"),
    ("eight GPUs, 1 process on all", "70B", "model.device=balanced"),
    ("eight GPUs, 2 workers on four each", "70B", "workers.count=2 workers.gpus=4 model.device=balanced"),
    ("a cluster, 32 workers", "8B", f"workers.count=32 workers.ray_address=auto {EPISODE}=32768"),
]
GPU = 80_000_000_000


def main() -> None:
    for name, value in (("is_available", True), ("mem_get_info", (GPU, GPU)), ("memory_reserved", 0)):
        setattr(torch.cuda, name, lambda *_, value=value: value)
    print("| set-up | model | layers | this process | each worker | together, where they share memory | store |")
    print("|---|---|---|---:|---:|---:|---:|")
    for setup, model, options in SETUPS:
        count = 8 if "eight" in setup else 1
        setattr(torch.cuda, "device_count", lambda count=count: count)  # noqa: B010
        with tempfile.TemporaryDirectory() as folder:
            config_of(model).save_pretrained(folder)
            config = load_config(None, [f"model.name={folder}", "model.dtype=bfloat16", *options.split()])
            plan = plan_run(config, manager.create("agent", config.agent.name, config.agent.options))
        worker = humane(plan.worker_peak, "B") if plan.load.workers > 1 else ""
        together = humane(plan.needed, "B") + f" of {humane(plan.free, 'B')}" * (plan.device.type != "cpu")
        layers = "streamed" if plan.load.streamed else "in memory"
        store = humane(counts.store(plan.shape, plan.load), "B")
        print(f"| {setup} | {model} | {layers} | {humane(plan.largest.peak, 'B')} | {worker} | {together} | {store} |")


if __name__ == "__main__":
    main()
