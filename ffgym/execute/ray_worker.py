"""What runs in the process of a Ray worker: it loads what jobs need, does one after another, and says how far it is."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pickle
import socket
import threading
import traceback
from collections.abc import Callable
from typing import Any, TextIO, cast

import torch
from rich.console import Console

from ffgym.errors import FFGymError, WorkerError
from ffgym.report.progress import Reporter
from ffgym.types import OnShare

WATCH_SECONDS = 0.5
SENT = ("FFGYM_", "HF_", "MLFLOW_")  # variables of which a worker has the run's, and none of its machine's

Reply = tuple[str, Any, list[str]]
"""Its kind, its content, and the lines that the worker has printed since the last one."""
Make = Callable[[Reporter], Callable[[Any, OnShare], Any]]
"""Loads what a worker needs; what it returns does a job and reports its progress."""


def actor_class() -> type:
    """The class that Ray is given. A class in a function is sent whole, so that a worker need not import ffgym for it.

    It does so once its variables are set: huggingface_hub reads ``HF_HOME`` when it is imported.
    """

    class _Worker:
        def load(self, make: bytes, threads: int, settings: dict[str, str], folder: str) -> Reply:
            for name in [name for name in os.environ if name.startswith(SENT)]:
                del os.environ[name]
            os.environ.update(settings)
            from ffgym.execute.ray_worker import Process

            self.process = Process()
            return self.process.load(pickle.loads(make), threads, folder)

        def call(self, method: str, *arguments: Any) -> Any:
            return getattr(self.process, method)(*arguments)

        def here(self) -> None:
            """Answer at once, even while the model is being loaded."""

    return _Worker


class Process:
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
