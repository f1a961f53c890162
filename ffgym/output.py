"""The folder that a run writes into: claiming it, writing files, and what is left there when a run ends early."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ffgym.config import RunConfig
from ffgym.errors import OutputError

# What a run writes: --overwrite clears these and nothing else.
WRITTEN = frozenset(
    {"config.toml", "episodes.jsonl", "episodes-random.jsonl", "allocation.json", "policy.json"}
    | {"report.md", "report.json", "units_kept.png", "reward.png", "pareto.json", "pareto.png"}
    | {"model", "latency.json"}
)
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


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8), and the folder that it goes into.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path):
        path.write_text(text, encoding="utf-8")


def claim_folder(config: RunConfig) -> Path:
    """Make the run's folder; refuse one that holds something unless it may be overwritten.

    Raises:
        OutputError: occupied, or it cannot be made or written.
    """
    out = config.output
    if out.dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = Path("runs") / f"{stamp}-{config.agent.name}-{config.criterion.name}"
    else:
        folder = Path(out.dir).expanduser()
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if not out.overwrite:
                raise OutputError(
                    f"the output folder {folder} exists and is not empty",
                    hint="Choose another one with --output DIR, or replace its contents with --overwrite.",
                )
            _clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write to the output folder {folder}: {error.strerror or error}",
            hint="Choose a folder on a disk that is writable and has room, with --output DIR.",
        ) from error
    return folder.resolve()


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote; refuse where anything else is there, e.g. the folder of somebody's project."""
    entries = sorted(folder.iterdir())
    foreign = [path.name for path in entries if path.name not in WRITTEN and not path.name.startswith(".model.part-")]
    if foreign or not (folder / "config.toml").exists():
        what = f"holds {foreign[0]}, which ffgym did not write" if foreign else "was not written by ffgym"
        raise OutputError(
            f"{folder} is not empty and {what}, so --overwrite will not clear it",
            hint="Choose another folder with --output DIR.",
        )
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


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
def leaving_no_husk(folder: Path) -> Iterator[None]:
    """Remove a folder in which a run that ended early found nothing: the corrected command needs it."""
    try:
        yield
    except BaseException:
        if {path.name for path in folder.iterdir()} - {"latency.json"} == {"config.toml"}:
            shutil.rmtree(folder)
        raise


@contextmanager
def saying_what_is_kept(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """After Ctrl-C, say what the run has found and where that is."""
    try:
        yield
    except KeyboardInterrupt:
        path = folder / "allocation.json"
        if path.exists():
            best = json.loads(path.read_text(encoding="utf-8"))
            say(
                f"interrupted after {best['episodes']} episodes of the search; best so far ({best['origin']}, sparsity "
                f"{best['sparsity']:.4f}) is in {path}"
            )
        else:
            say("interrupted before the first episode had ended: there is nothing to keep")
        raise
