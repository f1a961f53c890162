"""``ffgym cache`` and ``prepare``: what lies on disk, how it comes there, and how it goes away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w
from glass_runs import glass_tables
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.data.cache import lock_of
from ffgym.files import exclusive_lock


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path))
    for name, size in (("prepared/llama-1", 3_000_000), ("prepared/opt-2", 100), ("assets/text", 10)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(bytes(size))
    (tmp_path / "latency").mkdir()
    (tmp_path / "latency" / "table.json").write_text("{}")
    (tmp_path / "prepared" / ".llama-1.lock").touch()
    return tmp_path


def names() -> set[str]:
    done = CliRunner().invoke(app, ["cache", "--json"])
    assert done.exit_code == 0, done.stderr
    return {Path(entry["path"]).name for entry in json.loads(done.stdout)}


def test_lists_what_is_kept(cache: Path) -> None:
    done = CliRunner().invoke(app, ["cache"])
    assert done.exit_code == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "llama-1" in line]
    assert line.split()[:4] == ["prepared", "llama-1", "3.0", "MB"]
    assert str(cache) in done.stderr
    assert names() == {"llama-1", "opt-2", "text", "table.json"}


def test_deletes_an_entry_or_all_of_a_kind(cache: Path) -> None:
    assert CliRunner().invoke(app, ["cache", "--delete", "llama-1"]).exit_code == 0
    assert names() == {"opt-2", "text", "table.json"}
    assert CliRunner().invoke(app, ["cache", "--delete", "prepared", "--delete", "latency"]).exit_code == 0
    assert names() == {"text"}


def test_what_another_process_is_opening_stays(cache: Path) -> None:
    with exclusive_lock(lock_of(cache / "prepared" / "llama-1")):
        done = CliRunner().invoke(app, ["cache", "--delete", "llama-1"])
    assert done.exit_code == 1
    assert "llama-1 is being made or opened by another process" in done.stderr
    assert "llama-1" in names()


def test_an_unknown_name_is_refused_with_the_nearest_one(cache: Path) -> None:
    done = CliRunner().invoke(app, ["cache", "--delete", "lama-1"])
    assert done.exit_code == 1
    assert "llama-1" in done.stderr
    assert len(names()) == 4


def test_an_empty_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "nowhere"))
    assert names() == set()


def test_prepare_says_where_it_keeps_what_it_made_or_that_it_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "0")
    (tmp_path / "run.toml").write_text(tomli_w.dumps(glass_tables(tmp_path)))
    prepare = ["prepare", "--config", str(tmp_path / "run.toml")]
    refused = CliRunner().invoke(app, prepare)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "cannot be kept in the cache" in refused.stderr
    assert "FFGYM_CACHE_SIZE" in refused.stderr
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")
    done = CliRunner().invoke(app, prepare)
    assert done.exit_code == 0, done.stderr
    assert Path(done.stdout.split()[-1]).name in names()
