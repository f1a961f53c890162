"""What a run tells MLflow, as plain data: a record may be sent at once, or kept in a file and sent later.

A record is ``{"write": KIND, ...}``; :func:`send` writes it with MLflow's client. Sending one twice does no harm,
except for points of curves, which MLflow would then show twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ffgym.report.progress import Reporter
from ffgym.tracking.masking import masked
from ffgym.tracking.models import log_model
from ffgym.tracking.store import PARENT_TAG
from ffgym.types import JSONDict

Point = tuple[str, float, int, int]
"""Of a curve: name, value, step, and when, in milliseconds."""
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # error codes of a store that answers, and says no
DIGEST_CHARACTERS = 36


def send(client: Any, run_id: str, record: JSONDict) -> None:
    """Write one record; of a file that is gone, or of what MLflow refuses, say so and go on."""
    if "path" in record and not Path(record["path"]).exists():
        Reporter().print(f"{record['path']} is not there any more, so MLflow does not get it")
        return
    from mlflow.exceptions import MlflowException

    values = {key: value for key, value in record.items() if key != "write"}
    try:
        KINDS[record["write"]](client, run_id, **values)
    except MlflowException as error:
        # A store refuses everything of a deleted run, but that may be restored.
        if error.error_code not in REFUSALS or client.get_run(run_id).info.lifecycle_stage != "active":
            raise
        Reporter().print(f"MLflow refuses {record['write']} of this run: {masked(str(error).splitlines()[0])}")


def _values(
    client: Any,
    run_id: str,
    metrics: Sequence[Point] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(
        run_id,
        [Metric(name, value, time, step) for name, value, step, time in metrics],
        [Param(key, value) for key, value in (params or {}).items()],
        [RunTag(key, value) for key, value in (tags or {}).items()],
    )


def _dataset(client: Any, run_id: str, name: str, context: str, digest: str, corpus: str, tokens: int) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    dataset = Dataset(
        name=name,
        digest=digest[:DIGEST_CHARACTERS],
        source_type="code",
        source=json.dumps({"tags": {"corpus": corpus}}),
        profile=json.dumps({"tokens": tokens, "digest": digest}),
    )
    inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
    try:
        client.log_inputs(run_id, datasets=inputs)
    except MlflowException as error:
        if not re.search("unique|duplicate", str(error), re.IGNORECASE):
            raise
        # Another run logged the same text between MLflow's lookup and its write; now the lookup finds it.
        client.log_inputs(run_id, datasets=inputs)


def _child(client: Any, run_id: str, name: str, metrics: Sequence[Point], **values: Any) -> None:
    """A finished run, as old as its metrics, that is nested under this one; one of that name is there at most once."""
    time = metrics[0][3]
    experiment = client.get_run(run_id).info.experiment_id
    where = f"tags.`{PARENT_TAG}` = '{run_id}'"
    runs = [run for run in client.search_runs([experiment], where) if run.info.run_name == name]
    child = runs[0] if runs else client.create_run(experiment, time, {PARENT_TAG: run_id}, name)
    if child.info.status != "FINISHED":
        _values(client, child.info.run_id, metrics, **values)
        client.set_terminated(child.info.run_id, end_time=time)


KINDS: dict[str, Callable[..., None]] = {
    "values": _values,
    "text": lambda client, run_id, text, file: client.log_text(run_id, text, file),
    "artifact": lambda client, run_id, path: client.log_artifact(run_id, path),
    "model": log_model,
    "dataset": _dataset,
    "child": _child,
    "end": lambda client, run_id, status, time: client.set_terminated(run_id, status, time),
}
