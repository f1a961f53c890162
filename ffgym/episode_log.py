"""The log of a search on disk, one JSON line an episode: what an interrupted search goes on from."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ffgym.errors import DataError
from ffgym.types import Episode


@dataclass(frozen=True)
class Log:
    """What the log of a search holds.

    Attributes:
        episodes: in order.
        seconds: wall time that they took, over all sessions.
    """

    episodes: tuple[Episode, ...]
    seconds: float


class Clock:
    """Wall time of a search over all its sessions."""

    def __init__(self, total: float) -> None:
        self.total = total
        self._since = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call, counted nowhere."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        return seconds

    def count(self) -> float:
        """Seconds since the last call, added to the total."""
        seconds = self.lap()
        self.total += seconds
        return seconds


class Recorder:
    """Writes down the episodes of a search as they come, and keeps its time; what is replayed is neither.

    Args:
        path: the log; what it holds already is :attr:`earlier`. ``None`` keeps the time and writes nothing.

    Attributes:
        earlier: what earlier sessions wrote.
        clock: of all sessions.

    Raises:
        DataError: see :func:`read_log`.
    """

    def __init__(self, path: Path | None) -> None:
        self.earlier = read_log(path) if path is not None and path.exists() else Log((), 0.0)
        self.clock = Clock(self.earlier.seconds)
        self._file = path.open("a", encoding="utf-8") if path is not None else None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def record(self, episode: Episode) -> None:
        """Take note of the episode that the search has just come to."""
        if episode.index < len(self.earlier.episodes):
            self.clock.lap()  # what a replay takes is no part of the search
            return
        seconds = self.clock.count()
        if self._file is not None:
            self._file.write(json.dumps({**episode_to_json(episode), "seconds": round(seconds, 3)}) + "\n")
            self._file.flush()


def episode_to_json(episode: Episode) -> dict[str, Any]:
    """One line of the log; float32 importances survive the round trip bit for bit."""
    return {**asdict(episode), "action": [float(a) for a in episode.action]}


def read_episodes(path: Path) -> list[Episode]:
    """The episodes of a log, see :func:`read_log`."""
    return list(read_log(path).episodes)


def read_log(path: Path) -> Log:
    """Read a log; a last line that was cut off by a crash is left out.

    Raises:
        DataError: any other line that is not an episode, or a file that is not UTF-8.
    """
    episodes: list[Episode] = []
    seconds = 0.0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        lines = content[:whole].decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no log: {error}", hint="Delete the file to search from the start.") from None
    if whole < len(content):
        os.truncate(path, whole)  # or the next line would be glued to it
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            seconds += float(row.pop("seconds", 0.0))
            row.pop("stopped_early", None)  # older logs have it
            row["action"] = np.array(row["action"], dtype=np.float32)
            row["kept"] = tuple(row["kept"])
            row["slopes"] = tuple(row.get("slopes", ()))
            episodes.append(Episode(**row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} is not an episode: {error}", hint="Delete the file to search from the start."
            ) from error
    return Log(tuple(episodes), seconds)
