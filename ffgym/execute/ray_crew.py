"""Workers as Ray actors: how they are started, given jobs, heard and ended.

Each worker is a process of its own that loads the model and opens its store: Ray only carries unit counts to it and
numbers back. Ray neither restarts actors nor repeats calls; the pool does both.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil

from ffgym.errors import WorkerError
from ffgym.execute.pool import KEPT, Answered, Failed, Lost, News, Ready
from ffgym.execute.ray_worker import SENT, Make, actor_class
from ffgym.report.layout import counted
from ffgym.types import Notify

END_SECONDS = 1.0  # that Ray has for ending a worker
PLACE_SECONDS = 5.0  # that a worker's process may take to say that it is there
CALLS = 3  # that a worker answers at a time: a job, a watch, an interrupt


class RayCrew:
    """Workers as Ray actors; see `Crew`. ``options`` are the resources of each, ``on_line`` gets what they print."""

    def __init__(self, ray: Any, make: Make, options: dict[str, Any], threads: int, on_line: Notify) -> None:
        self._ray = ray
        self._make, self._options, self._threads, self._on_line = make, options, threads, on_line
        # As arguments of a call: what Ray calls a runtime environment, it writes into its logs, and some are secrets.
        self._settings = {key: value for key, value in os.environ.items() if key.startswith(SENT)}
        # Asked now, while it is connected. Ray's client would name the head's node, which may be another machine.
        self._is_client = ray.util.client.ray.is_connected()
        self._node = None if self._is_client else ray.get_runtime_context().get_node_id()
        actor = ray.remote(max_concurrency=CALLS)(actor_class())
        self._actor = actor.options(max_restarts=0, max_task_retries=0, **options)
        self._actors: dict[int, Any] = {}
        self._processes: dict[int, tuple[str, int]] = {}
        self._calls: dict[Any, tuple[int, str]] = {}  # the answers awaited: from which worker, and about what
        self._shares: dict[int, float] = {}
        self._jobs: dict[int, int] = {}

    def start(self, worker: int) -> None:
        """Begin to start a worker, see `Crew`."""
        make = self._ray.cloudpickle.dumps(self._make)
        with self._reached():
            self._actors[worker] = actor = self._actor.remote()
            loaded = actor.load.remote(make, self._threads, self._settings, os.getcwd())
            self._calls[loaded] = worker, "load"

    def give(self, worker: int, job: Any) -> None:
        """Hand a worker a job, see `Crew`."""
        self._jobs[worker] = number = self._jobs.get(worker, 0) + 1
        self._shares[worker] = 0.0
        with self._reached():
            self._calls[self._actors[worker].call.remote("work", number, job)] = worker, "work"
            self._watch(worker)

    def interrupt(self, worker: int) -> None:
        """Have a worker give up its job, see `Crew`."""
        if worker in self._jobs:
            with contextlib.suppress(WorkerError), self._reached():  # where it is lost, nobody waits for its answer
                self._actors[worker].call.remote("interrupt", self._jobs[worker])

    def dismiss(self, worker: int) -> None:
        """Kill a worker, see `Crew`."""
        self._forget(worker)
        actor = self._actors.pop(worker, None)
        if actor is None or not self._ray.is_initialized():  # it has ended, and a call would start another one
            return
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._ray.kill(actor, no_restart=True)
        node, process = self._processes.pop(worker, ("", 0))
        if process and node == self._node:
            end_process(process)

    def share(self, worker: int) -> float:
        """How much of its job a worker has done, see `Crew`."""
        return self._shares.get(worker, 0.0)

    def shortage(self) -> str:
        """What the workers that are starting wait for, see `Crew`."""
        asked = {"CPU": self._options["num_cpus"], "GPU": self._options["num_gpus"]}
        wanted = {kind: number for kind, number in asked.items() if number}
        self._check_node()
        with self._reached():
            answers = [actor.here.remote() for actor in self._actors.values()]
            if not wanted or not answers or self._ray.wait(answers, timeout=PLACE_SECONDS)[0]:
                return ""
            if not any(node["Alive"] for node in self._ray.nodes()):
                return "the cluster has no machine left"
            free = self._ray.available_resources()
        needed = " and ".join(counted(number, kind) for kind, number in wanted.items())
        left = " and ".join(counted(int(free.get(kind, 0)), kind) for kind in wanted)
        return f"each needs {needed}, and the cluster has {left} free"

    def hear(self, seconds: float) -> list[News]:
        """What has happened, see `Crew`."""
        if not self._calls:  # every worker is lost, and its place is taken later
            time.sleep(seconds)
            return []
        with self._reached():
            self._ray.wait(list(self._calls), timeout=seconds)
            ready, _ = self._ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        news: list[News] = []
        for call in ready:
            if call in self._calls:  # a worker that is lost has several
                news += self._news(call, *self._calls.pop(call))
        return news

    def _news(self, call: Any, worker: int, about: str) -> list[News]:
        try:
            with self._reached():
                kind, content, lines = self._ray.get(call)
        except WorkerError:
            raise
        except Exception as error:  # all that the worker raises comes as an answer
            self._forget(worker)
            if about == "load" and "ray::_Worker" in str(error):  # Python said so: nothing has ended the process
                return [Failed(worker, _cannot_begin(error))]
            self._check_node()
            return [Lost(worker, _why(error))]
        for line in lines:
            self._on_line(f"[{worker + 1}] {line}")
        if about == "watch":
            self._shares[worker] = content
            if any(of == worker and kind == "work" for of, kind in self._calls.values()):
                self._watch(worker)
            return []
        if kind == "failed":
            return [Failed(worker, content)]
        if about == "load":
            self._processes[worker] = content
            return [Ready(worker)]
        return [Answered(worker, content)]

    def _watch(self, worker: int) -> None:
        if (worker, "watch") not in self._calls.values():
            self._calls[self._actors[worker].call.remote("watch")] = worker, "watch"

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Call Ray; raises ``WorkerError`` where its connection is lost: left to itself, Ray would join any cluster."""
        lost = _connection_lost()
        if not self._ray.is_initialized():
            raise lost
        try:
            yield
        except Exception as error:
            if not self._is_client or isinstance(error, self._ray.exceptions.RayError):
                raise
            raise lost from error  # before Ray's client counts as disconnected

    def _check_node(self) -> None:
        """Raise ``WorkerError`` where Ray has ended on this machine: no worker would start any more, without a word."""
        with self._reached():
            if self._node is not None and not any(n["Alive"] for n in self._ray.nodes() if n["NodeID"] == self._node):
                raise _connection_lost()

    def _forget(self, worker: int) -> None:
        self._calls = {call: of for call, of in self._calls.items() if of[0] != worker}
        self._jobs.pop(worker, None)


def _connection_lost() -> WorkerError:
    return WorkerError("the connection to the Ray cluster is lost", hint=KEPT)


def _why(error: Exception) -> str:
    text = str(error)
    if "node has died" in text or "node is dead" in text:
        return "was lost with its machine"
    if "low on memory" in text:
        return "was ended because its machine ran low on memory"
    return "ended unexpectedly (killed, or out of memory)"


def _cannot_begin(error: Exception) -> WorkerError:
    said = str(error).strip().splitlines()[-1]
    address = re.search(r"\bip=([\w.:]+)", str(error))  # ray::_Worker.load() (pid=4711, ip=10.0.0.2, ...
    return WorkerError(
        f"a worker cannot begin on {address[1] if address else 'its machine'}: {said}",
        hint="All machines need the same environment: the same ffgym with the extra 'ray', see docs/scale.md.",
    )


def end_process(process: int) -> None:
    """Kill a process that was asked to end and has not, as it cannot where it is stopped.

    If a worker were killed before, Ray would print that it has died.
    """
    try:
        psutil.Process(process).wait(END_SECONDS)
    except psutil.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    except psutil.Error:
        pass
