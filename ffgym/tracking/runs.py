"""Reads tracked runs back, as typed objects, and finds the one that a person means."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ffgym.errors import TrackingError
from ffgym.tracking.masking import shown
from ffgym.tracking.store import FOLDER_TAG, PARENT_TAG, reading_store

ID_CHARACTERS = 8  # of an id, in a list; MLflow's have 32
MOST_RUNS = 50_000  # that MLflow finds at once


@dataclass(frozen=True)
class TrackedRun:
    """One MLflow run of ffgym's; ``None`` for what it does not have."""

    id: str  # MLflow's, 32 hexadecimal digits
    name: str
    status: str  # "finished", "failed", "killed" or "running"
    started: datetime  # when, in UTC
    agent: str | None = None  # who searched, or the heuristic that was measured without a search
    criterion: str | None = None
    seed: int | None = None
    model: str | None = None  # what was pruned, as model.name has it
    sparsity: float | None = None  # what was reached over the prunable sublayers, in [0, 1], or else the target
    target: float | None = None  # the sparsity that was asked for; None for a range
    sparsity_range: str | None = None  # the targets of a run over a range, as MLflow shows them, such as "0.1:0.6"
    result: float | None = None  # perplexity on the report split of the model that was saved
    ratio: float | None = None  # result as a multiple of the dense model's
    tokens: int | None = None  # that the agent's episodes took
    folder: Path | None = None
    parent: str | None = None  # id of the bench, or of the run over a range, that it belongs to


def list_runs(root: Path, experiment: str = "ffgym") -> list[TrackedRun]:
    """All runs of an experiment that were not deleted, newest first.

    Raises:
        TrackingError: no such store or experiment, or the store cannot be read.
    """
    with reading_store(root, "list the runs of") as (client, uri):
        found = client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage != "active":
            known = [each.name for each in client.search_experiments()]
            near = difflib.get_close_matches(experiment, known, n=1)
            guess = f"Did you mean {near[0]!r}? " if near else ""
            raise TrackingError(
                f"there is no MLflow experiment {experiment!r} in {shown(uri)}",
                hint=f"{guess}There are: {', '.join(map(repr, known)) or 'none'}.",
            )
        newest_first = ["attributes.start_time DESC"]
        return [_tracked(run) for run in client.search_runs([found.experiment_id], "", 1, MOST_RUNS, newest_first)]


def find_run(root: Path, text: str, experiment: str = "ffgym") -> TrackedRun:
    """The run that a person means.

    Args:
        text: MLflow's id, the first digits of one, at least 4, or a run's name.
        experiment: where names and first digits are looked for.

    Raises:
        TrackingError: no run, a deleted run, several runs; the message names them.
    """
    if re.fullmatch("[0-9a-f]{32}", text):
        return run_with_id(root, text)
    try:
        runs = list_runs(root, experiment)
    except TrackingError as error:
        what, hint = f"{text!r} is no folder of a run, and {error.message}", f"Check the path. {error.hint}"
        raise TrackingError(what, hint=hint) from error
    matches = (
        [run for run in runs if run.name == text],
        [run for run in runs if len(text) >= 4 and run.id.startswith(text.lower())],
    )
    found = next(filter(None, matches), None)
    if found is None:
        near = difflib.get_close_matches(text, [run.name for run in runs], n=1)
        raise TrackingError(
            f"no run has the id or the name {text!r}, and it is no folder of a run",
            hint=f"Did you mean {near[0]!r}?" if near else "`ffgym runs` lists them.",
        )
    if len(found) > 1:
        several = ", ".join(f"{run.id[:ID_CHARACTERS]} of {run.started.astimezone():%Y-%m-%d %H:%M}" for run in found)
        raise TrackingError(f"{text!r} means {len(found)} runs: {several}", hint="Give the id of one.")
    return found[0]


def run_with_id(root: Path, run_id: str, where: str = "") -> TrackedRun:
    """The run that has an id of MLflow's.

    Args:
        where: what says so, for messages, with a colon and a space behind it.

    Raises:
        TrackingError: there is none, or it was deleted.
    """
    with reading_store(root, f"read run {run_id!r} of") as (client, uri):
        run = run_or_none(client, run_id)
        if run is None:
            raise TrackingError(
                f"{where}there is no MLflow run {run_id} in {shown(uri)}",
                hint="`ffgym runs` lists what is there; another store is named with --root or MLFLOW_TRACKING_URI.",
            )
        if run.info.lifecycle_stage != "active":
            raise TrackingError(
                f"{where}the MLflow run {run_id} was deleted",
                hint=f"Restore it: MLFLOW_TRACKING_URI=... mlflow runs restore --run-id {run_id}",
            )
        return _tracked(run)


def run_or_none(client: Any, run_id: str) -> Any:
    """MLflow's run with an id, which may have been deleted; ``None`` where the store does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _tracked(run: Any) -> TrackedRun:
    params, metrics, tags = run.data.params, run.data.metrics, run.data.tags
    asked = params.get("sparsity")
    target = _number(asked)
    tokens, folder = metrics.get("result/search_tokens"), tags.get(FOLDER_TAG)
    return TrackedRun(
        id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status.lower(),
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        agent=params.get("agent"),
        criterion=params.get("criterion"),
        seed=int(params["seed"]) if params.get("seed", "").isdecimal() else None,
        model=params.get("model"),
        sparsity=metrics.get("result/sparsity", target),
        target=target,
        sparsity_range=asked if target is None else None,
        result=metrics.get("result/perplexity"),
        ratio=metrics.get("result/ratio_to_dense"),
        tokens=None if tokens is None else round(tokens),
        folder=None if folder is None else Path(folder),
        parent=tags.get(PARENT_TAG),
    )


def _number(text: str | None) -> float | None:
    """``None`` also for a range, such as ``0.1:0.5``."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
