"""Records of a run that its MLflow store has not taken yet, kept in a file until it does.

A file is named after its run, and every line is a record. Whoever sends them holds a lock, so that a run and
``ffgym sync`` never send the same one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ffgym.errors import TrackingError
from ffgym.files import FileFormat, exclusive_lock, write_text, writing
from ffgym.tracking.records import send
from ffgym.tracking.runs import run_with_id
from ffgym.tracking.store import reading_store
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
            if not self.path.exists():  # who held the lock has sent it all
                return 0
            # The process may have been killed in the last line.
            records = [LINE.parse(line, source) for source, line in LINE.lines(self.path) if line.endswith(b"\n")]
            sent = 0
            try:
                for record in records:
                    send(record)
                    sent += 1
            finally:
                if left := records[sent:]:
                    write_text(self.path, "".join(json.dumps(record) + "\n" for record in left))
                else:
                    self.path.unlink()
            return sent

    def __len__(self) -> int:
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def _lock(self) -> AbstractContextManager[bool]:
        return exclusive_lock(self.path.with_suffix(".lock"), waiting=lambda: None)


def sync(root: Path, folders: Iterable[Path], notify: Notify) -> int:
    """Send all records that wait under some folders, those of each run in order.

    Returns:
        how many records were sent.

    Raises:
        TrackingError: the store cannot be written, or does not have a run, which may be another store's; what was not
            sent goes on waiting, and holds up no other run.
    """
    total, failures = 0, []
    for path in sorted({path.resolve() for folder in folders for path in folder.rglob(f"*{SUFFIX}")}):
        try:
            run = run_with_id(root, path.name.removesuffix(SUFFIX), f"{path}: ")
            with reading_store(root, f"write run {run.name!r} to") as (client, _):
                sent = Outbox(path.parent, run.id).forward(partial(send, client, run.id))
        except TrackingError as error:
            failures.append(error)
        else:
            notify(f"{run.name}: {sent} records sent, from {path}")
            total += sent
    if failures:
        raise TrackingError("; ".join({error.message: None for error in failures}), hint=failures[0].hint)
    return total
