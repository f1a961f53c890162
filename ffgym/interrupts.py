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
    # Signals reach the main thread alone. None: a handler that Python did not set, and could not set again.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    held = 0

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal held
        held += 1
        if first_only and held > 1 and callable(before):
            before(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(signal.SIGINT, None)


def as_interrupt(number: int, frame: FrameType | None) -> None:
    """Handle another signal as if it were Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(number, frame)


@contextmanager
def lost_interrupts_sent_again(number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """Send Ctrl-C again where Python drops it: in callbacks of weak references, of which torch runs many.

    Args:
        number: the signal that Ctrl-C comes as.
    """
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
