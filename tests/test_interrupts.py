from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ffgym.interrupts import held_back_interrupts, interruptible, shared_by_threads


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_end_of_a_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (the block is what is tested)
        with held_back_interrupts():
            interrupt()
            interrupt()
            done.append("block")
        done.append("after")
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_need_not_wait() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held_back_interrupts(first_only=True):  # noqa: PT012
        interrupt()
        done.append("first")
        interrupt()
        done.append("second")
    assert done == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_block_without_ctrl_c_and_one_in_another_thread_change_nothing() -> None:
    done = []

    def block() -> None:
        with held_back_interrupts():
            done.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    block()
    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert done == [False, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_back_interrupts(first_only=True):
            interrupt()
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_several_threads_change_of_a_process_is_undone_as_the_last_one_leaves() -> None:
    changed, states = {"muted": False}, []

    @shared_by_threads
    @contextmanager
    def muted() -> Iterator[None]:
        before = changed["muted"]
        changed["muted"] = True
        try:
            yield
        finally:
            changed["muted"] = before

    def longer(inside: threading.Event, alone: threading.Event) -> None:
        with muted():
            inside.set()
            alone.wait(10)
            states.append(changed["muted"])

    inside, alone = threading.Event(), threading.Event()
    other = threading.Thread(target=longer, args=(inside, alone))
    with muted():
        other.start()
        inside.wait(10)
    alone.set()
    other.join()
    assert states == [True]
    assert not changed["muted"]


class Referred:
    """What a weak reference can point at."""


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["usual", "ignored"])
def test_sigterm_is_ctrl_c(ctrl_c: Any) -> None:
    done = []
    interrupts, terminations = signal.signal(signal.SIGINT, ctrl_c), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():  # noqa: PT012 (the block is what is tested)
            with held_back_interrupts():
                done.append("before")
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("after")
    finally:
        signal.signal(signal.SIGINT, interrupts)
    assert done == ["before"]
    assert signal.getsignal(signal.SIGTERM) is terminations


def test_a_closed_terminal_is_ctrl_c_and_what_is_printed_afterwards_no_error() -> None:
    code = (
        "import signal, sys, time\nfrom ffgym.interrupts import interruptible\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # these tests may run under nohup
        "try:\n    with interruptible():\n        print('ready', flush=True)\n        time.sleep(600)\n"
        "except KeyboardInterrupt:\n    print('saved', flush=True)\n    sys.exit(130)"
    )
    terminal, its_end = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=its_end, stderr=its_end)
    os.close(its_end)
    assert os.read(terminal, 100).strip() == b"ready"
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 130


def test_under_nohup_a_closed_terminal_changes_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_waits_as_ctrl_c_does() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interruptible(), held_back_interrupts():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("held back")
    assert done == ["held back"]


def test_ctrl_c_in_the_callback_of_a_weak_reference_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    kept = Referred()
    reference = weakref.ref(kept, lambda _: interrupt())
    with pytest.raises(KeyboardInterrupt), interruptible():  # noqa: PT012 (the block is what is tested)
        del kept
        assert reference() is None
        time.sleep(10)
    assert capsys.readouterr().err == ""


def test_another_exception_there_is_told_as_before() -> None:
    code = (
        "import weakref\nfrom ffgym.interrupts import interruptible\nclass Referred: pass\n"
        "kept = Referred()\nreference = weakref.ref(kept, lambda _: 1 / 0)\n"
        "with interruptible():\n    del kept"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "ZeroDivisionError" in done.stderr) == (0, True)


def test_ctrl_c_once_a_command_has_ended_prints_no_traceback() -> None:
    code = (
        "import atexit, os, signal, sys\nfrom ffgym.cli import main\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\nsys.argv = ['ffgym', '--version']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
