"""Files that ffgym writes and reads again: written whole or not at all, read within limits and checked before use.

What cannot be written, or does not fit what is expected of it, is an error that names the file and says what to do.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import reprlib
import secrets
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Generic, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_json
from safetensors import SafetensorError

from ffgym.errors import FFGymError, OutputError

FULL, FORBIDDEN = frozenset({errno.ENOSPC, errno.EDQUOT}), frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
NOT_WRITABLE = FULL | {errno.EFBIG, errno.EROFS}
# What else there is to do where a place cannot be written.
ELSEWHERE, OUTPUT_OPTION = "choose another place", "choose another place with --output"
COPY = "copy the folder to a place that you may write to"
MOST_BYTES = 64 << 20  # of a JSON file, or of a line; pydantic's parser nests at most 200 deep
MOST_TOML_BYTES = 256 << 10  # tomllib takes quadratic time and memory where keys are long

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, lt=2**53)]  # exact in every reader of JSON
Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """A table or record with fixed keys: unknown keys and mistyped values are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class FileFormat(Generic[T]):
    """One kind of file (or line) on disk: what it is called, what it must hold, and what to do where it does not."""

    what: str  # as messages call it, e.g. "policy"
    form: type[T]  # a pydantic model, a dataclass, or a type such as dict[str, Any]
    error: type[FFGymError]  # what is raised
    hint: str  # the next step

    def read(self, path: Path) -> T:
        """Read and validate a JSON file, or a TOML file where the name ends in ``.toml``.

        Raises:
            FFGymError: of the class ``error``: it is missing, no regular file, too large, too deeply nested, malformed,
                or holds something else.
        """
        if path.suffix != ".toml":
            return self.parse(self._bytes(path, MOST_BYTES), str(path))
        try:
            return self._adapter.validate_python(parse_toml(self.text(path, MOST_TOML_BYTES)))
        except ValidationError as error:
            raise self.refused(str(path), _first_problem(error)) from None
        except ValueError as error:
            raise self.refused(str(path), f"not valid TOML: {error}") from None

    def parse(self, content: str | bytes, source: str) -> T:
        """Validate JSON; ``source`` says in messages where it stands, e.g. ``"episodes.jsonl, line 3"``."""
        try:
            return self._adapter.validate_json(content)
        except ValidationError as error:
            raise self.refused(source, _first_problem(error)) from None

    def write(self, path: Path, value: T) -> None:
        """Write the JSON file that `read` gives the value back from, as `write_text` does."""
        write_text(path, to_json(value, inf_nan_mode="strings").decode() + "\n")

    def text(self, path: Path, most: int = MOST_BYTES) -> str:
        """The text (UTF-8) of a file, with the line ends of Unix."""
        try:  # some editors begin a file with a byte order mark
            return self._bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise self.refused(str(path), f"not UTF-8 text: {error.reason} at byte {error.start}") from None

    def lines(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Each line of a file with its end, and where it stands."""
        with self._opened(path) as file:
            number = 0
            while line := file.readline(MOST_BYTES + 1):
                number += 1
                if len(line) > MOST_BYTES:
                    raise self.refused(f"{path}, line {number}", f"longer than {MOST_BYTES:,} bytes")
                yield f"{path}, line {number}", line

    def refused(self, source: str, reason: str) -> FFGymError:
        """The error for a file that holds something else."""
        return self.error(f"{source} is no {self.what}, or a damaged one: {reason}", hint=self.hint)

    @cached_property
    def _adapter(self) -> TypeAdapter[T]:
        return TypeAdapter(self.form)

    def _bytes(self, path: Path, most: int) -> bytes:
        with self._opened(path) as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise self.refused(str(path), f"larger than {most:,} bytes")
        return content

    @contextmanager
    def _opened(self, path: Path) -> Iterator[BinaryIO]:
        try:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):  # reading a device or a pipe may never end
                what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
                raise self.error(f"{self.what} {str(path)!r} is {what}", hint=self.hint)
            with path.open("rb") as file:
                yield file
        except OSError as error:
            said = f"cannot be read: {error.strerror or error}"
            raise self.error(f"{self.what} {str(path)!r} {said}", hint=self.hint) from error


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; what is malformed, or too deep or too large for Python, is a ``ValueError``."""
    try:
        parsed = tomllib.loads(text)
        repr(parsed)  # which Python refuses for a hexadecimal number of thousands of digits
        return parsed
    except RecursionError:
        raise ValueError("nested too deep") from None


def _first_problem(error: ValidationError) -> str:
    """``"final.loss: Input should be a valid number, not 'x'"``."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    value = first["input"]
    shown = f", not {reprlib.repr(value)}" if place and isinstance(value, str | int | float | None) else ""
    return f"{place}: {first['msg']}{shown}" if place else first["msg"]


def json_digest(plain: Any) -> str:
    """SHA-256 of plain data as canonical JSON, 64 hex digits."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def writing(path: Path, way_out: str = ELSEWHERE) -> Iterator[None]:
    """Make the folder that ``path`` goes into; what the disk refuses becomes an ``OutputError`` with a next step.

    Args:
        path: the file that the block writes.
        way_out: what else there is to do, e.g. `OUTPUT_OPTION` where an option chose the place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        if not is_of_disk(error):
            raise
        raise OutputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}",
            hint=_next_step(error, way_out),
        ) from error


def _next_step(error: Exception, way_out: str) -> str:
    """Only a full disk has to be emptied."""
    code = getattr(error, "errno", None)
    if said := re.search(r"\(os error (\d+)\)", str(error)):
        code = int(said[1])
    if code in FULL:
        return f"Make room on the disk, or {way_out}."
    return f"You may not write there: {way_out}." if code in FORBIDDEN else f"{way_out[0].upper()}{way_out[1:]}."


def is_of_disk(error: BaseException | None) -> bool:
    """Whether a disk refused something; safetensors and tokenizers only repeat what it said, the latter in no type."""
    return isinstance(error, OSError | SafetensorError) or (type(error) is Exception and "(os error " in str(error))


def check_room(folder: Path, needed: int, what: str, hint: str) -> None:
    """Raise ``OutputError`` where the disk of a folder has less room than something needs, in bytes."""
    if (free := shutil.disk_usage(folder).free) < needed:
        size, room = (ByteSize(count).human_readable(decimal=True, separator=" ") for count in (needed, free))
        raise OutputError(f"{what} takes {size}, and {room} are free in {folder}", hint=hint)


@contextmanager
def replacing(path: Path, way_out: str = ELSEWHERE) -> Iterator[Path]:
    """Give the block a hidden place beside ``path`` to write a file or a folder to.

    It takes the place of ``path`` where the block ends well; else what was there before still is.

    Args:
        way_out: as `writing` takes it.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path, way_out):
        part = path.with_name(f".{path.name}.part-{secrets.token_hex(4)}")
        try:
            yield part
            if part.is_dir():
                give_ordinary_modes(part)
            if part.is_dir() and path.exists():  # a folder that holds something cannot be replaced in one move
                _swap(part, path)
            else:
                os.replace(part, path)
        finally:
            remove(part, ignore_errors=True)


def give_ordinary_modes(folder: Path) -> None:
    """Let others read the weights where they may read the rest: safetensors keeps its files to their owner.

    The folder was made with all that the umask allows, so its mode says what that is.
    """
    allowed = folder.stat().st_mode & 0o666
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(allowed)


def _swap(part: Path, path: Path) -> None:
    old = part.with_name(f"{part.name}.old")
    os.replace(path, old)
    try:
        os.replace(part, path)
    except BaseException:
        os.replace(old, path)
        raise
    remove(old, ignore_errors=True)


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file, a link, or a folder and what is in it, where it is there.

    Args:
        ignore_errors: leave what cannot be removed of a folder.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def check_file(path: Path, endings: Collection[str], *, overwrite: bool) -> None:
    """Refuse a file that could not be written later, before anything is measured for it.

    Args:
        path: the file, which ``--output`` chooses.
        endings: those that are known, such as ``.json``.
        overwrite: it may be there already.

    Raises:
        OutputError: another ending, a folder, a file that is there already, or a place that cannot be written.
    """
    if path.suffix not in endings:
        raise OutputError(
            f"output file {str(path)!r} " + (f"ends in {path.suffix!r}" if path.suffix else "has no ending"),
            hint=f"Use a name that ends in {' or '.join(endings)}.",
        )
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint="Name a file.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists", hint="Choose another name, or pass --overwrite.")
    check_writable(path, OUTPUT_OPTION)


def check_writable(path: Path, way_out: str) -> None:
    """Raise ``OutputError`` where a file could not be written; the folder that it goes into is made.

    Args:
        way_out: as `writing` takes it.
    """
    with writing(path, way_out), tempfile.TemporaryFile(dir=path.resolve().parent):
        pass


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8), whole or not at all, and the folder that it goes into.

    Raises:
        OutputError: it cannot be written; what was there before still is.
    """
    with replacing(path.resolve()) as part:  # a link stays a link
        part.write_text(text, encoding="utf-8")


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
            hint=_next_step(error, "choose another folder with --output DIR"),
        ) from error


@contextmanager
def exclusive_lock(lock_file: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold a lock for the block, or learn that another process does; a process that is killed holds none.

    Args:
        lock_file: made for the block, gone afterwards; its folder must be there.
        waiting: called where another process holds it, which is then waited for, however long that takes.

    Yields:
        whether the lock is held.
    """
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is None:
            yield False
            return
        waiting()
        lock.acquire()
    try:
        yield True
    finally:
        with suppress(OSError):  # a folder of another account
            lock_file.unlink()
        lock.release()
