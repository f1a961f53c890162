"""Where MLflow keeps runs, and what goes wrong there as a `TrackingError` with a next step.

The store is ``<root>/mlflow.db`` (SQLite) with the artifacts in ``<root>/artifacts``; the environment variable
``MLFLOW_TRACKING_URI`` wins where it is set. MLflow takes two seconds to import, so that waits until a run starts; its
log lines are kept off the terminal, and its usage telemetry is off unless ``MLFLOW_DISABLE_TELEMETRY`` says otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffgym.errors import TrackingError
from ffgym.files import exclusive_lock
from ffgym.interrupts import held_back_interrupts, shared_by_threads
from ffgym.tracking.masking import masked, shown
from ffgym.types import Notify

FOLDER_TAG = "ffgym.folder"
PARENT_TAG = "mlflow.parentRunId"
BUSY_SECONDS = 10.0  # to wait for another process that writes the database
INSTEAD = "or choose another folder with --set tracking.root=DIR, or do without: --set tracking.enabled=false."

# Packages of database drivers that are not named like the module.
PACKAGES = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}

LOCATIONS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))
MOVE = """
    UPDATE {0} SET {1} = :here || substr({1}, :length + 1)
    WHERE {1} = :old OR substr({1}, 1, :length + 1) = :old || '/'
"""


def tracking_uri(root: Path) -> str:
    """Say which MLflow store is meant: ``MLFLOW_TRACKING_URI`` where it is set, else the SQLite file under root.

    Raises:
        TrackingError: the root is the address of a database or a server.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(root)):  # a Path has one slash where an address has two
        raise TrackingError(
            f"the root of an MLflow store is a folder, and {str(root).partition(':')[0]}:... is an address",
            hint="Set MLFLOW_TRACKING_URI to that address, and leave tracking.root out.",
        )
    return os.environ.get("MLFLOW_TRACKING_URI") or own_uri(root)


def fetch_artifact(root: Path, run_id: str, name: str, folder: Path) -> Path:
    """Copy one artifact of an earlier run out of the store.

    Raises:
        TrackingError: no such run or artifact, or the store cannot be read.
    """
    with reading_store(root, f"read {name} of run {run_id!r}") as (client, _):
        return Path(client.download_artifacts(run_id, name, str(folder)))


@contextlib.contextmanager
def reading_store(root: Path, action: str) -> Iterator[tuple[Any, str]]:
    """MLflow's client of a store that exists, and the store's address.

    Args:
        action: what is done, for messages: ``"read policy.json of run '0a1b'"``.

    Raises:
        TrackingError: there is no store, or what is done with it fails.
    """
    uri = tracking_uri(root)
    if uri == own_uri(root):
        if not database(root).is_file():
            raise TrackingError(
                f"there is no MLflow store in {root.resolve()} yet",
                hint="`ffgym run` makes one; or name its folder: --root DIR (of `ffgym run`: --set tracking.root=DIR).",
            )
        with contextlib.suppress(sqlite3.Error):  # a store that is only read may be read-only
            adopt(root)
    with translated(uri, action, "or name another store: --root DIR (of `ffgym run`: --set tracking.root=DIR)."):
        yield client_of(uri), uri


def own_uri(root: Path) -> str:
    """The SQLite file under root, as MLflow names a store."""
    return f"sqlite:///{database(root)}"


def database(root: Path) -> Path:
    """The SQLite file under root."""
    return root.resolve() / "mlflow.db"


def artifacts(root: Path) -> Path:
    """The folder that runs keep their files in."""
    return root.resolve() / "artifacts"


def adopt(root: Path) -> None:
    """Let a store that was copied or moved use the artifacts beside it: MLflow notes absolute paths.

    Experiments whose artifacts lie in another store's folder, or in one that is gone, get this store's own, and so do
    their runs: the files that came along are found, and nothing more is written into the other store.

    Raises:
        sqlite3.Error: the database cannot be read or written.
    """
    here = str(artifacts(root))
    with contextlib.closing(sqlite3.connect(database(root), timeout=BUSY_SECONDS)) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        locations = {row[0] for row in connection.execute("SELECT artifact_location FROM experiments")}
        for old in filter(_is_another_stores, locations - {here}):
            for table, column in LOCATIONS:
                connection.execute(MOVE.format(table, column), {"here": here, "length": len(old), "old": old})


def _is_another_stores(location: str) -> bool:
    """Whether another store keeps its artifacts in this folder, or did so before it was moved."""
    path = Path(location)
    if not path.is_absolute() or path != artifacts(path.parent):
        return False
    return not path.is_dir() or database(path.parent).exists()


def is_server(uri: str) -> bool:
    """Whether a store is behind HTTP, and no database that this process opens."""
    return uri.startswith(("http://", "https://"))


def client_of(uri: str) -> Any:
    """MLflow's client of a store.

    Raises:
        TrackingError: the database's driver is not installed, or the address is none.
    """
    from sqlalchemy.exc import ArgumentError

    try:
        with warnings.catch_warnings():
            # MLflow uses what SQLAlchemy deprecates, which is an error where warnings are.
            warnings.simplefilter("ignore")
            return import_mlflow().MlflowClient(tracking_uri=uri)
    except ImportError as error:
        raise TrackingError(
            f"the MLflow store {shown(uri)} needs a database driver: {error}",
            hint=f"Run: pip install {PACKAGES.get(str(error.name), error.name)}",
        ) from None
    except (ArgumentError, ValueError):
        raise TrackingError(
            f"MLFLOW_TRACKING_URI is no address of a database: {shown(uri)}",
            hint="Write it like postgresql://USER:PASSWORD@HOST/NAME, with @ / : ? # in the password as %40 %2F %3A "
            "%3F %23.",
        ) from None


def import_mlflow() -> Any:
    """Import MLflow with its telemetry and its printed links off, and less patience than it has by itself."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # With a tracking server it would print links to stdout, which --json keeps for data.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A server that does not answer would hold up a run for many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    import mlflow

    return mlflow


def make_store(root: Path, notify: Notify) -> None:
    """Make the store's folder and its database where they are missing.

    The tables are made in a file of their own, which is put in its place once it is whole. MLflow's migrations are no
    single transaction: two processes would stumble over each other's tables, and a database whose process was killed
    between two could never be opened.
    """
    if unfit := set("?%") & set(str(root.resolve())):
        # These have a meaning in a URI: MLflow would open another file.
        raise TrackingError(
            f"MLflow cannot keep its store in {root.resolve()}: the path holds {' and '.join(sorted(unfit))}",
            hint="Choose another folder with --set tracking.root=DIR.",
        )
    artifacts(root).mkdir(parents=True, exist_ok=True)
    if not os.access(artifacts(root), os.W_OK):
        raise PermissionError(errno.EACCES, "the artifacts folder is not writable")
    if database(root).exists():
        return
    said = f"waiting for another run, which makes the MLflow store {database(root)}"
    with exclusive_lock(root / "mlflow.lock", waiting=lambda: notify(said)):
        if not database(root).exists():
            new = database(root).with_name("mlflow.new.db")
            new.unlink(missing_ok=True)  # what a killed process left
            new.touch()  # SQLite would make it writable to its owner alone, whatever the umask allows
            client_of(f"sqlite:///{new}")
            new.replace(database(root))


def uninterrupted(uri: str) -> contextlib.AbstractContextManager[None]:
    """Let Ctrl-C wait until the block is done with a database: broken off half way, a transaction keeps it locked.

    A second Ctrl-C does not wait, and a server's answer, which may take minutes, is not waited for at all.
    """
    return contextlib.nullcontext() if is_server(uri) else held_back_interrupts(first_only=True)


@contextlib.contextmanager
def translated(uri: str, action: str, instead: str = INSTEAD) -> Iterator[None]:
    """Keep MLflow's log lines off the terminal, and turn its errors into a ``TrackingError`` with a next step.

    Args:
        instead: what to do where the store stays as it is.
    """
    import_mlflow()  # sets log levels itself, so it comes first
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _mute():
            yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        reason = _reason(error, uri)
        raise TrackingError(f"cannot {action} {shown(uri)}: {reason}", hint=_next_step(uri, reason, instead)) from error


@shared_by_threads
@contextlib.contextmanager
def _mute() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: Exception, uri: str) -> str:
    """Take what is wrong out of SQLAlchemy's paragraph of SQL, or out of an HTTP client's nested errors."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if schema := re.search(r"database schema \(found version (\w+), but expected (\w+)\)", text):
        return f"another version of MLflow made it (its schema is {schema[1]}, this MLflow's {schema[2]})"
    database = re.search(r"\(\w+\.\w+Error\) (.+)", text)
    connection = re.search(r"\(Caused by \w+\(['\"](?:HTTPS?Connection\w*\(.*?\): )?(.+?)['\"][,)]", text)
    found = database or connection
    return masked(found[1] if found else text.partition("\n")[0], uri)


def _next_step(uri: str, reason: str, instead: str) -> str:
    if is_server(uri):
        return "Check that MLFLOW_TRACKING_URI is right and its server answers, or unset it."
    named = uri if uri.startswith("sqlite:///") else '"$MLFLOW_TRACKING_URI"'
    for sign, step in (
        (
            "another version of MLflow",
            f"If that was an older one, copy the database and run `mlflow db upgrade {named}`; if a newer one, run "
            "`pip install --upgrade mlflow`;",
        ),
        ("unsupported URI", "Correct MLFLOW_TRACKING_URI, or unset it,"),
        ("not a database", "Move that file away,"),
        ("locked", "Let the program that holds it finish,"),
        ("full", "Free some space,"),
        ("No space", "Free some space,"),
    ):
        if sign in reason:
            return f"{step} {instead}"
    return f"Make it writable, {instead}"
