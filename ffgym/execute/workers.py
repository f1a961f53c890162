"""A few processes that work through jobs; whichever is free takes the next one.

Processes and not threads: two single-threaded processes get more out of two cores than one two-threaded process. Each
process keeps what it has built (a prepared model) from one job to the next, and what it says comes out whole, line by
line, through the process that started it.

No process outlives the one that started it: Ctrl-C there is passed on once, as a ``KeyboardInterrupt`` in each process,
and a starter that was killed is noticed. So whatever a job writes down as it goes is all that has to survive.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any, Protocol, TextIO, TypeVar, cast

from rich.console import Console

from ffgym.errors import FFGymError, WorkerError
from ffgym.interrupts import interruptible
from ffgym.report.progress import Reporter

J = TypeVar("J")
Job = TypeVar("Job", covariant=True)
SECONDS_TO_END = 30.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

Make = Callable[[Reporter], Callable[[J], None]]


class Queue(Protocol[Job]):
    """Hands out jobs."""

    def take(self, worker: int) -> Job | None:
        """The next job for a free worker; ``None`` where there is none for it before another job has ended."""

    def done(self, worker: int) -> None:
        """Take note that the worker's job has ended well."""


@dataclass
class _Worker:
    """One process as its starter sees it."""

    number: int
    process: Any
    pipe: connection.Connection
    busy: bool = False


def work(queue: Queue[J], make: Make[J], reporter: Reporter, *, processes: int, threads: int) -> None:
    """Do every job of a queue.

    Args:
        queue: hands out jobs; asked in this process only.
        make: called once in every process with where it may say what it is doing; what it returns does one job. Both
            it and the jobs must be picklable.
        reporter: where progress goes; lines of process 2 begin with ``[2]``.
        processes: >= 1; a single one is this process itself.
        threads: torch threads of each process, also where it is this one.

    Raises:
        Exception: what a job raised; the others are interrupted first.
        WorkerError: a process was killed from outside.
        KeyboardInterrupt: Ctrl-C; the processes have ended.
    """
    if processes == 1:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            do = make(reporter)
            while (job := queue.take(0)) is not None:
                do(job)
                queue.done(0)
        finally:
            torch.set_num_threads(before)
        return
    workers: list[_Worker] = []
    try:
        with _inherited(threads):
            for number in range(processes):
                workers.append(_start(number, make))
        _drive(queue, workers, reporter)
    finally:
        _end(workers)


def _drive(queue: Queue[J], workers: list[_Worker], reporter: Reporter) -> None:
    while True:
        for worker in workers:
            if not worker.busy and (job := queue.take(worker.number)) is not None:
                with contextlib.suppress(OSError):  # a process that is gone shows when its pipe is read
                    worker.pipe.send(job)
                worker.busy = True
        if not any(worker.busy for worker in workers):
            return
        for pipe in connection.wait([worker.pipe for worker in workers]):
            worker = next(w for w in workers if w.pipe is pipe)
            kind, content = _received(worker)
            if kind == "line":
                reporter.print(f"[{worker.number + 1}] {content}")
            elif kind == "failed":
                raise content
            else:
                worker.busy = False
                queue.done(worker.number)


def _received(worker: _Worker) -> tuple[str, Any]:
    try:
        kind, content = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(SECONDS_TO_END)
        raise WorkerError(
            f"process {worker.number + 1} ended unexpectedly (exit code {worker.process.exitcode})",
            hint="If memory is short, use fewer --jobs. Finished work is kept: the same command continues.",
        ) from None
    return str(kind), content


def _start(number: int, make: Make[Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a fork of a process whose threads hold locks may hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(make, theirs), name=f"ffgym-{number + 1}", daemon=True)
    process.start()
    theirs.close()
    return _Worker(number, process, ours)


def _end(workers: list[_Worker]) -> None:
    """Interrupt the busy ones, dismiss the others, and wait until all are gone."""
    for worker in workers:
        if worker.busy:
            worker.process.terminate()
        worker.pipe.close()
    for worker in workers:
        worker.process.join(SECONDS_TO_END)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


@contextlib.contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """What processes started in this block get: the number of threads, and no Ctrl-C of their own.

    Torch reads these variables when it is imported. Ctrl-C goes to every process of a terminal, and would interrupt one
    that is still importing.
    """
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    resource_tracker.ensure_running()  # it lifts the mask where it has to be started
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _serve(make: Make[Any], pipe: connection.Connection) -> None:
    """Be a process: do the jobs that come through the pipe, until it is closed or the starter is gone."""
    threading.Thread(target=_end_with_starter, daemon=True).start()
    os.dup2(sys.stderr.fileno(), 1)  # stdout is for results, and those are the starter's
    file = cast("TextIO", _Lines(lambda line: pipe.send(("line", line))))
    # KeyboardInterrupt: told to end. EOFError, OSError: dismissed, the other end of the pipe is closed.
    with contextlib.suppress(KeyboardInterrupt, EOFError, OSError), interruptible():
        do = make(Reporter(Console(file=file, force_terminal=False)))
        while True:
            job = pipe.recv()
            try:
                do(job)
            except Exception as error:
                pipe.send(("failed", _portable(error)))
                return
            pipe.send(("done", None))


def _end_with_starter() -> None:
    starter = multiprocessing.parent_process()
    assert starter is not None, "called in a child"
    connection.wait([starter.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _portable(error: Exception) -> Exception:
    """The exception as it can be sent, with its traceback as a note unless it was raised on purpose."""
    if not isinstance(error, FFGymError):
        error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error


class _Lines:
    """A text file that hands on whole lines.

    Args:
        send: called with each line, without its end.
    """

    encoding = "utf-8"

    def __init__(self, send: Callable[[str], None]) -> None:
        self._send = send
        self._rest = ""

    def write(self, text: str) -> int:
        """Take text; hand on the lines that it completes."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            with contextlib.suppress(OSError):  # nobody listens any more: the process is being ended
                self._send(line)
        return len(text)

    def flush(self) -> None:
        """Do nothing: lines are handed on at once."""

    def isatty(self) -> bool:
        """Say no."""
        return False
