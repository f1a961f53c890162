"""Workers on Ray, on this machine or a cluster: the only module that knows Ray.

Each worker is an actor, a process of its own that loads the model and opens its store: Ray only carries unit counts to
it and numbers back. Ray neither restarts actors nor repeats calls; the pool does both.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import os
import pickle
import re
import signal
import socket
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, cast

import psutil
import torch
from rich.console import Console

from ffgym.errors import FFGymError, WorkerError, first_line
from ffgym.evaluation.evaluator import Evaluator, Request
from ffgym.execute.pool import ATTEMPTS, KEPT, Answered, Failed, Lost, News, Pool, Ready
from ffgym.execute.shares import Shares, Speeds, cost, joined, parts
from ffgym.report.layout import counted
from ffgym.report.progress import Reporter
from ffgym.types import Evaluation, Notify, OnShare, do_nothing

PROBE_SECONDS = 30.0
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"  # of gRPC's protocol: the preface and empty settings
WATCH_SECONDS = 0.5
OBJECT_STORE_BYTES = 100_000_000  # numbers are all that it holds
END_SECONDS = 1.0  # that Ray has for ending a worker
PLACE_SECONDS = 5.0  # that a worker's process may take to say that it is there
CALLS = 3  # that a worker answers at a time: a job, a watch, an interrupt
SENT = ("FFGYM_", "HF_", "MLFLOW_")  # variables of which a worker has this process's, and none of its machine's
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
}
HINTS = {  # for what a cluster answers
    "client connection timeout": "If it asks for a token, set RAY_AUTH_MODE=token (ray get-auth-token). Clients have a "
    "port of their own: 10001, unless ray start --ray-client-server-port names another.",
    "client server failed": "The head was too slow to start a server for this client: try again, or start the command "
    "on a machine of the cluster.",
}

Reply = tuple[str, Any, list[str]]
"""Its kind, its content, and the lines that the worker has printed since the last one."""
Make = Callable[[Reporter], Callable[[Any, OnShare], Any]]
"""Loads what a worker needs; what it returns does a job and reports its progress."""


@dataclass(frozen=True)
class Workers:
    """How many workers there are, and where."""

    count: int  # at least 2
    address: str | None = None  # of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; None for one of this machine
    gpus: int = 0  # GPUs of each
    threads: int = 1  # torch threads of each

    def cpus(self, *, is_own: bool) -> int:
        """Processors that each asks a cluster for; none of one that nobody else uses."""
        return 0 if is_own else 1 if self.gpus else self.threads


@dataclass(eq=False)
class Cluster:
    """A connection to Ray."""

    ray: Any  # the module
    workers: Workers  # that may be started on it
    notify: Notify
    is_own: bool  # nobody else uses it
    pools: list[Pool] = field(default_factory=list)

    def pool(self, make: Make, on_line: Notify = do_nothing, grace: float = 0.0) -> Pool:
        """A pool of workers, which start with the first work.

        Args:
            make: loads what a worker needs; it is sent there, so it must be picklable.
            on_line: called with each line that workers print, headed by their number.
            grace: seconds that an interrupted worker may take to end its job.
        """
        options = {"num_cpus": self.workers.cpus(is_own=self.is_own), "num_gpus": self.workers.gpus}
        crew = RayCrew(self.ray, make, options, self.workers.threads, on_line)
        self.pools.append(pool := Pool(crew, self.workers.count, self.notify, grace))
        return pool

    def executor(self, make: Callable[[], Evaluator], dense: Evaluator, dense_units: tuple[int, ...]) -> RayExecutor:
        """An executor whose workers each make an evaluator; see `RayExecutor`."""
        return RayExecutor(self.pool(partial(measuring, make)), dense, dense_units)

    def close(self) -> None:
        """End all workers."""
        for pool in self.pools:
            pool.close()


@dataclass
class RayExecutor:
    """An evaluator that shares requests out among workers; how many there are changes no bit of what comes back.

    Meanwhile, this process measures the dense model and keeps its results by window. Shared out, every worker would end
    up measuring every window.
    """

    pool: Pool  # workers that each measure a list of requests
    dense: Evaluator  # measures the dense model here
    dense_units: tuple[int, ...]  # of each sublayer
    speeds: Speeds = field(default_factory=Speeds)

    def measure(self, requests: Sequence[Request], on_progress: OnShare = do_nothing) -> list[Evaluation]:
        """Measure every request, in the order asked for."""
        dense = [request for request in requests if request.kept == self.dense_units]
        shared = {request: parts(request) for request in requests if request.kept != self.dense_units}
        others = list(dict.fromkeys(chain.from_iterable(shared.values())))
        if not others:
            return self.dense.measure(requests, on_progress)
        with _in_background(lambda stop: self.dense.measure(dense, stop)) as measured:
            shares = Shares(others, self.speeds)
            self.pool.work(shares, len(others), lambda: self._tell(shares, on_progress))
            shares.note_late(self.pool.share)
            found = dict(zip(dense, measured(), strict=True))
        found |= {request: joined([shares.answers[part] for part in own]) for request, own in shared.items()}
        return [found[request] for request in requests]

    def _tell(self, shares: Shares, on_progress: OnShare) -> None:
        running = sum(share.cost * self.pool.share(worker) for worker, share in shares.taken.items())
        done = min(1.0, (sum(map(cost, shares.answers)) + running) / shares.total)
        if done or not shares.taken:  # 0 says that nobody measures yet
            on_progress(done)


@contextlib.contextmanager
def _in_background(call: Callable[[OnShare], Any]) -> Iterator[Callable[[], Any]]:
    """Make a call in a thread that ends with the block; the call reports progress, and is stopped by that."""
    is_over = threading.Event()

    def stop_if_over(share: float) -> None:
        if is_over.is_set():
            raise InterruptedError

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call, stop_if_over)
        try:
            yield future.result
        finally:
            is_over.set()


def measuring(make_evaluator: Callable[[], Evaluator], reporter: Reporter) -> Callable[[Any, OnShare], Any]:
    """What a worker that measures requests does; the first argument bound, it is a `Make`."""
    return make_evaluator().measure


@contextlib.contextmanager
def connected(workers: Workers, notify: Notify) -> Iterator[Cluster]:
    """Connect to Ray, or start one on this machine; what was started here ends with the block.

    In a process that has called ``ray.init`` itself, that is the cluster.

    Raises:
        WorkerError: Ray is missing, nobody answers, or the cluster has no room for the workers.
    """
    ray = _imported()
    if not ray.is_initialized():
        place = "starting Ray on this machine" if workers.address is None else f"connecting to Ray at {workers.address}"
        notify(f"{place} for {workers.count} workers")
        ended = signal.getsignal(signal.SIGTERM)
        _begin(ray, workers.address, notify)
        _BEGUN.append(workers.address)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ended)  # Ray's own handler would end the run without saving anything
    is_own = _BEGUN[:1] == [None]
    cluster = Cluster(ray, workers, notify, is_own)
    _OPEN.append(cluster)
    end = weakref.finalize(cluster, _end_use, ray, cluster)  # once: here, or in a script that never closes, at its exit
    atexit.register(end)  # comes before Ray's own, which Ray's import has registered
    try:
        _check_room(ray, workers, is_own=is_own)
        yield cluster
    finally:
        end()


def _end_use(ray: Any, cluster: Cluster) -> None:
    cluster.close()
    _OPEN.remove(cluster)
    if _BEGUN and not _OPEN:
        _BEGUN.clear()
        ray.shutdown()


_BEGUN: list[str | None] = []
"""The address of the Ray that was started here; empty where somebody else has called ``ray.init``."""
_OPEN: list[Cluster] = []
"""Who uses it: two environments of one process share it."""


def _imported() -> Any:
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    try:
        import ray
    except ImportError as error:
        raise WorkerError(
            f"more than one worker needs Ray, which is not installed ({error})",
            hint="pip install 'ffgym[ray]', or leave --workers out.",
        ) from None
    return ray


def _begin(ray: Any, address: str | None, notify: Notify) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        own = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        _start(ray, {"address": "local", **own, **quiet}, notify)
        return
    hint = "Start one with ray start --head, or give --ray-address '' to use this machine alone."
    at = _noted() if address == "auto" else address
    if at is None:
        hint += " Of one that was started with --temp-dir, give the address: HOST:PORT."
        raise WorkerError("no Ray cluster is noted on this machine", hint=hint)
    if at.startswith("ray://"):
        hint += " A head answers at ray:// only where it has ray[client], which ffgym[ray] installs."
    _probe(at, hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's client also warns of what it raises
            ray.init(address=address, **quiet)
    except Exception as error:
        hint = "If it asks for a token, set RAY_AUTH_MODE=token (ray get-auth-token). It needs the same Python and Ray."
        hint = next((known for words, known in HINTS.items() if words in str(error)), hint)
        hint = "Install the extra 'ray', on its machines too." if isinstance(error, ImportError) else hint
        raise WorkerError(f"cannot join the Ray cluster at {at}: {first_line(error)}", hint=hint) from None


def _start(ray: Any, options: dict[str, Any], notify: Notify) -> None:
    """Start Ray; its processes have 30 seconds for it, which a busy machine may exceed once or twice."""
    earlier = psutil.Process().children()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:
            _clear(ray, earlier)
            is_long = "AF_UNIX path length" in str(error)
            if attempt == ATTEMPTS or is_long:
                busy = "If the machine is very busy, run it again later; or leave --workers out."
                hint = "TMPDIR is too long for Ray's sockets: set RAY_TMPDIR=/tmp." if is_long else busy
                raise WorkerError(f"Ray did not start on this machine: {first_line(error)}", hint=hint) from error
            notify(f"Ray did not start ({first_line(error)}): trying again")


def _clear(ray: Any, earlier: Sequence[psutil.Process]) -> None:
    """End what a try to start Ray has left: its own clearing knows nothing of processes that came up too late."""
    with contextlib.suppress(Exception):
        ray.shutdown()
    package = str(Path(ray.__file__).parent)
    for process in set(psutil.Process().children()) - set(earlier):
        with contextlib.suppress(psutil.Error):
            if any(package in word for word in process.cmdline()):  # another thread's children are not Ray's
                process.terminate()
                _end(process.pid)


def _noted() -> str | None:
    """Address of the cluster that ``RAY_ADDRESS`` names or ``ray start`` has noted on this machine.

    Ray's own ``auto`` also takes one that another program has begun for itself, and that ends when it does.
    """
    from ray._private.services import find_bootstrap_address

    return os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None)


def _probe(address: str, hint: str) -> None:
    """Raise where nobody listens, or not Ray; Ray itself would try for minutes and then end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise WorkerError(f"{address!r} is no Ray address", hint="Give auto, HOST:PORT or ray://HOST:PORT.")
    try:
        with socket.create_connection((host, int(port)), PROBE_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return  # only Ray can tell
            connection.sendall(HELLO)
            is_grpc = connection.recv(4)[3:] == b"\4"  # the type of a frame of settings
    except OSError as error:
        raise WorkerError(f"no Ray cluster answers at {address}: {error.strerror or error}", hint=hint) from None
    if not is_grpc:
        raise WorkerError(f"no Ray cluster answers at {address}: something else listens there", hint=hint)


def _check_room(ray: Any, workers: Workers, *, is_own: bool) -> None:
    """Raise where the machines of a cluster have too few GPUs or CPUs for the workers."""
    wanted = {"GPU": workers.gpus, "CPU": workers.cpus(is_own=is_own)}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min((int(node.get(k, 0) // n) for k, n in wanted.items() if n), default=workers.count) for node in nodes)
    if room >= workers.count:
        return
    per_worker = " and ".join(counted(n, k) for k, n in wanted.items() if n)
    there = "; ".join(", ".join(f"{int(node.get(k, 0))} {k}s" for k, n in wanted.items() if n) for node in nodes)
    fewer = f"Use at most {room} workers" if room > 1 else "Leave --workers out"
    less = "fewer GPUs each (workers.gpus)" if workers.gpus else "fewer threads each (OMP_NUM_THREADS)"
    raise WorkerError(
        f"{workers.count} workers with {per_worker} each do not fit on machines with {there or 'none'}",
        hint=f"{fewer}, use {less}, or add machines.",
    )


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
        actor = ray.remote(max_concurrency=CALLS)(_actor())
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
            _end(process)

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


def _end(process: int) -> None:
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


def _actor() -> type:
    """The class that Ray is given. A class in a function is sent whole, so that a worker need not import ffgym for it.

    It does so once its variables are set: huggingface_hub reads ``HF_HOME`` when it is imported.
    """

    class _Worker:
        def load(self, make: bytes, threads: int, settings: dict[str, str], folder: str) -> Reply:
            for name in [name for name in os.environ if name.startswith(SENT)]:
                del os.environ[name]
            os.environ.update(settings)
            from ffgym.execute.ray import _Process

            self.process = _Process()
            return self.process.load(pickle.loads(make), threads, folder)

        def call(self, method: str, *arguments: Any) -> Any:
            return getattr(self.process, method)(*arguments)

        def here(self) -> None:
            """Answer at once, even while the model is being loaded."""

    return _Worker


class _Process:
    """A worker's process: one thread does its jobs, and a second one reports how far it is."""

    def __init__(self) -> None:
        self._lines = _Lines()
        self._lock, self._changed = threading.Lock(), threading.Event()
        self._job, self._thread, self._share, self._threads = 0, 0, 0.0, 1

    def load(self, make: Make, threads: int, folder: str) -> Reply:
        """Get ready for jobs; the content is where the process is, (node, process id)."""
        import ray

        with contextlib.suppress(OSError):  # a machine that has no such folder may not need it
            os.chdir(folder)
        torch.set_num_threads(threads)
        self._threads = threads
        try:
            self._do = make(Reporter(Console(file=cast("TextIO", self._lines), force_terminal=False)))
        except Exception as error:
            return "failed", _portable(error), self._lines.taken()
        return "loaded", (ray.get_runtime_context().get_node_id(), os.getpid()), self._lines.taken()

    def work(self, number: int, job: Any) -> Reply:
        """Do a job; the content is the answer, or ``None`` where it was interrupted."""
        torch.set_num_threads(self._threads)  # Ray may have loaded in another thread
        kind, content = "done", None
        try:
            try:
                with self._lock:
                    self._job, self._thread, self._share = number, threading.get_ident(), 0.0
                content = self._do(job, self._advance)
            except Exception as error:
                kind, content = "failed", _portable(error)
            finally:
                with self._lock:  # an interrupt comes before, as late as here, or not at all
                    self._thread = 0
                    _raise_in(threading.get_ident(), None)
        except KeyboardInterrupt:
            kind, content = "done", None
        finally:
            self._changed.set()
        return kind, content, self._lines.taken()

    def watch(self) -> Reply:
        """Wait a moment for the job to end; the content is the share of it that is done."""
        self._changed.wait(WATCH_SECONDS)
        self._changed.clear()
        return "share", self._share, self._lines.taken()

    def interrupt(self, number: int) -> None:
        """Raise ``KeyboardInterrupt`` in the thread that does this job, unless it does another one by now."""
        with self._lock:
            if self._thread and self._job == number:
                _raise_in(self._thread, KeyboardInterrupt)
                self._thread = 0  # a second interrupt would come while the first one is handled

    def _advance(self, share: float) -> None:
        self._share = share


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Have a thread raise an exception in its next steps; ``None`` takes back one that it has not raised yet."""
    raised = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def _portable(error: Exception) -> Exception:
    """The exception as it can be sent: it names the machine, and has its traceback unless it was raised on purpose."""
    where = f"a worker on {socket.gethostname()}"
    if not isinstance(error, FFGymError) or error.__cause__ is not None:
        error.add_note(f"in {where}:\n{traceback.format_exc()}")
    if isinstance(error, FFGymError) and not isinstance(error, WorkerError):  # which names it already
        error.message = f"{where}: {error.message}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error


class _Lines(io.TextIOBase):
    """A text file that keeps complete lines until they are taken."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        self._rest = ""

    def write(self, text: str) -> int:
        """Add text to the lines."""
        *lines, self._rest = (self._rest + text).split("\n")
        self._lines += lines
        return len(text)

    def taken(self) -> list[str]:
        """The lines since the last call, which may come from another thread."""
        return [self._lines.pop(0) for _ in range(len(self._lines))]
