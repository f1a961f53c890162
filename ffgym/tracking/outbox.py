"""Records of a run that its MLflow store has not taken yet, kept in a file until it does.

A file is named after its run, and every line is a record. Whoever sends them holds a lock, so that a run and
``ffgym sync`` never send the same one.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ffgym.errors import TrackingError
from ffgym.files import FileFormat, exclusive_lock, write_text, writing
from ffgym.tracking.masking import shown
from ffgym.tracking.records import send
from ffgym.tracking.runs import run_or_none, run_with_id
from ffgym.tracking.store import database, own_uri, reading_store, tracking_uri
from ffgym.types import JSONDict, Notify

LINE = FileFormat("record of an MLflow run", dict, TrackingError, "Remove the line, or the whole file.")
SUFFIX = ".unsent.jsonl"


@dataclass(frozen=True)
class Outbox:
    """Records that wait in a file."""

    folder: Path
    run_id: str

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.run_id}{SUFFIX}"

    def add(self, record: JSONDict) -> None:
        """Keep one more record.

        Raises:
            OutputError: the file cannot be written.
        """
        with writing(self.path), self._lock(), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forward(self, send: Callable[[JSONDict], None]) -> int:
        """Send what waits, in order; what could not be sent goes on waiting.

        Returns:
            how many were sent.
        """
        if not self.path.exists():
            return 0
        with self._lock():
            # The process may have been killed in the last line.
            records = [LINE.parse(line, source) for source, line in LINE.lines(self.path) if line.endswith(b"\n")]
            left = deque(records)
            try:
                while left:
                    send(left[0])
                    left.popleft()
            finally:
                if left:
                    write_text(self.path, "".join(json.dumps(line) + "\n" for line in left))
                else:
                    self.path.unlink()
            return len(records)

    def __len__(self) -> int:
        if not self.path.exists():
            return 0
        return self.path.read_bytes().count(b"\n")

    def _lock(self) -> AbstractContextManager[bool]:
        return exclusive_lock(self.path.with_suffix(".lock"), waiting=lambda: None)


def sync(root: Path, folders: Iterable[Path], notify: Notify) -> int:
    """Send all records that wait under some folders, those of each run in order.

    Returns:
        how many records were sent.

    Raises:
        TrackingError: the store cannot be written, or does not have a run, or not any more; what was not sent goes on
            waiting. What is perhaps of another store holds up nothing else.
    """
    total, strays = 0, []
    waiting = [path for folder in folders for path in sorted(folder.rglob(f"*{SUFFIX}"))]
    for path in {path.resolve(): path for path in waiting}.values():  # a folder may lie in another
        run_id = path.name.removesuffix(SUFFIX)
        if not _is_known(root, run_id):
            strays.append(str(path))
            continue
        run = run_with_id(root, run_id, f"{path}: ")
        with reading_store(root, f"write run {run.name!r} to") as (client, _):
            sent = Outbox(path.parent, run.id).forward(partial(send, client, run.id))
        notify(f"{run.name}: {sent} records sent, from {path}")
        total += sent
    if strays:
        raise TrackingError(
            f"there is no MLflow run in {shown(tracking_uri(root))} for the records in {', '.join(strays)}",
            hint="Name their store: a server with MLFLOW_TRACKING_URI, or else a folder with --root. What waits for a "
            "store that is gone may be deleted.",
        )
    return total


def _is_known(root: Path, run_id: str) -> bool:
    """Whether there is a store, and it has a run or did have it until it was deleted."""
    if tracking_uri(root) == own_uri(root) and not database(root).is_file():
        return False
    with reading_store(root, f"read run {run_id!r} of") as (client, _):
        return run_or_none(client, run_id) is not None
