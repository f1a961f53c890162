"""A new package installs, passes its conformance test and runs; names that cannot be are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.config.tables import RunConfig
from ffgym.config.toml import to_toml
from ffgym.errors import FFGymError, OutputError
from ffgym.plugins import discovery
from ffgym.plugins.template import NewKind, write_package

KINDS: tuple[NewKind, ...] = get_args(NewKind)


def called(*command: str | Path, path: Path, cwd: Path) -> str:
    """Run a command that finds what was installed in ``path``."""
    search = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": search}
    environment.pop("FFGYM_LOAD_PLUGINS", None)
    done = subprocess.run([str(c) for c in command], env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("install")  # which forgets them again
def test_new_packages_install_pass_their_tests_and_run(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write_package(kind, f"my-{kind}", tmp_path) for kind in KINDS]
    site = tmp_path / "site"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", site)
    called(sys.executable, "-m", "pip", "install", *options, *folders, path=site, cwd=tmp_path)
    tested = called(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *folders, path=site, cwd=tmp_path)
    assert " passed" in tested
    short = {**tiny_run["search"], "episodes": 8, "random_baseline": False}
    config = RunConfig.model_validate({**tiny_run, "search": short, "tracking": {"enabled": False}})
    (tmp_path / "run.toml").write_text(to_toml(config), encoding="utf-8")
    flags = ("--agent", "my-agent", "--criterion", "my-criterion", "--reward", "my-reward", "--prior", "my-heuristic")
    flags += ("--resource", "my-resource")
    monkeypatch.syspath_prepend(site)
    discovery.forget()
    given = ("--config", str(tmp_path / "run.toml"), "--output", str(tmp_path / "out"))
    done = CliRunner().invoke(app, ["run", *given, *flags])
    assert "my-agent + ridge" in done.stdout, done.output


def test_the_command_says_what_comes_next(tmp_path: Path) -> None:
    place = tmp_path / "my plugins"
    done = CliRunner().invoke(app, ["new", "reward", "mine", "--output", str(place)])
    assert done.exit_code == 0
    assert "ffgym run --reward mine" in done.stdout
    folder = f"'{place / 'ffgym-mine'}'"
    assert f"pip install --editable {folder} pytest\n" in done.stdout, "ffgym does not bring pytest"
    assert f"python -m pytest {folder}\n" in done.stdout, "not another environment's"
    assert (place / "ffgym-mine" / "ffgym_mine" / "__init__.py").is_file()
    with pytest.raises(OutputError, match="exists already"):
        write_package("reward", "mine", place)


@pytest.mark.parametrize(
    ("kind", "name", "complaint"),
    [
        ("criterion", "wanda", "criterion 'wanda' exists already, in package ffgym"),
        ("criterion", "My Idea", "Did you mean 'my-idea'"),
        ("agent", "3d", "Did you mean 'd'"),
        ("agent", "a/../b", "cannot be a plugin's name"),
        ("reward", "", "cannot be a plugin's name"),
        ("reward", "ends-", "cannot be a plugin's name"),
        ("heuristic", "none", "no class can be None"),
        ("criterion", "true", "no class can be True"),
    ],
)
def test_names_that_are_taken_or_cannot_be_are_refused(
    kind: NewKind, name: str, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(FFGymError, match=complaint):
        write_package(kind, name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_no_part_of_a_package(tmp_path: Path, small_files: Any) -> None:
    with pytest.raises(OutputError, match="cannot write"), small_files(100):
        write_package("agent", "mine", tmp_path)
    assert not list(tmp_path.iterdir())
