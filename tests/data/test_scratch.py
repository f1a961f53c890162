"""Temporary folders in the cache: nobody's is left behind, and nobody's is taken away."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ffgym.data.cache import Scratch, write_folder_once

KILLED = """
import os, signal
from ffgym.data.cache import Scratch
kept = Scratch("refits")
(kept.folder / "file").write_text("large")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path))
    mine = Scratch("refits")
    subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert len(list(tmp_path.glob(".refits-*/file"))) == 1
    other = Scratch("refits")
    assert list(tmp_path.glob(".refits-*/file")) == []
    assert mine.folder.is_dir()
    assert other.folder.is_dir()
    del mine, other
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import os, signal
from ffgym.data.cache import cache_dir, write_folder_once

def fill(folder):
    (folder / "half").write_text("large")
    os.kill(os.getpid(), signal.SIGKILL)

write_folder_once(cache_dir() / "prepared" / "model", fill)
"""


def test_what_was_half_written_when_its_process_was_killed_goes_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path))
    subprocess.run([sys.executable, "-c", INTERRUPTED], check=False)
    assert len(list(tmp_path.glob("prepared/.part-*/content/half"))) == 1
    write_folder_once(tmp_path / "prepared" / "other", lambda folder: (folder / "file").touch())
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["other"]


def test_others_may_read_what_is_kept(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_folder_once(tmp_path / "model", lambda folder: (folder / "model.safetensors").touch(mode=0o600))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o644}


def test_folders_made_at_once_are_not_taken_for_abandoned(tmp_path: Path) -> None:
    def make_and_use(_: int) -> None:
        with Scratch("part", tmp_path) as folder:
            (folder / "file").touch()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make_and_use, range(400)))
    assert list(tmp_path.iterdir()) == []
