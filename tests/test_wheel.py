"""The wheel, installed into an environment of its own, away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
from mlflow_store import new_store
from transformers import AutoModelForCausalLM, AutoTokenizer

from ffgym.config.tables import RunConfig
from ffgym.config.toml import to_toml

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def called(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=OUTSIDE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    called(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of a new environment. It borrows the dependencies of this one, but not its editable ffgym.

    A folder that a .pth file names is searched, but its own .pth files, with which editable packages are found, are not
    read.
    """
    folder = tmp_path_factory.mktemp("clean")
    called(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    programs = folder / "bin"
    called(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return programs


def test_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"ffgym", f"{wheel.name.split('-py3')[0]}.dist-info"}
    inside = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("ffgym/**/*.py")}
    assert inside <= set(names)
    assert any(name.endswith("LICENSE") for name in names)


def test_prunes_a_model_that_loads(environment: Path, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(RunConfig.model_validate(tiny_run)), encoding="utf-8")
    new_store(tmp_path / "mlruns")
    where = called(environment / "python", "-c", "import ffgym; print(ffgym.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment.parent)
    called(environment / "ffgym", "run", "--config", "run.toml", "--output", "runs/mine", cwd=tmp_path)
    saved = tmp_path / "runs" / "mine" / "model"
    ours = (ROOT / "ffgym" / "models" / "modeling_ffgym.py").read_text(encoding="utf-8")
    assert (saved / "modeling_ffgym.py").read_text(encoding="utf-8").startswith(ours)
    model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=True)
    assert model(**tokenizer("w1 w2", return_tensors="pt")).logits.isfinite().all()
