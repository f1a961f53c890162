"""Sends what runs kept on disk while their MLflow server was away."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from ffgym.tracking.outbox import outboxes
from ffgym.tracking.records import send
from ffgym.tracking.runs import run_with_id
from ffgym.tracking.store import reading_store


def sync(root: Path, folders: Iterable[Path], notify: Callable[[str], None]) -> int:
    """Send all records that wait under some folders, those of each run in order.

    Returns:
        how many records were sent.

    Raises:
        TrackingError: the store cannot be written, or does not have the run; what was not sent goes on waiting.
    """
    total = 0
    for box in [box for folder in folders for box in outboxes(folder)]:
        run = run_with_id(root, box.run_id, f"{box.path}: ")
        with reading_store(root, f"write run {run.name!r} to") as (client, _):
            sent = box.forward(partial(send, client, run.id))
        notify(f"{run.name}: {sent} records sent, from {box.path}")
        total += sent
    return total
