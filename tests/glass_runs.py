"""Whole runs in less than a second: the trained tiny Llama saved as a checkpoint, English text, small settings."""

from __future__ import annotations

import atexit
import functools
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ffgym import run
from ffgym.config.tables import RunConfig
from ffgym.models.placement import choose_dtype
from ffgym.pipeline.agent import make_agent
from ffgym.pipeline.plan import plan_run, planned_steps
from ffgym.pipeline.result import RunResult
from ffgym.pipeline.start import settle
from ffgym.report.table import Row

EPISODES, PER_UPDATE, WINDOW = 8, 4, 64
FILES = {
    *("config.toml", "run.json", "allocation.json", "policy.json", "episodes.jsonl", "episodes-random.jsonl"),
    *("report.md", "report.json", "losses.json", "model"),
    *("units_kept.png", "reward.png", "allocations.png", "differences.png"),
}
"""What a run at one target writes."""


NO_MODEL = {"name": "/no/such/model"}  # what is refused before a model is looked for is refused with it as well


def glass_tables(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A run's tables as plain data, MLflow off.

    Args:
        folder: results go to ``out`` in it, MLflow's store is ``mlruns`` in it.
        changes: tables to change, key by key.
    """
    home = glass_home()
    search_text, report_text = str(home / "c4.txt"), str(home / "wiki.txt")
    tables: dict[str, dict[str, Any]] = {
        "model": {"name": str(home / "glass"), "dtype": "float32", "device": "cpu"},
        "data": {
            "calibration": search_text,
            "search": search_text,
            "report": report_text,
            "window": WINDOW,
            "calibration_tokens": 1024,
            "search_tokens": 2048,
            "report_tokens": 1024,
        },
        "prune": {"ridge": 0.1, "context": WINDOW, "align": 1},
        "search": {
            "episodes": EPISODES,
            "episodes_per_update": PER_UPDATE,
            "episode_tokens": 2 * WINDOW,
            "finalists": 2,
            "final_tokens": 512,
        },
        "output": {"dir": str(folder / "out")},
        "tracking": {"enabled": False, "root": str(folder / "mlruns")},
    }
    if "agent" not in changes:  # updates of PER_UPDATE episodes from the start: what interrupts them counts episodes
        tables["agent"] = {"name": "reinforce", "slopes": False}
    for table, values in changes.items():
        tables[table] = {**tables.get(table, {}), **values}
    return tables


def glass_config(folder: Path, *, seed: int = 0, **changes: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({"seed": seed, **glass_tables(folder, **changes)})


def bench_file(folder: Path, *, stem: str = "small", tables: dict[str, Any] | None = None, **spec: Any) -> Path:
    """Write a bench of one agent on the small model; ``tables`` change the shared run, ``spec`` the rest."""
    run = glass_tables(folder, **(tables or {}))
    del run["output"]
    content = {"title": "Small", "agents": ["random"], "seeds": [0], "results": stem, "run": run}
    path = folder / f"{stem}.toml"
    path.write_text(tomli_w.dumps({**content, **spec}), encoding="utf-8")
    return path


def go(config: RunConfig, resume: Path | None = None) -> tuple[RunResult, str]:
    """Run it; its result, and what it said."""
    said = io.StringIO()
    result = run(config, progress=Console(file=said, width=200), resume=resume)
    assert result.found is not None, "it was not finished before"
    return result, said.getvalue()


@dataclass
class Finished:
    config: RunConfig
    result: RunResult
    said: str

    @property
    def folder(self) -> Path:
        return self.result.folder

    @property
    def root(self) -> Path:
        return Path(self.config.tracking.root)

    @property
    def rows(self) -> dict[str, Row]:
        return {row.label: row for row in self.result.table.rows}


def finish(config: RunConfig) -> Finished:
    return Finished(config, *go(config))


def stages_are_announced(config: RunConfig, said: str) -> None:
    """The stages that a run went through are those of its plan, in their order."""
    stages, config = re.findall(r"^(.+): done in ", said, re.MULTILINE), settle(config)
    steps = planned_steps(config, plan_run(config, make_agent(config)))
    announced = [step.label for step in steps for _ in range(step.stages)]
    assert len(stages) == len(announced), stages
    assert all(stage.startswith(label) for stage, label in zip(stages, announced, strict=True))
    assert all(step.seconds > 0 for step in steps)


def stopping(at: str, stop: BaseException) -> Console:
    """A console for ``progress``: what stops a job comes with its first line that begins with ``at``."""

    class File(io.StringIO):
        has_stopped = False

        def write(self, text: str) -> int:
            if text.startswith(at) and not self.has_stopped:
                self.has_stopped = True
                raise stop
            return super().write(text)

    return Console(file=File(), width=200)


@contextmanager
def ctrl_c_in_step(step: int) -> Iterator[None]:
    """Ctrl-C comes, once, when an optimizer is about to take this step; 0 is the first."""
    count = iter(range(step + 1))
    handle = register_optimizer_step_pre_hook(lambda *_: ctrl_c() if next(count, None) == step else None)
    try:
        yield
    finally:
        handle.remove()


def ctrl_c(*args: Any, **kwargs: Any) -> Any:
    """To put in the place of what shall be interrupted."""
    raise KeyboardInterrupt


def other_dtype() -> str:
    """The one that ``auto`` would not choose on this processor."""
    return "float32" if choose_dtype(torch.device("cpu")) == torch.bfloat16 else "bfloat16"


def chosen_by_auto(config: RunConfig) -> RunConfig:
    """Have an interrupted run look as if another processor's ``auto`` had chosen its dtype."""
    assert config.output.dir is not None
    file, stated = Path(config.output.dir) / "config.toml", f'dtype = "{config.model.dtype}"'
    text = file.read_text(encoding="utf-8")
    assert text.count(stated) == 1
    file.write_text(text.replace(stated, 'dtype = "auto"'), encoding="utf-8")
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "auto"})})


def untimed(log: Path) -> str:
    """A log of episodes without what no two searches share."""
    return re.sub(r', "seconds": [\d.]+', "", log.read_text())


@functools.cache
def glass_home() -> Path:
    """A folder with the checkpoint ``glass`` and the texts ``c4.txt`` and ``wiki.txt``; made once."""
    from glass_model import glass_model
    from transformers.utils import logging

    from ffgym.data.corpora import load_text

    home = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    logging.disable_progress_bar()
    model, tokenizer = glass_model()
    model.save_pretrained(home / "glass")
    tokenizer.save_pretrained(home / "glass")
    for name in ("c4", "wiki"):
        text = "\n\n".join(load_text(f"demo:{name}", role="search").documents)
        (home / f"{name}.txt").write_text(text[:40_000], encoding="utf-8")
    return home
