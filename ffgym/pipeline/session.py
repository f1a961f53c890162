"""One session of a run: its folder, its MLflow run, its progress, and what happens if it ends early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ffgym.config.tables import RunConfig
from ffgym.config.toml import to_toml
from ffgym.errors import OutputError
from ffgym.files import disk_errors, write_text
from ffgym.models.origin import recorded_name
from ffgym.pipeline.artifacts import REPEAT
from ffgym.pipeline.folder import (
    RunRecord,
    claim_folder,
    clear_folder,
    contents,
    folder_lock,
    is_searched,
    noting_results,
    read_record,
    remove_half_written,
    removing_if_nothing_found,
    resume_command,
    saying_what_is_kept,
    write_record,
)
from ffgym.pipeline.task import Task
from ffgym.prepare.configured import editions, meanings, outgrown
from ffgym.report.progress import Reporter
from ffgym.tracking.store import FOLDER_TAG
from ffgym.tracking.tracker import Tracker


@dataclass
class Session:
    """A run from the moment its folder is locked until it is finished, interrupted or failed."""

    config: RunConfig
    folder: Path  # where the run writes; locked against other runs
    tracker: Tracker
    progress: Reporter
    resumed: bool  # whether this session continues an earlier one
    record: RunRecord  # what later sessions need to know
    _ending: ExitStack
    _overwrites: bool
    _removing_if_nothing_found: AbstractContextManager[None]

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig, progress: Reporter, resume: Path | None) -> Iterator[Session]:
        """Lock the run's folder, and start or continue its MLflow run.

        Args:
            config: with all options of its plugins.
            resume: folder of an earlier session, reopened; ``None`` for a new run.

        Raises:
            OutputError: a folder that is occupied, locked or not writable, or whose plugins now give other numbers;
                nothing in it has changed.
        """
        resumed, named = resume is not None, config.output.dir
        made = named is None or not Path(named).expanduser().exists()
        folder = claim_folder(config) if resume is None else resume
        earlier = read_record(folder) if resumed else RunRecord()
        if not is_searched(folder) and earlier.editions is not None and (changed := outgrown(earlier.editions, config)):
            raise OutputError(
                f"the search in {folder} cannot go on: {'; '.join(changed)}",
                hint="Install what it was begun with, or start a new run with --config and its config.toml.",
            )
        table = config.tracking
        overwrites = not resumed and bool(contents(folder))
        with (
            folder_lock(folder),
            # For what goes wrong before MLflow is open; behind that, MLflow is told once the folder is gone.
            nullcontext() if resumed or overwrites else removing_if_nothing_found(folder, made=made),
            noting_results(folder),  # after MLflow has the result too
            Tracker(
                table.folder,
                table.experiment,
                folder.name,
                table.enabled,
                unsent=folder,
                resume=earlier.mlflow_run,
                command="ffgym run",
                again=resume_command(folder),
                # Not where nothing was found, nor where the folder is still that of an earlier run.
                can_go_on=lambda: (folder / "run.json").exists() and read_record(folder).mlflow_run == tracker.run_id,
                notify=progress.print,
            ) as tracker,
            disk_errors(),
            ExitStack() as ending,
        ):
            record = RunRecord(
                tracker.run_id or earlier.mlflow_run,
                earlier.dtype,
                editions=editions(config),
                dense=recorded_name(config.model.name) or earlier.dense,
                inputs=earlier.inputs,
            )
            removing = removing_if_nothing_found(folder, made=made)
            session = cls(config, folder, tracker, progress, resumed, record, ending, overwrites, removing)
            session._start()
            yield session

    def begin_search(self, task: Task) -> None:
        """Take over the folder, now that model and text have been loaded, and record what they are.

        An earlier run's results are cleared here and not before: a run that cannot load its model must not delete them.

        Raises:
            OutputError: the run was begun with other weights or text: its episodes cannot be reused.
        """
        inputs = {
            "model weights": task.prepared.weights,
            "calibration text": task.splits.calibration.digest,
            "search text": task.splits.search.digest,
        }
        began = self.record.inputs
        if changed := [name for name, digest in inputs.items() if began.get(name, digest) != digest]:
            raise OutputError(
                f"the run in {self.folder} cannot go on: its {' and '.join(changed)} changed since it began",
                hint="Put back what it was begun with, or start a new run with --config and its config.toml.",
            )
        if self._overwrites:
            clear_folder(self.folder)
            self._ending.enter_context(self._removing_if_nothing_found)
            self._write_config()
        self.record = replace(self.record, dtype=task.loaded.dtype_name, inputs=inputs)
        write_record(self.folder, self.record)

    def _start(self) -> None:
        if self.resumed:
            if is_searched(self.folder):
                self.progress.print("the search of this run is complete; only the later steps are done again")
            remove_half_written(self.folder)
        elif not self._overwrites:
            self._ending.enter_context(self._removing_if_nothing_found)
        self.tracker.describe(REPEAT)
        self.tracker.set_tags({FOLDER_TAG: str(self.folder)})
        self.tracker.log_config(self.config.model_dump(mode="json"), self._toml)
        if not self._overwrites:
            self._write_config()

    def _write_config(self) -> None:
        """From here on the folder is this run's."""
        write_text(self.folder / "config.toml", self._toml)
        write_record(self.folder, self.record)
        self._ending.enter_context(saying_what_is_kept(self.folder, self.progress.print))

    @property
    def _toml(self) -> str:
        return to_toml(self.config, meanings(self.config))
