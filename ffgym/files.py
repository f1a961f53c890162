"""Writing a file: whole or not at all, and what cannot be written is an error that says what to do."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ffgym.errors import OutputError

NOT_WRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder that ``path`` goes into; an ``OSError`` in the block becomes an ``OutputError`` with a next step.

    Args:
        path: the file that the block writes.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}",
            hint="Make room on the disk, or choose another folder.",
        ) from error


def check_file(path: Path, endings: Collection[str], *, overwrite: bool) -> None:
    """Refuse a file that could not be written later, before anything is measured for it.

    Args:
        path: the file.
        endings: those that are known, such as ``.json``.
        overwrite: it may be there already.

    Raises:
        OutputError: another ending, a folder, a file that is there already, or a place that cannot be written.
    """
    if path.suffix not in endings:
        raise OutputError(
            f"output file {str(path)!r} " + (f"ends in {path.suffix!r}" if path.suffix else "has no ending"),
            hint=f"Let it end in {' or '.join(endings)}.",
        )
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint="Name a file.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists", hint="Choose another name, or pass --overwrite.")
    with writing(path), tempfile.TemporaryFile(dir=path.resolve().parent):
        pass


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8), whole or not at all, and the folder that it goes into.

    Raises:
        OutputError: it cannot be written; what was there before still is.
    """
    with writing(path):
        place = path.resolve()
        if place.exists() and not place.is_file():  # a device or a pipe, which nothing can take the place of
            place.write_text(text, encoding="utf-8")
            return
        part = place.with_name(f".{place.name}.part-{secrets.token_hex(4)}")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a full or read-only disk, wherever in a run it shows, into an error with a next step."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise OutputError(
            f"cannot write {error.filename or 'results'}: {error.strerror}",
            hint="Make room on the disk, or choose another folder with --output DIR.",
        ) from error


@contextmanager
def alone(lock_file: Path) -> Iterator[bool]:
    """Hold a lock for the block, or learn at once that another process does; a process that is killed holds none.

    Args:
        lock_file: made for the block, gone afterwards; its folder must be there.

    Yields:
        whether the lock is held.
    """
    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock_file.unlink(missing_ok=True)
        lock.release()
