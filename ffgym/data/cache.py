"""The cache folder: what is in it is complete or not there, verified when it is used, made again where it is damaged.

Everything is written to a temporary folder beside its place and renamed into it.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from ffgym.errors import AssetError, ConfigError
from ffgym.files import FileFormat, exclusive_lock, give_ordinary_modes, writing

DEFAULT_SIZE = "50GB"
OTHER_CACHE = "set FFGYM_CACHE to another folder"  # what else there is to do where the cache cannot be written
RECORD = "sha256.json"  # in every folder, the digests of its files
ADDED_TO = "dense-losses.jsonl"  # a file that grows while a folder is used, without a digest
DIGESTS = FileFormat("record of digests", dict[str, str], AssetError, "Delete it: it is written again.")
REMEMBERED = "digests.txt"  # in the cache, a line for each digest that took long: what it is of, and the digest
REMEMBERED_LINE = re.compile(r"([0-9a-f]{64}) ([0-9a-f]{64})")  # others were cut off
TICK_NS = 100_000_000  # of the clock that files have their times from, at most
_known: dict[Path, dict[str, str]] = {}  # what these files hold


def cache_dir() -> Path:
    """The folder that ffgym keeps fetched and converted files in: ``$FFGYM_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("FFGYM_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("ffgym", appauthor=False))


def write_folder_once(place: Path, fill: Callable[[Path], None]) -> Path:
    """Create a folder whole or not at all, even when two processes do so at once, and again where it is damaged.

    Args:
        place: where the folder belongs; when it is there already and holds what was written, nothing is done.
        fill: writes the content into the empty temporary folder that it is given.

    Raises:
        OutputError: the disk is full, or the place cannot be written.
        AssetError: what is damaged cannot be made again.
    """
    is_damaged = place.is_dir() and not is_whole(place)
    if place.is_dir() and not is_damaged:
        with suppress(OSError):  # a cache that may only be read
            os.utime(place)  # `ffgym cache` says when it was used
        return place
    if is_damaged:
        Console(stderr=True).print(f"{place} is damaged: making it again", soft_wrap=True, highlight=False)
    try:
        with writing(place, OTHER_CACHE), Scratch("part", place.parent) as scratch:
            content = scratch / "content"
            content.mkdir()
            fill(content)
            give_ordinary_modes(content)
            _record(content)
            if is_damaged:
                with suppress(FileNotFoundError):  # another process may be faster
                    os.replace(place, scratch / "damaged")
            try:
                os.replace(content, place)
            except OSError:
                if not place.is_dir():  # else another process finished first, and its copy is as good as ours
                    raise
    except AssetError as error:
        if not is_damaged:
            raise
        raise AssetError(f"{place} is damaged, and cannot be made again: {error.message}", hint=error.hint) from error
    return place


def is_whole(place: Path) -> bool:
    """Whether the files of a folder are what was written, by their `sha256`."""
    try:
        return all(sha256(place / name) == digest for name, digest in DIGESTS.read(place / RECORD).items())
    except (OSError, AssetError):
        return False


def _record(folder: Path) -> None:
    digests = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (RECORD, ADDED_TO)
    }
    DIGESTS.write(folder / RECORD, digests)


def sha256(path: Path) -> str:
    """Digest of a file, 64 hex digits; computed once, and again where the file has changed, as files may be large."""

    def compute() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered([path], compute)


def remembered(files: Sequence[Path], compute: Callable[[], str], what: str = "") -> str:
    """A SHA-256 of what files hold, from this or an earlier process if none of them has been written to since.

    Args:
        files: their inodes, sizes and times say whether they are the same; the time is the inode's, which nobody sets.
        compute: computes 64 hex digits.
        what: of their content, and in which form.
    """
    stats = [file.stat() for file in files]
    states = [(stat.st_ino, stat.st_size, stat.st_ctime_ns) for stat in stats]
    key, place = hashlib.sha256(repr((what, states)).encode()).hexdigest(), cache_dir() / REMEMBERED
    if place not in _known:
        text = ""
        with suppress(OSError):
            text = place.read_text(encoding="utf-8", errors="replace")
        _known[place] = {match[1]: match[2] for match in map(REMEMBERED_LINE.fullmatch, text.splitlines()) if match}
    known, now = _known[place], time.time_ns()
    if key not in known:
        known[key] = compute()
        # A file that changed within a tick of the clock could have changed again without showing it.
        if all(abs(now - stat.st_ctime_ns) > TICK_NS for stat in stats):
            with suppress(OSError), place.open("a", encoding="utf-8") as lines:  # a cache may only be read
                lines.write(f"{key} {known[key]}\n")
    return known[key]


class Scratch:
    """A temporary folder. Those of processes that were killed go when the next one is made beside them.

    Attributes:
        folder: the folder, until the object is gone or the ``with`` block ends.
    """

    def __init__(self, name: str, parent: Path | None = None) -> None:
        parent = cache_dir() if parent is None else parent
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f".{name}-*.lock"):
            with exclusive_lock(left) as is_abandoned:
                if is_abandoned:
                    shutil.rmtree(left.with_suffix(""), ignore_errors=True)
        while True:
            # The lock comes before the folder: a folder without one would be taken for abandoned.
            self.folder, lock = parent / f".{name}-{secrets.token_hex(4)}", ExitStack()
            if lock.enter_context(exclusive_lock(self.folder.with_suffix(".lock"))):
                break
            lock.close()  # another process is looking at the new lock: take another name
        self.folder.mkdir(mode=0o700)
        self._drop = weakref.finalize(self, _drop, self.folder, lock)

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: object) -> None:
        self._drop()


def _drop(folder: Path, lock: ExitStack) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


@dataclass(frozen=True)
class Entry:
    """Something in the cache."""

    kind: str  # the folder of the cache: "prepared", "models", "assets" or "latency"
    path: Path
    bytes: int
    used: float  # seconds since the epoch


def entries(kind: str = "*") -> list[Entry]:
    """What the cache holds, the last used first."""
    found = []
    for path in cache_dir().glob(f"{kind}/[!.]*"):
        with suppress(FileNotFoundError):  # another process has removed it
            files = [path, *path.rglob("*")] if path.is_dir() else [path]
            size = sum(file.stat().st_size for file in files if file.is_file())
            found.append(Entry(path.parent.name, path, size, path.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def remove(entry: Entry) -> bool:
    """Delete it, in one move: no other process sees a part of it.

    Returns:
        ``False`` where another process holds its lock, as it is about to use it; it stays then.
    """
    with exclusive_lock(lock_of(entry.path)) as is_free:
        if is_free:
            with Scratch("gone", entry.path.parent) as scratch, suppress(FileNotFoundError):
                os.replace(entry.path, scratch / "content")
    return is_free


def lock_of(place: Path) -> Path:
    """The file that is locked while an entry is made or opened."""
    return place.with_name(f".{place.name}.lock")


def size_limit() -> int:
    """Bytes that prepared models may take: ``$FFGYM_CACHE_SIZE``, e.g. ``20GB``, or 50 GB; 0 keeps none."""
    chosen = os.environ.get("FFGYM_CACHE_SIZE") or DEFAULT_SIZE
    try:
        return int(TypeAdapter(ByteSize).validate_python(chosen))
    except ValidationError:
        raise ConfigError(
            f"FFGYM_CACHE_SIZE={chosen!r} is no size",
            hint="Write a number and a unit, e.g. 20GB, or 0 to keep nothing.",
        ) from None


def shrink(kind: str, limit: int, spare: Path | None = None) -> list[Entry]:
    """Remove what was not used for longest until the entries of a kind fit.

    What to spare stays in any case, and so does what another process is about to use.

    Returns:
        what was removed.
    """
    total, removed = 0, []
    found = entries(kind)
    for entry in sorted(found, key=lambda entry: entry.path != spare):  # stable: the last used first
        total += entry.bytes
        if total > limit and entry.path != spare and remove(entry):
            removed.append(entry)
    return removed
