"""A run with a saved model, and an engine for tests: a Python that seems to have vLLM."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import fake_engine
import psutil
import pytest
from glass_runs import glass_home

from ffgym.export.checkpoint import save_pruned
from ffgym.models.cut import PrunableModel
from ffgym.models.loading import load
from ffgym.models.origin import Origin
from ffgym.plan import machine


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: a model whose layers differ in size, and the record that names the dense one."""
    folder, dense, kept = tmp_path_factory.mktemp("run"), str(glass_home() / "glass"), (2, 200, 1, 300, 2, 256, 1, 127)
    loaded = load(dense, dtype="float32", device="cpu")
    prunable = PrunableModel(loaded.model)
    prunable.cut(kept)
    save_pruned(prunable, loaded.tokenizer, folder / "model", origin=Origin(dense))
    return folder


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that seems to have vLLM, and memory for any number of its servers; the file of what they are asked."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 50))
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "cgroup")  # of no container
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # logs of servers that died stay there
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_engine.__file__} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("FFGYM_VLLM_PYTHON", str(python))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "asked.jsonl"))
    return tmp_path / "asked.jsonl"


@pytest.fixture
def slow_start(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is not a terminal; by the clock, a server that is said to be starting there takes hours."""
    hours, now = [0], time.monotonic

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            hours[0] += 3 * text.count("starting: ")
            return super().write(text)

    monkeypatch.setattr(time, "monotonic", lambda: now() + 3600 * hours[0])
    return Output()
