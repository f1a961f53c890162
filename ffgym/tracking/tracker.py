"""Writes a run into the MLflow store: its configuration, episodes, splits, result and files, and how it ended."""

from __future__ import annotations

import contextlib
import errno
import getpass
import math
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ffgym.errors import OutputError, TrackingError
from ffgym.interrupts import held_back_interrupts
from ffgym.tracking import store
from ffgym.tracking.masking import masked, shown
from ffgym.tracking.names import SHORT_NAMES, Result, parameters
from ffgym.tracking.outbox import Outbox
from ffgym.tracking.records import Point, send
from ffgym.tracking.runs import run_or_none
from ffgym.tracking.system import SystemMetrics
from ffgym.tracking.view import TAGS
from ffgym.types import Episode, JSONDict, Notify, Update, perplexity_of
from ffgym.version import __version__

DESCRIPTION_TAG = "mlflow.note.content"
FAILURE_TAG, INTERRUPTION_TAG, RESUME_TAG = "ffgym.failure", "ffgym.interruption", "ffgym.resume"
RETRY_SECONDS = 60  # after which a store that took nothing is tried again


@dataclass(eq=False)
class Tracker:
    """Writes one run into the MLflow store; as a context manager it also says how the run ended.

    Leaving the block normally marks the run FINISHED, Ctrl-C marks it KILLED, any other exception FAILED with the
    reason in the tag ``ffgym.failure``. (MLflow's own context manager would mark Ctrl-C as FAILED.)

    What the store does not take once the run has begun, because a server is away, or a database full, locked or gone,
    is kept in ``unsent``, and sent as soon as it does, by this run, by the one that resumes it, or by ``ffgym sync``.
    What MLflow refuses for good is said and left out.

    Args:
        root: folder of the store, made if it is missing.
        enabled: ``False`` writes nothing and imports nothing: every method may be called and does nothing.
        unsent: folder for what the store does not take, which must be there once there is something to keep.
        parent: ``run_id`` of the run that this one is a child of.
        resume: ``run_id`` of an earlier session of the same run, which goes on: what that has logged is not logged
            again. Where the store does not have it (any more), a new run is made.
        command: what makes the run, e.g. ``"ffgym run"``.
        again: the command that goes on with the run once it has ended early.
        can_go_on: whether there is something to go on with.
        notify: is told what a user should know, such as that a server went away.

    Raises:
        TrackingError: from the ``with`` statement, where the store cannot be opened.
        OutputError: from every method, where ``unsent`` cannot be written either.
    """

    root: Path
    experiment: str
    run_name: str
    enabled: bool = True
    _: KW_ONLY
    unsent: Path | None = None
    parent: str | None = None
    resume: str | None = None
    command: str = "ffgym"
    again: str = ""
    can_go_on: Callable[[], bool] = lambda: True
    notify: Notify = print

    def __post_init__(self) -> None:
        self.run_id: str | None = None
        self._unsent = self.unsent or self.root
        self._had_folder = False
        self._earlier: set[tuple[str, str, int]] = set()  # points that earlier sessions logged
        self._uri = store.tracking_uri(self.root) if self.enabled else ""
        self._is_own = self.enabled and self._uri == store.own_uri(self.root)
        self._client: Any = None
        self._params: dict[str, str] = {}
        self._still: dict[str, list[tuple[str, float, int]]] = {}  # of each curve that has not moved yet; else empty
        self._description = ""
        self._result: list[Point] = []
        self._system = SystemMetrics()
        self._outbox: Outbox | None = None  # of a run that has begun
        self._retry_at: float | None = None  # when a store that took nothing is tried again

    def __enter__(self) -> Self:
        if self.enabled:
            try:
                self._open()
            except KeyboardInterrupt:
                if self.run_id is not None:
                    self._end("KILLED")
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.run_id is None:
            return
        if error is None:
            with held_back_interrupts(first_only=True):
                self._end("FINISHED")
        else:
            # A full disk must not hide why the run ended.
            with contextlib.suppress(OutputError):
                self._end_early(error)
        if self._outbox is not None and len(self._outbox):
            root = ["--root", str(self.root)] if self._is_own else []
            command = shlex.join(["ffgym", "sync", str(self._outbox.folder), *root])
            self.notify(f"{len(self._outbox)} records of the MLflow run are still to be sent: {command}")

    def log_config(self, config: Mapping[str, Any], toml: str) -> None:
        """Log the resolved configuration: what decides the run as parameters, and the whole TOML as an artifact.

        Args:
            config: nested tables, see :func:`ffgym.tracking.names.parameters`. Values longer than MLflow's 6,000
                characters are cut. A parameter keeps its first value, as MLflow demands.
            toml: the same as text, stored whole as ``config.toml``.
        """
        self.log_params(parameters(config))
        self._write("text", text=toml, file="config.toml")

    def log_params(self, values: Mapping[str, str]) -> None:
        """Log parameters to compare runs by; see `log_config`."""
        new = {key: value for key, value in values.items() if key not in self._params}
        if new:
            self._write("values", params=new)
        self._params |= new

    def log_episode(self, episode: Episode, *, search: str = "search") -> None:
        """Log one episode, with its index as the step: reward, perplexity, nats above dense, and what else moves.

        Args:
            episode: a perplexity that is not finite is logged as NaN.
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
            "perplexity": perplexity_of(episode.loss),
            "nats_above_dense": episode.loss - episode.dense_loss,
        }
        points = [(f"{search}/{name}", value, episode.index) for name, value in shown.items()]
        self.log_metrics(points + self._moved(search, curves, episode.index))

    def log_update(self, update: Update, step: int, *, search: str = "search") -> None:
        """Log what an agent says of an update; a value that has not moved yet is no curve, and is held back."""
        self.log_metrics(self._moved(search, update.diagnostics, step))

    def log_result(self, result: Result, step: int = 0) -> None:
        """Log the run's result; a later step replaces an earlier one in MLflow's tables."""
        self._result = _points((name, value, step) for name, value in result.metrics.items())
        self._write_points(self._result)

    def log_metrics(self, metrics: Sequence[tuple[str, float, int]]) -> None:
        """Log (name, value, step) triples that no earlier session logged, and from time to time the machine's load."""
        if self.run_id is not None:
            self._write_points(_points((*metrics, *self._system.sample())))

    def log_dataset(self, *, name: str, context: str, digest: str, corpus: str, tokens: int) -> None:
        """Log a split as a dataset input of the run.

        Args:
            context: what it is used for: ``"calibration"``, ``"search"`` or ``"report"``.
            digest: of its token ids; MLflow keeps 36 characters in the digest, the whole is in the profile.
        """
        self._write("dataset", name=name, context=context, digest=digest, corpus=corpus, tokens=tokens)

    def log_child(self, name: str, params: Mapping[str, str], result: Result) -> None:
        """Log a point of a range as a finished run of its own, nested under this one; at most once."""
        points = _points((key, value, 0) for key, value in result.metrics.items())
        name, tags = f"{self.run_name}: {name}", self._source()
        self._write("child", name=name, params=dict(params), tags=tags, metrics=points)

    def log_artifact(self, path: Path) -> None:
        """Copy a file, or a folder with what is in it, to the run's artifacts."""
        self._write("artifact", path=str(path.resolve()))

    def log_model(self, folder: Path) -> None:
        """Log a saved model, which the last result is of; one of more than a gigabyte stays where it is."""
        params = {name: self._params[name] for name in SHORT_NAMES.values() if name in self._params}
        self._write("model", path=str(folder.resolve()), params=params, result=self._result)

    def describe(self, markdown: str) -> None:
        """Say on the run's page what it is; a later description replaces an earlier one."""
        self._description = markdown
        self.set_tags({DESCRIPTION_TAG: markdown})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, see :func:`environment_tags`; a longer value than MLflow takes is cut."""
        self._write("values", tags=dict(tags))

    def _open(self) -> None:
        """Open the store and begin the run."""
        with store.translated(self._uri, "open the MLflow store"), store.uninterrupted(self._uri):
            if self._is_own:
                store.make_store(self.root, self.notify)
                store.adopt(self.root)  # a write: MLflow would try one that is impossible for a minute, with warnings
            self._client = store.client_of(self._uri)
            experiment = self._experiment_id()
            run = self._earlier_run() or self._client.create_run(
                experiment, run_name=self.run_name, tags=self._source()
            )
            self._had_folder = self._unsent.exists()
            self._outbox = Outbox(self._unsent, run.info.run_id)
            self.run_id = run.info.run_id

    def _source(self) -> dict[str, str]:
        """Tags that MLflow shows as who made the run, with what, and for which other run."""
        tags = {"mlflow.source.name": self.command, "mlflow.source.type": "LOCAL"}
        with contextlib.suppress(OSError, KeyError, ImportError):  # a user without an entry in the password database
            tags["mlflow.user"] = getpass.getuser()
        parent = self.run_id or self.parent
        return tags if parent is None else tags | {store.PARENT_TAG: parent}

    def _earlier_run(self) -> Any:
        """The run of an earlier session, marked as running again once its unsent records are sent; else ``None``."""
        if self.resume is None:
            return None
        run = run_or_none(self._client, self.resume)
        if run is None or run.info.lifecycle_stage != "active":
            return None
        Outbox(self._unsent, self.resume).forward(lambda record: send(self._client, run.info.run_id, record))
        self._client.update_run(self.resume, status="RUNNING")
        run = self._client.get_run(self.resume)
        for tag in {DESCRIPTION_TAG, FAILURE_TAG, INTERRUPTION_TAG, RESUME_TAG} & run.data.tags.keys():
            self._client.delete_tag(self.resume, tag)
        self._params = dict(run.data.params)
        for name in run.data.metrics:
            if not name.startswith("system/"):
                history = self._client.get_metric_history(self.resume, name)
                self._earlier |= {(name, _rounded(point.value), point.step) for point in history}
        return run

    def _write_points(self, points: Sequence[Point]) -> None:
        """Send points of curves, but for those that an earlier session logged: MLflow would show them twice."""
        new = [point for point in points if (point[0], _rounded(point[1]), point[2]) not in self._earlier]
        if new:
            self._write("values", metrics=new)

    def _moved(self, search: str, values: Mapping[str, float], step: int) -> list[tuple[str, float, int]]:
        """The points of those curves that have moved by now, of one that has just done so with all before."""
        points: list[tuple[str, float, int]] = []
        for name, value in values.items():
            curve = f"{search}/{name}"
            is_new = curve not in self._still
            held_back = self._still.setdefault(curve, [])
            held_back.append((curve, value, step))
            if not is_new and (len(held_back) == 1 or _rounded(held_back[0][1]) != _rounded(value)):
                points += held_back
                held_back.clear()
        return points

    def _experiment_id(self) -> str:
        """Find the experiment or make it."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            location = str(store.artifacts(self.root)) if self._is_own else None
            try:
                return str(self._client.create_experiment(self.experiment, artifact_location=location, tags=TAGS))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self._client.get_experiment_by_name(self.experiment)  # another run may have made it just now
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"the MLflow experiment {self.experiment!r} in {shown(self._uri)} was deleted",
                hint="Restore it, or take another name with --set tracking.experiment=NAME.",
            )
        if self._is_own and not Path(found.artifact_location).is_dir():
            # MLflow would silently make the folder again.
            raise TrackingError(
                f"the MLflow experiment {self.experiment!r} keeps its artifacts in {found.artifact_location}, "
                "which is not there (was the folder moved?)",
                hint=f"Make that folder, {store.INSTEAD}",
            )
        return str(found.experiment_id)

    def _end(self, status: str) -> None:
        if self._retry_at is not None:
            self._retry_at = 0.0  # try once more, however recent the last attempt
        self._write("end", status=status, time=_milliseconds())

    def _end_early(self, error: BaseException) -> None:
        """Say why the run ended, and how it goes on, in tags and on its page."""
        interrupted = isinstance(error, KeyboardInterrupt)
        if interrupted:
            reason, tag = "Ctrl-C, or the system's request to end", INTERRUPTION_TAG
        else:
            reason, tag = masked(f"{type(error).__name__}: {error}", self._uri), FAILURE_TAG
        page = f"**{'Interrupted' if interrupted else 'Failed'}:** {reason}"
        tags = {tag: reason}
        if self.again and self.can_go_on():
            tags[RESUME_TAG] = self.again
            page += f"\n\nGo on with\n\n```console\n$ {self.again}\n```"
        try:
            self.set_tags({**tags, DESCRIPTION_TAG: "\n\n".join(filter(None, [page, self._description]))})
        finally:
            self._end("KILLED" if interrupted else "FAILED")

    def _write(self, kind: str, **values: Any) -> None:
        """Send a record to the run; keep what the store does not take."""
        if self._outbox is None:
            return
        record = {"write": kind, **values}
        is_away = self._retry_at is not None
        try:
            if self._retry_at is None:
                self._send(record)
                return
            self._keep(record)
            if time.monotonic() >= self._retry_at:
                self._outbox.forward(self._send)
                self._retry_at = None
        except TrackingError as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not is_away:
                self._keep(record)
                kept = f", and keeps what it logs in {self._outbox.path}" if len(self._outbox) else ""
                self.notify(f"{error.message}; the run goes on{kept}")

    def _keep(self, record: JSONDict) -> None:
        """Keep a record on disk; of a run that found nothing, whose folder has been removed, nothing is kept."""
        if self._outbox is not None and (self._unsent.exists() or not self._had_folder):
            self._outbox.add(record)

    def _send(self, record: JSONDict) -> None:
        assert self.run_id is not None, "the run has begun"
        with store.uninterrupted(self._uri), store.translated(self._uri, "write to the MLflow store"):
            if self._is_own and not store.database(self.root).is_file():
                # MLflow would go on writing into a deleted file, and make the folder of its artifacts again.
                raise FileNotFoundError(errno.ENOENT, "the database is not there any more")
            send(self._client, self.run_id, record)


def environment_tags(*, device: str, dtype: str, threads: int, plugins: Mapping[str, str]) -> dict[str, str]:
    """Name the versions and the hardware settings that a result depends on.

    Args:
        dtype: of weights and activations, e.g. ``"bfloat16"``; never ``auto``.
        threads: what ``torch.get_num_threads()`` says; sums, and so rewards, depend on it in the last bits.
        plugins: the plugins used, e.g. ``{"criterion.wanda": "ffgym 0.1.0"}``.
    """
    tags = {"version.ffgym": __version__, **{f"version.{name}": version(name) for name in ("torch", "transformers")}}
    tags |= {f"plugin.{name}": distribution for name, distribution in plugins.items()}
    return tags | {"device": device, "dtype": dtype, "threads": str(threads)}


def _points(metrics: Iterable[tuple[str, float, int]]) -> list[Point]:
    """Metrics as (name, value, step) with the time; MLflow would turn infinity into 1.8e308 and spoil the chart."""
    now = _milliseconds()
    return [(name, float(value) if math.isfinite(value) else math.nan, step, now) for name, value, step in metrics]


def _milliseconds() -> int:
    return int(time.time() * 1000)


def _rounded(value: float) -> str:
    """A value to compare: NaN is equal to itself, and what differs in the last bits is equal."""
    return f"{value:.9g}"
