"""Writes a run into the MLflow store: its configuration, episodes, splits, table and files, and how it ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from filelock import FileLock

from ffgym.errors import TrackingError
from ffgym.tracking.masking import masked, shown
from ffgym.tracking.names import Result, parameters
from ffgym.tracking.store import (
    FAILURE_TAG,
    INSTEAD,
    PARENT_TAG,
    adopt,
    artifacts,
    check_driver,
    import_mlflow,
    own_uri,
    require_writable,
    tracking_uri,
    translated,
    uninterrupted,
)
from ffgym.tracking.view import TAGS, arrange
from ffgym.types import Episode, JSONDict

METRICS_PER_BATCH = 1000  # the limits of MLflow's log_batch
PARAMS_PER_BATCH = 100
PARAM_CHARACTERS = 6000
PARAM_NAME_CHARACTERS = 240  # and room for more
TAG_CHARACTERS = 5000
DIGEST_CHARACTERS = 36
RESERVE_BYTES = 256 * 1024
OPENING_SECONDS = 60  # to wait for another process that makes the same store; MLflow takes some 5
VERSIONED = ("ffgym", "torch", "transformers")


class Tracker:
    """Writes one run into the MLflow store; as a context manager it also says how the run ended.

    Leaving the block normally marks the run FINISHED, Ctrl-C marks it KILLED, any other exception FAILED with the
    reason in the tag ``ffgym.failure``. (MLflow's own context manager would mark Ctrl-C as FAILED.)

    Args:
        root: folder of the store, made if it is missing.
        experiment: MLflow experiment, made if it is missing.
        run_name: what the run is called in the UI.
        enabled: ``False`` writes nothing and imports nothing: every method may be called and does nothing.
        parent: ``run_id`` of the run that this one is a child of.
        resume: ``run_id`` of an earlier session of the same run, which goes on: what that has logged is not logged
            again. Where the store does not have it (any more), a new run is made.

    Raises:
        TrackingError: from the ``with`` statement and from every method, where the store cannot be opened or written.
    """

    def __init__(
        self,
        root: Path,
        experiment: str,
        run_name: str,
        enabled: bool = True,
        *,
        parent: str | None = None,
        resume: str | None = None,
    ) -> None:
        self.run_id: str | None = None
        self._root = root
        self._experiment = experiment
        self._run_name = run_name
        self._enabled = enabled
        self._parent = parent
        self._resume = resume
        self._earlier: set[str] = set()  # names of the metrics that earlier sessions logged
        self._histories: dict[str, dict[int, float]] = {}  # of those that were asked for: values by step
        self._uri = tracking_uri(root)
        self._client: Any = None
        self._params: set[str] = set()
        self._still: dict[str, tuple[float, int]] = {}  # the first point of every curve: value, step
        self._moving: set[str] = set()  # curves that have moved since
        self._reserve: IO[bytes] | None = None

    def __enter__(self) -> Self:
        if self._enabled:
            try:
                self._open()
            except KeyboardInterrupt:
                if self.run_id is not None:
                    self._terminate("KILLED")
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._reserve is not None:
            self._reserve.close()
        if self.run_id is None:
            return
        if error is None:
            try:
                self._terminate("FINISHED")
            except KeyboardInterrupt:
                self._terminate("KILLED")
                raise
            return
        # A store that is broken must not hide why the run ended.
        with contextlib.suppress(TrackingError):
            if isinstance(error, KeyboardInterrupt):
                self._terminate("KILLED")
            else:
                try:
                    self.set_tags({FAILURE_TAG: masked(f"{type(error).__name__}: {error}", self._uri)})
                finally:
                    self._terminate("FAILED")

    def log_config(self, config: Mapping[str, Any], toml: str) -> None:
        """Log the resolved configuration: what decides the run as parameters, and the whole TOML as an artifact.

        Args:
            config: nested tables, see :func:`ffgym.tracking.names.parameters`. Values longer than MLflow's 6,000
                characters are cut. A parameter keeps its first value, as MLflow demands.
            toml: the same as text, stored whole as ``config.toml``.
        """
        self.log_params(parameters(config))
        if self.run_id is not None:
            self._write("log_text", toml, "config.toml")

    def log_params(self, values: Mapping[str, str]) -> None:
        """Log parameters to compare runs by; see `log_config`."""
        if self.run_id is None:
            return
        named = {key[:PARAM_NAME_CHARACTERS]: _cut(value, PARAM_CHARACTERS) for key, value in values.items()}
        params = [_entities().Param(key, value) for key, value in named.items() if key not in self._params]
        for start in range(0, len(params), PARAMS_PER_BATCH):
            self._write("log_batch", params=params[start : start + PARAMS_PER_BATCH])
        self._params |= named.keys()

    def log_episode(self, episode: Episode, *, search: str = "search") -> None:
        """Log one episode, with its index as the step: reward, perplexity, nats above dense, and what else moves.

        Args:
            episode: a perplexity that is not finite is logged as NaN: MLflow would turn infinity into 1.8e308 and
                spoil the chart.
            search: before the metrics' names; ``"search/random"`` for the random allocations beside an agent's search.
        """
        curves = {
            "target_sparsity": episode.target_sparsity,
            "fidelity": episode.fidelity,
            "failed": float(episode.failed),
            **{f"objective/{name}": value for name, value in episode.objectives.items()},
        }
        shown = {
            "reward": episode.reward,
            "perplexity": math.exp(episode.loss) if episode.loss < 700 else math.nan,
            "nats_above_dense": episode.loss - episode.dense_loss,
        }
        self.log_metrics([(f"{search}/{name}", value, episode.index) for name, value in shown.items()])
        self.log_curves({f"{search}/{name}": value for name, value in curves.items()}, episode.index)

    def log_curves(self, values: Mapping[str, float], step: int) -> None:
        """Log a point of every curve; one that has not moved since its first point is no curve, and is held back."""
        points: list[tuple[str, float, int]] = []
        for name, value in values.items():
            first, first_step = self._still.setdefault(name, (value, step))
            if name not in self._moving and not _same(first, value):
                self._moving.add(name)
                points.append((name, first, first_step))
            if name in self._moving:
                points.append((name, value, step))
        self.log_metrics(points)

    def log_result(self, result: Result, step: int = 0) -> None:
        """Log what the run came to; a later step replaces an earlier one in MLflow's tables."""
        self.log_metrics([(name, value, step) for name, value in result.metrics.items()])

    def log_metrics(self, metrics: Sequence[tuple[str, float, int]]) -> None:
        """Log (name, value, step) triples that no earlier session logged, in as few writes as MLflow allows."""
        if self.run_id is None:
            return
        now = int(time.time() * 1000)
        entities = _entities()
        batch = [
            entities.Metric(name, float(value) if math.isfinite(value) else math.nan, now, step)
            for name, value, step in metrics
            if not self._was_logged(name, value, step)
        ]
        for start in range(0, len(batch), METRICS_PER_BATCH):
            self._write("log_batch", metrics=batch[start : start + METRICS_PER_BATCH])

    def log_dataset(self, *, name: str, context: str, digest: str, corpus: str, tokens: int) -> None:
        """Log a split as a dataset input of the run.

        Args:
            name: e.g. ``"demo:c4"``.
            context: what it is used for: ``"calibration"``, ``"search"`` or ``"report"``.
            digest: of its token ids; MLflow keeps 36 characters in the digest, the whole is in the profile.
            corpus: where the text is from.
            tokens: how many.
        """
        if self.run_id is None:
            return
        entities = _entities()
        dataset = entities.Dataset(
            name=name,
            digest=digest[:DIGEST_CHARACTERS],
            source_type="code",
            source=json.dumps({"tags": {"corpus": corpus}}),
            profile=json.dumps({"tokens": tokens, "digest": digest}),
        )
        inputs = [entities.DatasetInput(dataset, [entities.InputTag("mlflow.data.context", context)])]
        try:
            self._write("log_inputs", datasets=inputs)
        except TrackingError as error:
            if not re.search("unique|duplicate", str(error), re.IGNORECASE):
                raise
            # Another run logged the same text between MLflow's look for it and its write: now it is found.
            self._write("log_inputs", datasets=inputs)

    def log_child(self, name: str, params: Mapping[str, str], result: Result) -> None:
        """Log a point of a range as a finished run of its own, nested under this one; at most once."""
        if self.run_id is None:
            return
        entities = _entities()
        with uninterrupted(self._uri), translated(self._uri, "write to the MLflow store"):
            experiment = self._client.get_run(self.run_id).info.experiment_id
            where = f"tags.`{PARENT_TAG}` = '{self.run_id}' and attributes.run_name = '{name}'"
            (child,) = self._client.search_runs([experiment], where) or [
                self._client.create_run(experiment, run_name=name, tags={PARENT_TAG: self.run_id})
            ]
            if child.info.status == "FINISHED":
                return
            now = int(time.time() * 1000)
            self._client.log_batch(
                child.info.run_id,
                metrics=[entities.Metric(key, value, now, 0) for key, value in result.metrics.items()],
                params=[entities.Param(key, _cut(value, PARAM_CHARACTERS)) for key, value in params.items()],
            )
            self._client.set_terminated(child.info.run_id)

    def log_table(self, rows: Sequence[JSONDict]) -> None:
        """Log the report's rows whole, as ``report.json``: what a table's ``as_dicts`` gives."""
        if self.run_id is not None:
            self._write("log_text", json.dumps(list(rows), indent=2), "report.json")

    def log_artifact(self, path: Path) -> None:
        """Copy a file, or a folder with what is in it, to the run's artifacts."""
        if self.run_id is not None:
            self._write("log_artifact", str(path))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, see :func:`environment_tags`; a longer value than MLflow takes is cut."""
        if self.run_id is None:
            return
        entities = _entities()
        batch = [entities.RunTag(key, _cut(value, TAG_CHARACTERS)) for key, value in tags.items()]
        for start in range(0, len(batch), PARAMS_PER_BATCH):
            self._write("log_batch", tags=batch[start : start + PARAMS_PER_BATCH])

    def _open(self) -> None:
        """Open the store and begin the run."""
        check_driver(self._uri)
        translating = translated(self._uri, "open the MLflow store")
        with translating, contextlib.ExitStack() as opening, contextlib.ExitStack() as on_failure:
            if self._uri == own_uri(self._root):
                require_writable(self._root)
                self._reserve = on_failure.enter_context(tempfile.TemporaryFile(dir=self._root))
                _fill(self._reserve)
                # Processes that make one database at once would each stumble over tables of the other.
                opening.enter_context(FileLock(self._root / "mlflow.lock", timeout=OPENING_SECONDS))
            mlflow = import_mlflow()
            with uninterrupted(self._uri):
                self._client = mlflow.MlflowClient(tracking_uri=self._uri)
                if self._uri == own_uri(self._root):
                    adopt(self._root)
                experiment = self._experiment_id()
                tags = {} if self._parent is None else {PARENT_TAG: self._parent}
                run = self._taken_up() or self._client.create_run(experiment, run_name=self._run_name, tags=tags)
                self.run_id = run.info.run_id
            on_failure.pop_all()  # from here on, leaving the block closes the reserve

    def _taken_up(self) -> Any:
        """The run of an earlier session, running again; ``None`` where there is none."""
        from mlflow.exceptions import MlflowException

        if self._resume is None:
            return None
        try:
            run = self._client.get_run(self._resume)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        if run.info.lifecycle_stage != "active":
            return None
        self._client.update_run(self._resume, status="RUNNING")
        if FAILURE_TAG in run.data.tags:
            self._client.delete_tag(self._resume, FAILURE_TAG)
        self._params = set(run.data.params)
        self._earlier = set(run.data.metrics)
        return run

    def _was_logged(self, name: str, value: float, step: int) -> bool:
        """Whether an earlier session logged the same: MLflow would show it twice."""
        if name not in self._earlier:
            return False
        if name not in self._histories:
            with uninterrupted(self._uri), translated(self._uri, "read the MLflow store"):
                history = self._client.get_metric_history(self.run_id, name)
            self._histories[name] = {point.step: point.value for point in history}
        before = self._histories[name].get(step)
        if before is None:
            return False
        return _same(before, value)

    def _experiment_id(self) -> str:
        """Find the experiment or make it."""
        from mlflow.exceptions import MlflowException

        own = self._uri == own_uri(self._root)
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            location = str(artifacts(self._root)) if own else None
            try:
                return str(self._client.create_experiment(self._experiment, artifact_location=location, tags=TAGS))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self._client.get_experiment_by_name(self._experiment)  # another run has just made it on a server
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"the MLflow experiment {self._experiment!r} in {shown(self._uri)} was deleted",
                hint="Restore it, or take another name with --set tracking.experiment=NAME.",
            )
        if own and not Path(found.artifact_location).is_dir():
            # MLflow would silently make the folder again.
            raise TrackingError(
                f"the MLflow experiment {self._experiment!r} keeps its artifacts in {found.artifact_location}, "
                "which is not there (was the folder moved?)",
                hint=f"Make that folder, {INSTEAD}",
            )
        arrange(self._client, found)
        return str(found.experiment_id)

    def _terminate(self, status: str) -> None:
        self._write("set_terminated", status)

    def _write(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of MLflow's client on this run."""
        with uninterrupted(self._uri), translated(self._uri, "write to the MLflow store"):
            getattr(self._client, method)(self.run_id, *args, **kwargs)


def environment_tags(*, device: str, dtype: str, threads: int, plugins: Mapping[str, str]) -> dict[str, str]:
    """Name the versions and the hardware settings that a result depends on.

    Args:
        device: e.g. ``"cpu"``.
        dtype: of weights and activations, e.g. ``"bfloat16"``: what ``auto`` came to.
        threads: what ``torch.get_num_threads()`` says; sums, and so rewards, depend on it in the last bits.
        plugins: the plugins used, e.g. ``{"criterion.wanda": "ffgym 0.1.0"}``.
    """
    tags = {f"version.{package}": _version(package) for package in VERSIONED}
    tags |= {f"plugin.{name}": distribution for name, distribution in plugins.items()}
    return tags | {"device": device, "dtype": dtype, "threads": str(threads)}


def _same(before: float, value: float) -> bool:
    return math.isclose(before, value, rel_tol=1e-9) or (math.isnan(before) and not math.isfinite(value))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # e.g. run from a checkout that was never installed
        return "not installed"


def _cut(value: str, limit: int) -> str:
    return value if len(value) <= limit else value[: limit - 1] + "…"


def _entities() -> Any:
    from mlflow import entities

    return entities


def _fill(reserve: IO[bytes]) -> None:
    """Hold a little disk space in a nameless file: on a full disk, closing it makes room to say how the run ended."""
    reserve.write(os.urandom(RESERVE_BYTES))
    reserve.flush()
