"""Hold `ffgym plan` against what runs really need: peak memory, and time, of the demo and of random models.

    python experiments/scale/memory.py [--only NAME ...] [--work DIR]
    python experiments/scale/memory.py --plan           plan what memory.json holds again, and run nothing

Each case is planned and then run (two updates of 4 episodes of 512 tokens) in a process of its own, whose anonymous
resident memory (RssAnon in /proc/PID/status: what it has written, without pages of files, which the system may drop) is
read every 10 ms. Results go to memory.json, case by case, and memory.md beside this file. Needs Linux. The models are
deleted when they have been measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LLAMA = {"vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def sizes(hidden: int, intermediate: int, layers: int, heads: int, groups: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


MODELS = {
    "0.36B": sizes(1024, 4096, 20, 16, 8),
    "0.57B": sizes(1280, 5120, 20, 20, 5),
    "1.07B": sizes(2048, 5632, 20, 32, 8),
    "1.3B": sizes(2048, 5504, 26, 16, 8),
}
CASES = {"demo": ("demo", "resident"), "demo, streamed": ("demo", "stream")} | {
    f"{name}{', streamed' * (placement == 'stream')}": (name, placement)
    for name in MODELS
    for placement in ("resident", "stream")
}
SETTINGS = {
    "data.window": 512,
    "data.calibration_tokens": 4096,
    "data.search_tokens": 8192,
    "data.report_tokens": 1024,
    "search.episodes": 8,
    "search.episodes_per_update": 4,
    "search.episode_tokens": 512,
    "search.final_tokens": 1024,
    "search.random_baseline": "false",
    "tracking.enabled": "false",
}
STAGES = {
    "load model": "load",
    "collect statistics": "prepare",
    "search": "search",
    "report": "report",
}
"""The plan's stage by the beginning of what a run's progress calls its own."""
RSS = re.compile(r"RssAnon:\s*(\d+) kB")


def stage_of(label: str) -> str:
    """The plan's stage of a label in a run's progress; the label itself where the plan has none."""
    return next((stage for start, stage in STAGES.items() if label.startswith(start)), label)


def configuration(name: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**MODELS[name], **LLAMA, **TOKENS, dtype="bfloat16", architectures=["LlamaForCausalLM"])


def make_model(name: str, folder: Path) -> None:
    """Write a random model with the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from ffgym.models.loading import checkpoint_folder

    torch.manual_seed(0)
    LlamaForCausalLM._from_config(configuration(name), dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint_folder("demo")).save_pretrained(folder)


def measure(arguments: list[str], environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """Run ffgym, and read its memory: the peak of every stage in bytes, and its seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ffgym", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    lock, begun = threading.Lock(), [time.monotonic()]
    now: list[int] = [0]
    found: dict[str, dict[str, float]] = {}

    def close(stage: str) -> None:
        with lock:
            seen = found.setdefault(stage, {"peak": 0, "seconds": 0.0})
            seen["peak"] = max(seen["peak"], now[0])
            seen["seconds"] += time.monotonic() - begun[0]
            now[0], begun[0] = 0, time.monotonic()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            print(f"  {line.rstrip()}", file=sys.stderr)
            label = line.partition(": done in ")[0] if ": done in " in line else None
            if label is not None:
                close(stage_of(label))

    reader = threading.Thread(target=read)
    reader.start()
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        if match := RSS.search(status.read_text()):
            with lock:
                now[0] = max(now[0], int(match[1]) * 1024)
        time.sleep(0.01)
    reader.join()
    close("save")
    if process.returncode != 0:
        raise SystemExit(f"ffgym {' '.join(arguments)} ended with {process.returncode}")
    return found


def settings_of(case: str) -> list[str]:
    settings = SETTINGS | {"model.placement": CASES[case][1], "model.dtype": "float32"}
    return [f"--set={key}={value}" for key, value in settings.items()]


def planned(case: str, work: Path) -> dict[str, Any]:
    """What ``ffgym plan`` says of a case; a random model needs only its config."""
    name, folder = CASES[case][0], work / "configs" / CASES[case][0]
    if name != "demo":
        configuration(name).save_pretrained(folder)
    model = name if name == "demo" else str(folder)
    command = [sys.executable, "-m", "ffgym", "plan", model, *settings_of(case), "--json"]
    plan: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return plan


def measured_case(case: str, work: Path) -> dict[str, Any]:
    """Peak memory and seconds of every stage of a run."""
    name = CASES[case][0]
    folder, cache, output = work / "models" / name, work / "cache", work / "run"
    from ffgym.data.cache import cache_dir

    cache.mkdir(parents=True, exist_ok=True)
    for shared in ("assets", "models"):
        if not (cache / shared).exists():
            (cache_dir() / shared).mkdir(parents=True, exist_ok=True)
            (cache / shared).symlink_to(cache_dir() / shared)
    if name != "demo" and not folder.is_dir():
        make_model(name, folder)
    shutil.rmtree(cache / "prepared", ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    model = name if name == "demo" else str(folder)
    environment = {**os.environ, "FFGYM_CACHE": str(cache)}
    found = measure(["run", "--model", model, "--output", str(output), *settings_of(case)], environment)
    shutil.rmtree(cache / "prepared", ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    return {"case": case, "placement": CASES[case][1], "measured": found}


def with_plan(row: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """What was measured beside what is planned."""
    stages = {stage["stage"]: {"peak": stage["peak"], "seconds": stage["seconds"]} for stage in plan["stages"]}
    return row | {"parameters": plan["parameters"], "planned_peak": plan["peak"], "planned": stages}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | layers | planned | measured | planned / measured | most in |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        most = max(row["measured"], key=lambda stage: row["measured"][stage]["peak"])
        peak = row["measured"][most]["peak"]
        lines.append(
            f"| {row['case'].partition(',')[0]} | {row['placement']} | {row['planned_peak'] / 1e9:.2f} GB | "
            f"{peak / 1e9:.2f} GB | {row['planned_peak'] / peak:.2f} | {most} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--plan", action="store_true", help="run nothing")
    parser.add_argument("--work", type=Path, default=Path(), help="where there is room for models, caches and runs")
    options = parser.parse_args()
    file = HERE / "memory.json"
    rows = {row["case"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="memory-", dir=options.work.resolve()) as scratch:
        work = Path(scratch)
        for case in [case for case in options.only if case in rows or not options.plan]:
            print(case, file=sys.stderr)
            row = rows[case] if options.plan else measured_case(case, work)
            rows[case] = with_plan(row, planned(case, work))
            ordered = [rows[name] for name in CASES if name in rows]
            file.write_text(json.dumps(ordered, indent=1) + "\n")
            (HERE / "memory.md").write_text(markdown(ordered))


if __name__ == "__main__":
    main()
