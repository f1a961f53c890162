"""An empty MLflow store for tests: making its tables takes seconds, so they are made once and copied."""

from __future__ import annotations

import atexit
import functools
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ffgym.tracking.store import tracking_uri
from ffgym.tracking.tracker import Tracker


def new_store(root: Path) -> Path:
    """Make ``root`` a store without runs."""
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(_empty_database(), root / "mlflow.db")
    return root


def client(root: Path) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=tracking_uri(root))


def runs(root: Path, experiment: str = "ffgym") -> list[Any]:
    """All runs of an experiment, oldest first."""
    found = client(root).get_experiment_by_name(experiment)
    return list(client(root).search_runs([found.experiment_id], order_by=["attributes.start_time"]))


@functools.cache
def _empty_database() -> Path:
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with Tracker(root, "template", "template"):
            pass
    with sqlite3.connect(root / "mlflow.db") as database:
        database.execute("DELETE FROM runs")
    return root / "mlflow.db"
