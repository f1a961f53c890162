"""What a process has once for all its threads: Ctrl-C, which waits and is never lost, and changes that several make."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any

AGAIN_SECONDS = 0.05  # until what the first one came in the middle of has long ended


@contextmanager
def held_back_interrupts(*, first_only: bool = False) -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended.

    Args:
        first_only: a second Ctrl-C does not wait, for a block that may hang.
    """
    before: Any = signal.getsignal(signal.SIGINT)
    # Signals reach the main thread alone; where Ctrl-C is ignored, or not Python's, there is nothing to hold back.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held = 0

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal held
        held += 1
        if first_only and held > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(signal.SIGINT, None)


@contextmanager
def interruptible() -> Iterator[None]:
    """What a program runs in: what else ends it while it can still save is Ctrl-C, too; none is lost.

    That is SIGTERM, which a cluster sends before it takes a machine away, and SIGHUP, as a terminal or a connection is
    closed, unless it is ignored (``nohup``).

    Python drops a Ctrl-C that comes in the callback of a weak reference, of which torch runs many: it is sent again.
    """
    again: list[threading.Timer] = []
    said, before = sys.unraisablehook, {signal.SIGTERM: signal.signal(signal.SIGTERM, _as_ctrl_c)}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, _without_terminal)

    def hook(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            again.append(threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)))
            again[-1].start()
        else:
            said(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = said
        for number, handler in before.items():
            signal.signal(number, handler)


def shared_by_threads(change: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Make a change of the process as the first thread enters its block, and undo it as the last one leaves.

    Each thread that restored what it had found would leave the change of another one behind.
    """
    lock, undo, inside = threading.Lock(), ExitStack(), 0

    @contextmanager
    def block() -> Iterator[None]:
        nonlocal inside
        with lock:
            if not inside:
                undo.enter_context(change())
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    undo.close()

    return block


def _without_terminal(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C, but what is printed from now on goes nowhere: to write to a closed terminal is an error."""
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # a closed terminal no longer says that it is one
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
    _as_ctrl_c(number, frame)


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Also where Ctrl-C itself is ignored, as in the background of a script."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(number, frame)
