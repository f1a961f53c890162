"""Where a recovery finds the run that pruned its model, and where it writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffgym.errors import OutputError
from ffgym.export.checkpoint import refuse_occupied
from ffgym.files import OUTPUT_OPTION, check_writable, exclusive_lock
from ffgym.models.checkpoint import model_folder


def find_run_config(folder: Path) -> Path | None:
    """``config.toml`` of the run that saved the model of a folder, where it lies in that folder or beside it."""
    model = model_folder(folder).resolve()
    return next((path for place in (model, model.parent) if (path := place / "config.toml").is_file()), None)


def output_folder(source: Path) -> Path:
    """Where a recovered model goes where nobody says where."""
    return source.with_name(f"{source.name}-recovered")


def unfinished_folder(place: Path) -> Path:
    """Where the checkpoints of a training lie until its model is saved."""
    return place.with_name(f"{place.name}.unfinished")


@contextmanager
def place_lock(place: Path) -> Iterator[None]:
    """Keep other trainings away from where a recovered model goes; one that was killed keeps nobody away.

    Raises:
        OutputError: another training holds it, or it cannot be written to.
    """
    lock = place.with_name(f".{place.name}.lock")
    check_writable(lock, OUTPUT_OPTION)
    with exclusive_lock(lock) as mine:
        if not mine:
            raise OutputError(
                f"another training is writing to {place}",
                hint="Let it end or stop it, or choose another folder with --output DIR.",
            )
        yield


def check_recovery_output(source: Path, place: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written to, before anything is trained."""
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise OutputError(
            f"the output folder {place} and the model's own folder {source} would share files",
            hint="Choose another folder with --output DIR.",
        )
    refuse_occupied(place, overwrite)
