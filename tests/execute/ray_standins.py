"""What Ray's workers do in tests: quick answers, unless a file in their folder says otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ffgym.errors import ModelError
from ffgym.evaluation.evaluator import Request
from ffgym.files import write_text
from ffgym.types import Evaluation, OnShare, do_nothing


def patiently(start: Callable[[], Any]) -> Any:
    """Start something of Ray's. It gives itself 30 seconds, which may not do on a busy machine."""
    for _ in range(4):
        with contextlib.suppress(Exception):
            return start()
    return start()


def claimed(path: Path) -> bool:
    """Whether the file was there; it is no longer."""
    try:
        path.rename(path.with_suffix(".claimed"))
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Standin:
    """Makes an evaluator whose loss is the number of units; ``units[0]`` says which window is asked for."""

    folder: Path
    is_worker: bool = True

    def __call__(self) -> Standin:
        if claimed(self.folder / "die-loading"):
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.folder / "broken").exists():
            raise ModelError("no such model", hint="Name another.")
        return self

    def measure(self, requests: Sequence[Request], on_progress: OnShare = do_nothing) -> list[Evaluation]:
        if self.is_worker:
            self._misbehave()
        for place in range(len(requests)):
            time.sleep(0.05)
            on_progress((place + 1) / len(requests))
        if requests:
            with (self.folder / "log").open("a") as log:
                log.write(f"{os.getpid()} {len(requests)} {torch.get_num_threads()}\n")
        return [Evaluation((float(sum(request.kept)),), 1) for request in requests]

    def _misbehave(self) -> None:
        if claimed(self.folder / "die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if claimed(self.folder / "stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if claimed(self.folder / "raise"):
            raise ZeroDivisionError("a mistake")


@dataclass(frozen=True)
class Told(Standin):
    """Notes which variables its process has, and which hub's folder huggingface_hub read when it was imported."""

    names: tuple[str, ...] = ()

    def __call__(self) -> Standin:
        from huggingface_hub import constants

        told = {"imported with": constants.HF_HOME, **{name: os.environ.get(name) for name in self.names}}
        write_text(self.folder / "told.json", json.dumps(told))
        return super().__call__()
