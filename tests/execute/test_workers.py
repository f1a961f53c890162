"""Processes that share a queue: each job once, state kept, whole lines, and nobody left behind."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ffgym.errors import OutputError, UnknownNameError, WorkerError
from ffgym.execute.workers import SECONDS_TO_END, work
from ffgym.interrupts import held_back_interrupts
from ffgym.report.progress import Reporter

Job = tuple[str, Path]


class Line:
    """A queue: first come, first served."""

    def __init__(self, *jobs: Job) -> None:
        self.jobs = list(jobs)
        self.finished: list[int] = []

    def take(self, worker: int) -> Job | None:
        return self.jobs.pop(0) if self.jobs else None

    def done(self, worker: int) -> None:
        self.finished.append(worker)


class Doer:
    """Does jobs by name; remembers how many it did."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.count = 0

    def __call__(self, job: Job) -> None:
        what, path = job
        self.count += 1
        getattr(self, f"_{what}")(path)

    def _note(self, path: Path) -> None:
        import torch

        path.write_text(f"{os.getpid()} {self.count} {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}")
        time.sleep(0.3)  # so that the other process gets its share

    def _talk(self, path: Path) -> None:
        print("on stdout")
        for part in ("half a ", "line\nand ", "another\n"):
            self.reporter.console.file.write(part)
            time.sleep(0.05)
        self.reporter.print("[bold]as it is[/bold]")

    def _wait(self, path: Path) -> None:
        try:
            path.write_text(str(os.getpid()))
            time.sleep(60)
        except KeyboardInterrupt:
            with path.open("a") as file:
                file.write(" interrupted")
            raise

    def _hold(self, path: Path) -> None:
        with held_back_interrupts():
            path.write_text(str(os.getpid()))
            time.sleep(0.5)
            path.write_text(f"{os.getpid()} whole")
        time.sleep(60)

    def _fail(self, path: Path) -> None:
        _until(path.with_name("waiting").exists)
        raise OutputError("no room", hint="Make some.")

    def _break(self, path: Path) -> None:
        raise ZeroDivisionError("a mistake")

    def _unsendable(self, path: Path) -> None:
        error = ValueError("with a handle")
        error.handle = path.with_name("handle").open("w")  # type: ignore[attr-defined]
        raise error

    def _die(self, path: Path) -> None:
        os._exit(3)


def _until(happened: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def _gone(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


def run(*jobs: Job, processes: int = 2, threads: int = 1) -> tuple[Line, str]:
    queue, console = Line(*jobs), Console(file=io.StringIO(), width=200)
    work(queue, Doer, Reporter(console), processes=processes, threads=threads)
    return queue, console.file.getvalue()  # type: ignore[attr-defined]


def test_each_job_is_done_once_by_processes_that_keep_their_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    queue, _ = run(*(("note", tmp_path / str(i)) for i in range(6)), threads=2)
    notes = [(tmp_path / str(i)).read_text().split() for i in range(6)]
    workers = {process for process, *_ in notes}
    assert len(workers) == 2
    assert str(os.getpid()) not in workers
    for worker in workers:
        counts = [int(count) for process, count, *_ in notes if process == worker]
        assert counts == list(range(1, len(counts) + 1))
    assert {tuple(threads) for _, _, *threads in notes} == {("2", "2")}
    assert len(queue.finished) == 6
    assert set(queue.finished) == {0, 1}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert all(_gone(int(worker)) for worker in workers)


def test_a_single_process_is_this_one(tmp_path: Path) -> None:
    queue, _ = run(("note", tmp_path / "a"), ("note", tmp_path / "b"), processes=1)
    assert (tmp_path / "b").read_text().split()[:2] == [str(os.getpid()), "2"]
    assert queue.finished == [0, 0]


def test_lines_come_out_whole_and_say_who_speaks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, said = run(("talk", tmp_path), ("talk", tmp_path))
    own = ["half a line", "and another", "[bold]as it is[/bold]"]
    for number in (1, 2):
        assert [line[4:] for line in said.splitlines() if line.startswith(f"[{number}] ")] == own
    assert len(said.splitlines()) == 6
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("on stdout") == 2


def test_a_failure_arrives_as_it_was_and_interrupts_the_others(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no room") as raised:
        run(("wait", tmp_path / "waiting"), ("fail", tmp_path / "x"), ("note", tmp_path / "never"))
    assert raised.value.hint == "Make some."
    process, interrupted = (tmp_path / "waiting").read_text().split()
    assert interrupted == "interrupted"
    assert _gone(int(process))
    assert not (tmp_path / "never").exists()


def test_what_must_not_be_left_half_done_is_done_whole(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(OutputError, match="no room"):
        run(("hold", tmp_path / "waiting"), ("fail", tmp_path / "x"))
    process, whole = (tmp_path / "waiting").read_text().split()
    assert whole == "whole"
    assert _gone(int(process))
    assert time.monotonic() - began < SECONDS_TO_END


@pytest.mark.parametrize(
    ("job", "kind", "where"), [("break", ZeroDivisionError, "_break"), ("unsendable", RuntimeError, "_unsendable")]
)
def test_a_mistake_arrives_with_its_traceback(tmp_path: Path, job: str, kind: type[Exception], where: str) -> None:
    with pytest.raises(kind) as raised:
        run((job, tmp_path / "x"), ("wait", tmp_path / "waiting"))
    assert f"in {where}" in "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])


def test_a_process_that_is_killed_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"process 1 ended unexpectedly \(exit code 3\)") as raised:
        run(("die", tmp_path), ("wait", tmp_path / "waiting"))
    assert "the same command continues" in str(raised.value.hint)


SCRIPT = """
import sys
from pathlib import Path
import test_workers
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    test_workers.run(("wait", folder / "a"), ("wait", folder / "b"))
"""


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program of its own, in a group of its own, whose two processes are at work."""
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _until(lambda: all((tmp_path / n).exists() and (tmp_path / n).read_text() for n in "ab"))
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_ctrl_c_reaches_each_process_once(starter: subprocess.Popen[str], tmp_path: Path) -> None:
    os.killpg(starter.pid, signal.SIGINT)  # what a terminal does
    _, said = starter.communicate(timeout=30)
    assert starter.returncode == -signal.SIGINT
    assert said.count("KeyboardInterrupt") == 1
    for name in "ab":
        process, *interrupted = (tmp_path / name).read_text().split()
        assert interrupted == ["interrupted"]
        assert _gone(int(process))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_starter(starter: subprocess.Popen[str], tmp_path: Path, number: int) -> None:
    starter.send_signal(number)
    starter.wait(10)
    for name in "ab":
        _until(lambda name=name: _gone(int((tmp_path / name).read_text().split()[0])))  # type: ignore[misc]
        assert (tmp_path / name).read_text().endswith(" interrupted")


def test_every_error_survives_the_way_between_processes() -> None:
    error = UnknownNameError("agent", "reinforc", ["reinforce", "random"])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is UnknownNameError
    assert (str(again), again.message, again.hint, again.name) == (str(error), error.message, error.hint, error.name)
