"""An engine for tests: a Python that seems to have vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

import fake_engine
import pytest


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that seems to have vLLM; the file where its servers note what they are asked."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_engine.__file__} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("VLLM_PYTHON", str(python))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "asked.jsonl"))
    return tmp_path / "asked.jsonl"
