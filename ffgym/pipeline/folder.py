"""The folder that a run writes into: claiming it, reopening it on resume, and what stays when a run ends early."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from ffgym.config.mixture import shares
from ffgym.config.tables import RunConfig
from ffgym.config.toml import differences, load_config
from ffgym.costs.resource import measured_resources
from ffgym.data.splits import ROLES
from ffgym.errors import ConfigError, OutputError
from ffgym.files import COPY, FileFormat, check_writable, exclusive_lock, is_of_disk, remove, write_text
from ffgym.prepare import configured
from ffgym.tracking.masking import masked
from ffgym.types import JSONDict, Notify

PICTURES = {
    "front.png": "Perplexity against sparsity, for every budget of the range.",
    "differences.png": "Difference of every row from the best heuristic, on the same windows of text.",
    "units_kept.png": "Share of its units that every sublayer keeps, over depth.",
    "reward.png": "Reward over the tokens that the search evaluated.",
    "allocations.png": "What every update of the search kept of every layer, on average.",
}
"""What a run draws, with captions."""

# What a run writes: --overwrite clears these and nothing else.
WRITTEN = frozenset(
    {"config.toml", "run.json", "episodes.jsonl", "episodes-random.jsonl"}
    | {"allocation.json", "policy.json"}
    | {"report.md", "report.json", "losses.json", "report.html"}
    | {"front.json", "front.md", "model"}
    | PICTURES.keys()
)
UNSENT = r"[0-9a-f]{32}\.unsent\.(jsonl|lock)"  # records that MLflow has not taken yet
# For each point of a front: allocation-0.20.json, model-0.20, and model-0.20-recovered. What ffgym recover writes.
WRITTEN_PER_POINT = re.compile(
    r"allocation-[01]\.\d+\.json|model-[01]\.\d+|model(-[01]\.\d+)?-recovered(\.unfinished)?"
    r"|\.model(-[01]\.\d+)?-recovered\.lock"
    rf"|{UNSENT}"
)
# Files that were being written, or replaced, when a run was killed.
LEFTOVER = re.compile(r"\.(.+)\.part-[0-9a-f]{8}(?:\.old)?")
REPORT = "report.json"
MEASURE_AGAIN = (
    f"Delete {REPORT} in that folder; `ffgym run --resume FOLDER` then makes all results again without a search."
)
RESULT = FileFormat("result of a run", JSONDict, OutputError, MEASURE_AGAIN)
LOCK = ".lock"  # held by the run that writes into the folder
WITHOUT_FINDINGS = frozenset({"config.toml", "run.json", LOCK})


def check_output(config: RunConfig) -> None:
    """Refuse the output folder of a configuration as `RunFolder.claim` does, as far as looking at it tells."""
    out = config.output
    if out.dir is None:
        return
    folder = Path(out.dir).expanduser()
    with _claiming(folder):
        if not folder.exists() or not contents(folder):
            return
    if not out.overwrite:
        raise OutputError(
            f"the output folder {folder} exists and is not empty",
            hint="Choose another one with --output DIR, replace its contents with --overwrite, or continue "
            "an interrupted run with --resume DIR.",
        )
    _keep_what_it_reads(config, folder)
    _refuse_what_is_foreign(folder)


@contextmanager
def _claiming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to the output folder {folder}: {error.strerror or error}",
            hint="With --output DIR, choose a folder on a writable disk with free space.",
        ) from error


def contents(folder: Path) -> list[Path]:
    """What is in a folder, by name; not the lock of a run that is writing, or was killed while it wrote."""
    return sorted(path for path in folder.iterdir() if path.name != LOCK)


def stored_config(folder: Path) -> RunConfig:
    """The configuration of the run that wrote into a folder.

    Raises:
        OutputError: it is no run's folder.
        ConfigError: its ``config.toml`` is damaged, or holds what this version does not know.
    """
    if (folder / "config.json").is_file():  # with a copy of config.toml beside it
        raise OutputError(f"{folder} is the folder of a saved model", hint="Name the folder of the run that saved it.")
    if not (folder / "config.toml").is_file():
        what = "has no config.toml" if folder.is_dir() else "does not exist"
        raise OutputError(
            f"there is no run in {folder}: it {what}", hint="Name a run's folder; `ffgym runs` lists them."
        )
    return load_config(folder / "config.toml")


def reopen_folder(folder: Path, config: RunConfig) -> Path:
    """Reopen the folder of a run that was interrupted.

    Args:
        config: how it is to go on; ``output``, ``tracking`` and ``workers`` may differ from what they were, but for the
            folder.

    Raises:
        OutputError: it is no run's folder, cannot be written, ``output.dir`` names another, or plugins that its search
            needs now give other numbers.
        ConfigError: the run there is of another configuration.
    """
    folder = folder.expanduser()
    stored = configured.with_options(stored_config(folder))
    for key, there, here in differences(stored, config):
        if key.startswith("recover."):
            raise ConfigError(
                f"the run in {folder} has {key} = {there!r}, this one {here!r}",
                hint=f"Resume it without, then train its model by `ffgym recover {shlex.quote(str(folder))}`, which "
                "takes these options.",
            )
        raise ConfigError(
            f"the run in {folder} has {key} = {there!r}, this one {here!r}: its episodes cannot be reused",
            hint=f"Give it {key} = {there!r}, or start in another folder with --output DIR.",
        )
    asked = config.output.dir
    if asked not in (None, stored.output.dir) and Path(asked).expanduser().resolve() != folder.resolve():
        raise OutputError(
            f"a run is resumed in its own folder, {folder}, and output.dir = {asked!r} is another",
            hint="Leave --output out, or start a new run there with --config and the config.toml of this one.",
        )
    editions = read_record(folder).editions
    if not is_searched(folder) and editions is not None and (changed := configured.outgrown(editions, config)):
        raise OutputError(
            f"the search in {folder} cannot go on: {'; '.join(changed)}",
            hint="Install what it was begun with, or start a new run with --config and its config.toml.",
        )
    check_writable(folder / "run.json", COPY)
    return folder.resolve()


@dataclass(frozen=True)
class RunRecord:
    """What later sessions of a run must know about earlier ones, kept in ``run.json``."""

    mlflow_run: str | None = None  # the MLflow run that they write to; None where there is none
    dtype: str | None = None  # what model.dtype = "auto" chose; None where the model has not been loaded
    results: tuple[str, ...] = ()  # names of the table and the models that the finished run left; empty before that
    # of its plugins, those beyond the first; None where an earlier version began the run
    editions: dict[str, int] | None = None
    # path of the dense model, absolute or in the home folder ~; None where that is no folder or file, or an earlier
    # version began the run
    dense: str | None = None
    # digests of the model's weights and of the texts to calibrate and to search with; empty where nothing has been
    # loaded, or an earlier version began the run
    inputs: dict[str, str] = field(default_factory=dict)
    ended: str = ""  # how the last session ended early, in sentences; empty where it did not, or was killed


RECORD = FileFormat(
    "record of a run's sessions",
    RunRecord,
    OutputError,
    "Delete it: the run then continues in a new MLflow run, with the dtype of its config.toml.",
)


def read_record(folder: Path) -> RunRecord:
    """What the sessions of this folder's run have noted."""
    path = folder / "run.json"
    return RECORD.read(path) if path.exists() else RunRecord()


def is_searched(folder: Path) -> bool:
    """Whether the search of the run in a folder is complete, and its table written."""
    return (folder / REPORT).is_file()


def is_finished(folder: Path, config: RunConfig) -> bool:
    """Whether the run in a folder is finished, and its results are still there.

    Args:
        config: how it is to go on: a run that left no model is not finished where one is wanted now.
    """
    stored = stored_config(folder)
    if stored.output.model_dump(exclude={"dir", "overwrite"}) != config.output.model_dump(exclude={"dir", "overwrite"}):
        return False
    if config.tracking.enabled and config.tracking != stored.tracking:
        return False
    results = read_record(folder).results
    return bool(results) and all((folder / name).exists() for name in results)


def _keep_what_it_reads(config: RunConfig, folder: Path) -> None:
    """Refuse to clear what the run itself reads, now or when it is resumed."""
    read = {
        "model.name": config.model.name,
        "search.init_from": config.search.init_from,
        "prune.latency_table": config.prune.latency_table,
        "recover.corpus": config.recover.corpus,
    }
    named = [(key, name) for key, name in read.items() if name is not None]
    named += [(f"data.{role}", name) for role in ROLES for name in shares(getattr(config.data, role))]
    for key, name in named:
        source = Path(name).expanduser()  # need not be a path: the id of an MLflow run, say
        if source.exists() and source.resolve().is_relative_to(folder.resolve()):
            raise OutputError(
                f"--overwrite would delete {source}, and {key} names it",
                hint="Choose another folder with --output DIR.",
            )


def _measurements() -> frozenset[str]:
    """Files that hold what was measured of resources, e.g. ``latency.json``."""
    return frozenset(f"{resource}.json" for resource in measured_resources())


def _is_written(name: str) -> bool:
    """Whether runs write files or folders of this name."""
    return name in WRITTEN | _measurements() or WRITTEN_PER_POINT.fullmatch(name) is not None


def _refuse_what_is_foreign(folder: Path) -> None:
    """Refuse to clear a folder that holds what no run wrote, e.g. somebody's project."""
    names = [LEFTOVER.sub(r"\1", path.name) for path in contents(folder)]
    foreign = [name for name in names if not _is_written(name)]
    if foreign or "config.toml" not in names:  # it may have been killed while it wrote that
        what = f"holds {foreign[0]}, which ffgym did not write" if foreign else "was not written by ffgym"
        raise OutputError(
            f"{folder} is not empty and {what}, so --overwrite will not clear it",
            hint="Choose another folder with --output DIR.",
        )


def resume_command(folder: Path) -> str:
    """The command that continues the run in a folder."""
    return f"ffgym run --resume {shlex.quote(str(folder))}"


class RunFolder:
    """The folder that a run writes into, from the beginning of a session to its end.

    Where it is to be overwritten, it is an earlier run's until `clear`.

    Args:
        resumed: the run goes on; ``False`` for a new one.
        made: the run made the folder; of one that was there before, it only removes what is in it.
    """

    def __init__(self, path: Path, *, resumed: bool = False, made: bool = False) -> None:
        self.path = path
        self.resumed = resumed
        self.record = read_record(path) if resumed else RunRecord()
        self.is_ours = resumed or not contents(path)
        self._made = made
        self._begun_with: int | None = None  # bytes in its logs when the session began to write; None before that

    @classmethod
    def claim(cls, config: RunConfig) -> RunFolder:
        """Make the folder of a new run; refuse one that holds something unless it may be overwritten.

        Raises:
            OutputError: occupied, or it cannot be made or written.
        """
        check_output(config)  # again: since the run was started, another one may have written there
        named = config.output.dir
        path = Path("runs" if named is None else named).expanduser()
        made = named is None or not path.exists()
        with _claiming(path):
            if named is None:
                path = _new_folder(path, f"{datetime.now():%Y%m%d-%H%M%S}-{config.agent.name}-{config.criterion.name}")
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        return cls(path.resolve(), made=made)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out while this one writes; a run that was killed keeps nobody out.

        Raises:
            OutputError: another run holds it.
        """
        with exclusive_lock(self.path / LOCK) as mine:
            if not mine:
                raise OutputError(
                    f"another run is writing into {self.path}",
                    hint="Let it end or stop it, or choose another folder with --output DIR.",
                )
            yield

    def clear(self) -> None:
        """Remove what an earlier run wrote, and take the folder over.

        Raises:
            OutputError: something came into it since it was claimed that no run writes.
        """
        _refuse_what_is_foreign(self.path)
        for path in contents(self.path):
            remove(path)
        self.is_ours = True

    def begin(self, toml: str, record: RunRecord) -> None:
        """Write the configuration and the record: from here on there is something to go on with."""
        for path in contents(self.path):  # what was being written when an earlier session was killed
            if (left := LEFTOVER.fullmatch(path.name)) and _is_written(left[1]):
                remove(path)
        write_text(self.path / "config.toml", toml)
        self.note(record)
        self._begun_with = self._logged()

    def note(self, record: RunRecord) -> None:
        """Remember it for later sessions."""
        self.record = record
        RECORD.write(self.path / "run.json", record)

    def can_go_on(self) -> bool:
        """Whether there is something that a later session could go on with."""
        return self.is_ours and (self.path / "run.json").exists()

    def finish(self) -> None:
        """Note that the run is finished, and what it left."""
        (self.path / "report.html").unlink(missing_ok=True)  # of the unfinished run
        left = [path.name for path in contents(self.path) if path.name == REPORT or path.name.startswith("model")]
        self.note(replace(self.record, results=tuple(left)))

    def end_early(self, stop: BaseException, notify: Notify) -> None:
        """Note why a session ends early, and say what is kept and how the run goes on; remove a folder of nothing."""
        if self._begun_with is not None and isinstance(stop, KeyboardInterrupt | Exception):
            logged, is_asked = self._logged(), isinstance(stop, KeyboardInterrupt)
            if isinstance(stop, OutputError) and is_of_disk(stop.__cause__) and logged:
                again = resume_command(self.path)
                stop.hint = f"Make room on the disk, or make it writable again, then continue: {again}"
            ended = "It was interrupted." if is_asked else masked(f"It failed: {type(stop).__name__}: {stop}")
            with suppress(OutputError):  # a full disk must not hide why it ends
                if self.can_go_on():  # a folder that was deleted stays so
                    self.note(replace(self.record, ended=ended))
            if is_asked or logged > self._begun_with:  # a resumed run may have been refused
                self._say_what_is_kept(stop, notify)
        if self.is_ours and not self.resumed and self._holds_nothing():
            for path in contents(self.path):
                path.unlink()  # the corrected command needs the folder
            if self._made:
                shutil.rmtree(self.path)

    def _say_what_is_kept(self, stop: BaseException, notify: Notify) -> None:
        path = self.path / "allocation.json"
        if path.exists():
            best = RESULT.read(path)
            sparsity = f"sparsity {best['sparsity']:.1%}"
            notify(f"the best of {best['episodes']} episodes ({best['origin']}, {sparsity}) is in {path}")
        elif self._logged():
            notify(f"the episodes so far are in {self.path / 'episodes.jsonl'}")
        else:
            notify("no episode has ended, so nothing is kept of this run")
            return
        notify(f"continue where it stopped: {resume_command(self.path)}")
        stop.add_note(f"in Python, continue where it stopped: ffgym.run(config, resume={str(self.path)!r})")

    def _logged(self) -> int:
        """Bytes of the logs of episodes."""
        return sum(log.stat().st_size for log in self.path.glob("episodes*.jsonl"))

    def _holds_nothing(self) -> bool:
        """Whether the folder is there, and without findings; a log that was opened and holds no episode is empty."""
        if not self.path.is_dir():
            return False
        found = {path.name for path in self.path.iterdir() if path.is_dir() or path.stat().st_size}
        return all(re.fullmatch(UNSENT, name) for name in found - WITHOUT_FINDINGS - _measurements())


def _new_folder(parent: Path, name: str) -> Path:
    """Make a folder of that name, or with a number behind it where another run has just made one."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder
