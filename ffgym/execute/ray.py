"""The connection to Ray, on this machine or to a cluster, and the workers that may be started there."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ffgym.errors import WorkerError, first_line
from ffgym.evaluation.evaluator import Evaluator
from ffgym.execute.executor import PoolExecutor, measuring
from ffgym.execute.pool import ATTEMPTS, Pool
from ffgym.execute.ray_crew import RayCrew, end_process
from ffgym.execute.ray_worker import Make
from ffgym.report.layout import counted
from ffgym.types import Notify, do_nothing

PROBE_SECONDS = 30.0
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"  # of gRPC's protocol: the preface and empty settings
OBJECT_STORE_BYTES = 100_000_000  # numbers are all that it holds
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

    def executor(self, make: Callable[[], Evaluator], dense: Evaluator, dense_units: tuple[int, ...]) -> PoolExecutor:
        """An executor whose workers each make an evaluator; see `PoolExecutor`."""
        return PoolExecutor(self.pool(partial(measuring, make)), dense, dense_units)

    def close(self) -> None:
        """End all workers."""
        for pool in self.pools:
            pool.close()


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
                end_process(process.pid)


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
