"""What tests of third parties' plugins share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ffgym.plugins import discovery

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages as pip would: a module and its dist-info on sys.path."""
    monkeypatch.delenv(discovery.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    modules: list[str] = []

    def add(package: str, source: str, *, version: str = "1.0") -> None:
        module = package.replace("-", "_")
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", "utf-8")
        (info / "entry_points.txt").write_text(f"[ffgym]\n{package}-entry = {module}\n", "utf-8")
        importlib.invalidate_caches()
        discovery.forget()

    discovery.forget()
    yield add
    discovery.forget()
    for module in modules:
        sys.modules.pop(module, None)
