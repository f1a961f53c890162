"""Ctrl-C: it waits for the end of what must not be left half done, and it is never lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    """What a program runs in: SIGTERM, which a cluster sends before it takes a machine away, is Ctrl-C; none is lost.

    Python drops a Ctrl-C that comes in the callback of a weak reference, of which torch runs many: it is sent again.
    """
    again: list[threading.Timer] = []
    said, ended = sys.unraisablehook, signal.signal(signal.SIGTERM, _as_ctrl_c)

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
        signal.signal(signal.SIGTERM, ended)


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Also where Ctrl-C itself is ignored, as in the background of a script."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(number, frame)
