"""The cache folder: what is in it is complete or not there, verified when it is used, made again where it is damaged.

Everything is written to a temporary folder beside its place and renamed into it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import platformdirs
from rich.console import Console

from ffgym.errors import AssetError, OutputError
from ffgym.files import FileFormat, write_text

FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
RECORD = "sha256.json"  # in every folder, the digests of its files
DIGESTS = FileFormat("record of digests", dict[str, str], AssetError, "Delete it: it is written again.")
_verified: dict[Path, dict[str, tuple[int, int]]] = {}  # size and time of the files whose digests were right


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
        AssetError: the disk is full, the place cannot be written, or what is damaged cannot be made again.
    """
    is_damaged = place.is_dir() and not is_whole(place)
    if place.is_dir() and not is_damaged:
        return place
    if is_damaged:
        Console(stderr=True).print(f"{place} is damaged: making it again", soft_wrap=True, highlight=False)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=place.parent, ignore_cleanup_errors=True) as scratch:
            content = Path(scratch) / "content"
            content.mkdir()
            fill(content)
            _record(content)
            if is_damaged:
                with suppress(FileNotFoundError):  # where another process is faster
                    os.replace(place, Path(scratch) / "damaged")
            try:
                os.replace(content, place)
            except OSError:
                if not place.is_dir():  # else another process finished first, and its copy is as good as ours
                    raise
    except OSError as error:
        raise _storage_error(error, place) from error
    except AssetError as error:
        if not is_damaged:
            raise
        raise AssetError(f"{place} is damaged, and cannot be made again: {error.message}", hint=error.hint) from error
    _verified[place] = _stamps(place)
    return place


def is_whole(place: Path) -> bool:
    """Whether the files of a folder are what was written: by SHA-256, once a process and where one of them changed.

    That costs 0.6 s for the converted demo model. A folder of an earlier version gets its record now.
    """
    stamps = _stamps(place)
    if _verified.get(place) == stamps:
        return True
    try:
        if not (place / RECORD).exists():
            with suppress(OutputError):  # of a cache that others fill
                _record(place)
        elif any(sha256(place / name) != digest for name, digest in DIGESTS.read(place / RECORD).items()):
            return False
    except (OSError, AssetError):
        return False
    _verified[place] = stamps
    return True


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


def _record(folder: Path) -> None:
    digests = {name: sha256(folder / name) for name in _stamps(folder)}
    write_text(folder / RECORD, json.dumps(digests, indent=1) + "\n")


def _storage_error(error: OSError, place: Path) -> AssetError:
    if error.errno in FULL_DISK:
        return AssetError(
            f"the disk is full: {place} could not be written",
            hint="Free some space, or set FFGYM_CACHE to a folder on a larger disk.",
        )
    return AssetError(
        f"the cache folder {place.parent} cannot be written: {error.strerror or error}",
        hint="Set FFGYM_CACHE to a folder that you may write to.",
    )


def sha256(path: Path) -> str:
    """Digest of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
