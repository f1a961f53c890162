"""The log of a search on disk, one JSON line for each episode; an interrupted search resumes from it."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ffgym.errors import DataError, first_line
from ffgym.files import FileFormat
from ffgym.types import Episode


@dataclass(frozen=True)
class Log:
    """What the log of a search holds."""

    episodes: tuple[Episode, ...] = ()  # in order
    seconds: float = 0.0  # wall time that they took, over all sessions
    # SHA-256 of its episodes, to be continued with the next one
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    size: int = 0  # bytes of their lines; what a crash has cut off comes after them


LINE = FileFormat("episode", dict[str, Any], DataError, "Delete the file to search from the start.")


class Recorder:
    """Writes down the episodes of a search as they come, and keeps its time; what is replayed is neither.

    Args:
        path: the log; what it holds already is :attr:`earlier`. ``None`` keeps the time and writes nothing.

    Attributes:
        earlier: what earlier sessions wrote.
        seconds: wall time of all sessions, as far as it was counted.

    Raises:
        DataError: see :func:`read_log`.
    """

    def __init__(self, path: Path | None) -> None:
        self.earlier = read_log(path) if path is not None and path.exists() else Log()
        self.seconds = self.earlier.seconds
        self._since = time.monotonic()
        self._file = path.open("ab") if path is not None else None
        if self._file is not None:
            self._file.truncate(self.earlier.size)  # a line that was cut off, or the next one would be glued to it
        self._digest = self.earlier.digest

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def count(self) -> float:
        """Add the time since the last call, or the last episode, to `seconds`, and return it."""
        now = time.monotonic()
        taken, self._since = now - self._since, now
        self.seconds += taken
        return taken

    def record(self, episode: Episode) -> None:
        """Take note of the episode that the search has just come to."""
        if episode.index < len(self.earlier.episodes):
            self._since = time.monotonic()  # what a replay takes is no part of the search
            return
        seconds = self.count()
        if self._file is not None:
            body = json.dumps({**asdict(episode), "action": episode.action.tolist()}).encode()[:-1]
            self._digest.update(body)
            end = f', "seconds": {round(seconds, 3)}, "digest": "{_short(self._digest)}"}}\n'
            try:
                self._file.write(body + end.encode())
                self._file.flush()
            except OSError as error:
                error.filename = self._file.name  # which the system leaves out
                self._file.raw.close()  # or leaving the block would write once more, and fail without the name
                raise


def count_episodes(path: Path) -> int:
    """How many episodes a log holds; none of them is parsed."""
    return sum(line.endswith(b"\n") for _, line in LINE.lines(path))


def read_log(path: Path) -> Log:
    """Read a log; a last line that was cut off by a crash, or is being written, is left out.

    Each line holds a digest of its episode and all before it, so that a change by hand or by the disk is found.

    Raises:
        DataError: any other line that is not an episode, or was changed or moved.
    """
    episodes: list[Episode] = []
    seconds, digest, size = 0.0, hashlib.sha256(), 0
    for source, line in LINE.lines(path):
        if not line.endswith(b"\n"):
            break
        size += len(line)
        row = LINE.parse(line, source)
        digest.update(line.rpartition(b', "seconds": ')[0])
        if row.pop("digest", "") != _short(digest):
            raise LINE.refused(source, "it or a line before it was changed after it was written")
        try:
            seconds += float(row.pop("seconds"))
            episodes.append(_episode(row))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise LINE.refused(source, f"another version may have written it: {first_line(error)}") from error
    return Log(tuple(episodes), seconds, digest, size)


def _episode(row: dict[str, Any]) -> Episode:
    """The episode of a line; float32 importances survive the round trip bit for bit."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    fields["action"] = np.array(row["action"], dtype=np.float32)
    return Episode(**fields)


def _short(digest: hashlib._Hash) -> str:
    return digest.hexdigest()[:16]
