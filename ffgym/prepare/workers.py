"""Workers that measure beside this process: what each is sent to make its evaluator, and the cluster they run on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console

from ffgym.config.mixture import shares
from ffgym.config.tables import RunConfig, WorkersTable
from ffgym.data.corpora import source_of
from ffgym.data.examples import EncodedExample
from ffgym.data.splits import ROLES, Splits
from ffgym.errors import ConfigError, WorkerError
from ffgym.evaluation.evaluator import Evaluator, ModelEvaluator
from ffgym.models.loading import LoadedModel, load
from ffgym.models.origin import absolute_name
from ffgym.models.placement import choose_device
from ffgym.plugins import manager
from ffgym.plugins.bases import Plugin
from ffgym.plugins.kinds import PluginKind
from ffgym.prepare.configured import used_plugins
from ffgym.prepare.parts import evaluator_of, examples_for, make_reward, prepare_model
from ffgym.prepare.paths import Prepared
from ffgym.report.layout import counted
from ffgym.report.progress import Reporter
from ffgym.types import Notify

if TYPE_CHECKING:
    from ffgym.execute.ray import Cluster


@dataclass(frozen=True)
class EvaluatorMaker:
    """How a worker makes its evaluator: it is sent these values and loads the model by itself."""

    config: RunConfig  # the run, with the dtype that the model was loaded in
    calibration: torch.Tensor  # calibration token ids, shape (windows, length), int64
    windows: torch.Tensor  # search token ids, the same
    examples: tuple[EncodedExample, ...]
    keep: frozenset[str]  # statistics that were kept for heuristics
    store: Path | None  # the prepared model; None where it is not stored and every worker prepares its own
    key: str  # of what this run has prepared
    streamed: bool = False  # whether layers stay in the checkpoint until they are needed
    # the model's folder or file, where the run has found it; None for one of the hub, and the demo
    place: str | None = None
    plugins: tuple[ForeignPlugin, ...] = ()  # which a worker must have

    def __call__(self) -> ModelEvaluator:
        """Load the model, open the store, make the evaluator; raises ``WorkerError`` where they are not the run's."""
        check_installed(self.plugins)
        if self.place is not None:
            check_seen(self.place)
        if self.store is not None and not self.store.parent.is_dir():  # what was removed from there is prepared again
            raise WorkerError(
                f"a worker on {socket.gethostname()} does not see the prepared model {self.store}",
                hint="Set FFGYM_CACHE to a folder that all machines share, or FFGYM_CACHE_SIZE=0 to prepare on each.",
            )
        table = self.config.model
        loaded = load(
            self.place or table.name,
            revision=table.revision,
            dtype=table.dtype,
            device=table.device,
            streamed=self.streamed,
        )
        nobody = Reporter(Console(quiet=True))
        prepared = prepare_model(self.config, loaded, self.calibration, keep=self.keep, reporter=nobody, key=self.key)
        return self.on(prepared)

    def on(self, prepared: Prepared) -> ModelEvaluator:
        """The evaluator of a prepared model."""
        return evaluator_of(self.config, prepared, self.windows, self.examples)


def local_places(config: RunConfig) -> tuple[str, ...]:
    """Full paths of the model and the texts that a run reads from files and folders of this machine, if they exist."""
    texts = dict.fromkeys(name for role in ROLES for name in shares(getattr(config.data, role)))
    names = (absolute_name(config.model.name), *(name for name in texts if source_of(name) is None))
    paths = (Path(name).expanduser() for name in names if name is not None)
    return tuple(str(path.absolute()) for path in paths if path.exists())


def check_seen(place: str) -> None:
    """Raise in a worker whose machine lacks a file or folder of the run: its name might mean something on the hub."""
    if not Path(place).exists():
        raise WorkerError(
            f"a worker on {socket.gethostname()} does not see {place}",
            hint="Put it on a disk that all machines share, where it has the same path on each.",
        )


class ForeignPlugin(NamedTuple):
    """A plugin that is not ffgym's own."""

    kind: PluginKind
    name: str
    package: str  # with its version


def foreign_plugins(used: Iterable[tuple[PluginKind, type[Plugin]]]) -> tuple[ForeignPlugin, ...]:
    """The plugins among these that are not ffgym's own."""
    foreign = ((kind, cls) for kind, cls in used if not manager.is_built_in(cls))
    return tuple(ForeignPlugin(kind, cls.name, str(manager.package_of(cls))) for kind, cls in foreign)


def check_installed(plugins: Iterable[ForeignPlugin]) -> None:
    """Raise ``WorkerError`` in a worker whose machine lacks one of these."""
    for kind, name, package in plugins:
        if not manager.is_name(kind, name):
            raise WorkerError(
                f"a worker on {socket.gethostname()} does not have {kind} {name!r}",
                hint=manager.with_plugins(f"Install {package} on all machines of the cluster.", name),
            )


def shared_executor(
    cluster: Cluster,
    config: RunConfig,
    loaded: LoadedModel,
    prepared: Prepared,
    splits: Splits,
    keep: frozenset[str] = frozenset(),
) -> Evaluator:
    """An executor that shares measurements out among the workers of a cluster, who measure as this process does."""
    table = config.model.model_copy(update={"dtype": loaded.dtype_name})  # another machine's "auto" may be another
    used = used_plugins(config, ("criterion", "prune"))
    measuring = [used["criterion"], used["prune.calibration"], ("family", type(prepared.prunable.family))]
    maker = EvaluatorMaker(
        config.model_copy(update={"model": table}),
        splits.calibration.windows,
        splits.search.windows,
        examples_for(make_reward(config), loaded),
        keep,
        prepared.store,
        prepared.key,
        loaded.stream is not None,
        absolute_name(table.name),
        foreign_plugins(measuring),
    )
    return cluster.executor(maker, maker.on(prepared), prepared.prunable.dense_units)


def report_idle_workers(episodes: int, workers: int, notify: Notify, sloped_windows: int | None = None) -> None:
    """Tell the user if an update has fewer parts to share out than there are workers.

    An episode whose slopes are measured is an update by itself, shared out window by window: ``sloped_windows``.
    """
    if sloped_windows is None:
        parts, when, update = episodes, "", f"an update is {counted(episodes, 'episode')}"
    else:
        parts, when = sloped_windows, "while slopes are followed, "
        update = f"an update is one episode of {counted(sloped_windows, 'window')}"
    if parts < workers:
        have = "has" if workers - parts == 1 else "have"
        notify(f"{when}{workers - parts} of {workers} workers {have} nothing to do: {update}")


def report_crowded_cores(workers: int, threads: int, cores: int, notify: Notify) -> None:
    """Tell the user if workers on the CPU of this machine, with so many threads each, have more than it has cores."""
    if workers * threads > cores:
        notify(
            f"{workers} workers with {counted(threads, 'thread')} each slow each other down on "
            f"{counted(cores, 'core')}: set OMP_NUM_THREADS={max(1, cores // workers)}, or use fewer workers"
        )


@contextmanager
def cluster_of(table: WorkersTable, device: str, notify: Notify) -> Iterator[Cluster | None]:
    """The workers that a table asks for, within the block; ``None`` where this process works alone.

    Raises:
        ConfigError: more than one worker on one and the same GPU.
        WorkerError: see `connected`.
    """
    if table.count == 1:
        if table.ray_address:
            notify(f"one worker is this process: the Ray cluster at {table.ray_address} is not used")
        yield None
        return
    if ":" in device:
        raise ConfigError(
            f"model.device = {device!r} is one device, and {table.count} workers need one each",
            hint="Set model.device to auto or cuda: Ray gives every worker its own.",
        )
    from ffgym.execute.ray import Workers, connected

    is_on_gpu = choose_device(device).type == "cuda"
    gpus = int(is_on_gpu) if table.gpus == "auto" else table.gpus
    workers = Workers(table.count, table.ray_address, gpus, torch.get_num_threads())
    if not (is_on_gpu or table.ray_address):
        report_crowded_cores(workers.count, workers.threads, os.cpu_count() or 1, notify)
    with connected(workers, notify) as cluster:
        yield cluster
