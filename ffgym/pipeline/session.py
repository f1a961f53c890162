"""One session of a run: its folder, its MLflow run, its progress, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ffgym.config.tables import RunConfig
from ffgym.config.toml import to_toml
from ffgym.errors import OutputError
from ffgym.files import disk_errors
from ffgym.models.origin import recorded_name
from ffgym.pipeline.artifacts import REPEAT
from ffgym.pipeline.folder import RunFolder, RunRecord, is_searched, resume_command
from ffgym.pipeline.task import Task
from ffgym.prepare.configured import editions, meanings
from ffgym.report.progress import Reporter
from ffgym.tracking.store import FOLDER_TAG
from ffgym.tracking.tracker import Tracker


@dataclass(frozen=True)
class Session:
    """A run from the moment its folder is locked until it is finished, interrupted or failed."""

    config: RunConfig
    place: RunFolder  # where the run writes; locked against other runs
    tracker: Tracker
    progress: Reporter

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig, progress: Reporter, resumed: Path | None) -> Iterator[Session]:
        """Lock the run's folder, and start or continue its MLflow run; at the end, leave both as they should be.

        Args:
            config: with all options of its plugins.
            resumed: folder of an earlier session, reopened; ``None`` for a new run.
        """
        place = RunFolder.claim(config) if resumed is None else RunFolder(resumed, resumed=True)
        table = config.tracking
        with place.lock():
            with ExitStack() as tracking:  # MLflow learns how the run ended from the folder as it then is
                try:
                    tracker = tracking.enter_context(
                        Tracker(
                            table.folder,
                            table.experiment,
                            place.path.name,
                            table.enabled,
                            unsent=place.path,
                            resume=place.record.mlflow_run,
                            command="ffgym run",
                            again=resume_command(place.path),
                            can_go_on=place.can_go_on,
                            notify=progress.print,
                        )
                    )
                    with disk_errors():
                        session = cls(config, place, tracker, progress)
                        session._start()
                        yield session
                except BaseException as stop:
                    place.end_early(stop, progress.print)
                    raise
            place.finish()

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.place.path

    def begin_search(self, task: Task) -> None:
        """Take over the folder, now that model and text have been loaded, and record what they are.

        An earlier run's results are cleared here and not before: a run that cannot load its model must not delete them.
        """
        inputs = {
            "model weights": task.prepared.weights,
            "calibration text": task.splits.calibration.digest,
            "search text": task.splits.search.digest,
        }
        began = self.place.record.inputs
        if changed := [name for name, digest in inputs.items() if began.get(name, digest) != digest]:
            raise OutputError(
                f"the run in {self.folder} cannot go on: its {' and '.join(changed)} changed since it began",
                hint="Put back what it was begun with, or start a new run with --config and its config.toml.",
            )
        if not self.place.is_ours:
            self.place.clear()
            self._begin()
        self.place.note(replace(self.place.record, dtype=task.loaded.dtype_name, inputs=inputs))

    def _start(self) -> None:
        if self.place.resumed and is_searched(self.folder):
            self.progress.print("the search of this run is complete; only the later steps are done again")
        self.tracker.describe(REPEAT)
        self.tracker.set_tags({FOLDER_TAG: str(self.folder)})
        self.tracker.log_config(self.config.model_dump(mode="json"), self._toml)
        if self.place.is_ours:
            self._begin()

    def _begin(self) -> None:
        earlier, config = self.place.record, self.config
        run, dense = self.tracker.run_id or earlier.mlflow_run, recorded_name(config.model.name) or earlier.dense
        record = RunRecord(run, earlier.dtype, editions=editions(config), dense=dense, inputs=earlier.inputs)
        self.place.begin(self._toml, record)

    @property
    def _toml(self) -> str:
        return to_toml(self.config, meanings(self.config))
