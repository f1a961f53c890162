"""Progress: plain lines where there is no terminal, bars where there is one, text as it is."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Sequence

import pytest
from rich.console import Console

from ffgym.report import progress
from ffgym.report.progress import Reporter, Step, clock


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=terminal, force_interactive=terminal)


def planned(steps: Sequence[Step]) -> tuple[Console, Reporter]:
    """A job of these steps, and where it says how far it is."""
    out = console()
    reporter = Reporter(out)
    reporter.plan(steps)
    return out, reporter


def text(of: Console) -> str:
    return of.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``at(9.0)`` sets the time, in seconds after the start of the test; without a terminal every step is printed."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)

    def set_time(seconds: float) -> None:
        now[0] = seconds

    return set_time


def test_without_a_terminal_a_stage_is_one_line_when_it_ends() -> None:
    out = console()
    with Reporter(out).stage("measure", 3) as stage:
        for _ in range(3):
            stage.advance()
        assert text(out) == ""
    assert text(out) == "measure: done in 0:00\n"


def test_what_a_stage_begins_with_is_said_at_once() -> None:
    out = console()
    with Reporter(out).stage("serve", 2, "bursts") as stage:
        for role in ("dense", "pruned"):
            stage.advance(0, f"starting: {role}")
        assert text(out).splitlines() == ["serve: 0/2 bursts · starting: dense · 0:00 elapsed"]


def test_a_stage_that_took_long_to_start_says_so_when_it_ends(at: Callable[[float], None]) -> None:
    out = console()
    with Reporter(out).stage("serve", 2) as stage:
        at(804)
        stage.restart()
        at(814)
        stage.advance()
        at(832)
    assert text(out).splitlines() == [
        "serve: 1/2 · 0:10 elapsed · 0:10 left",
        "serve: done in 13:52, 13:24 of it to start",
    ]


def test_a_long_stage_says_now_and_then_how_far_it_is(at: Callable[[float], None]) -> None:
    out = console()
    with Reporter(out).stage("search", 8192, "tokens") as stage:
        at(8)
        stage.advance(2048, "reward 0.168")
        at(32)
        stage.advance(4096)
    assert text(out).splitlines() == [
        "search: 2,048/8,192 tokens · reward 0.168 · 0:08 elapsed · 0:24 left",
        "search: 6,144/8,192 tokens · reward 0.168 · 0:32 elapsed · 0:11 left",
        "search: done in 0:32",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0:00"),
        (89, "1:29"),
        (760.2, "12:40"),
        (3599.6, "1:00:00"),
        (11_100, "3:05:00"),
        (120_000, "1.4 days"),
        (3.4e6, "39.4 days"),
    ],
)
def test_durations_read_like_a_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said


def test_before_the_first_step_nobody_says_how_long_it_will_take(at: Callable[[float], None]) -> None:
    out = console()
    with Reporter(out).stage("search", 40, "tokens") as stage:
        at(2)
        stage.advance(0)
    assert text(out).splitlines()[0] == "search: 0/40 tokens · 0:02 elapsed"


def test_steps_under_way_are_shown_but_counted_when_they_end(at: Callable[[float], None]) -> None:
    out = console()
    with Reporter(out).stage("search", 100) as stage:
        stage.advance(20)
        stage.partly(10.4)
        assert stage.share == pytest.approx(0.304)
        stage.advance(16)
        assert stage.share == 0.36
        stage.partly(32)
        stage.advance(8)  # the first episode of an update that is all measured
        assert stage.share == 0.68, "it never goes back"
        stage.advance(24)
        assert stage.share == 0.68
        stage.partly(1e9)
        assert stage.share == 1.0
    assert text(out).splitlines()[1].startswith("search: 30/100 · ")


def test_steps_of_an_earlier_session_say_nothing_of_how_long_the_others_take(at: Callable[[float], None]) -> None:
    out, reporter = planned([Step("search", 100.0), Step("report", 100.0)])
    with reporter.stage("search", 100) as stage:
        stage.advance(80, is_known=True)
        at(10)
        stage.advance(10)
    assert text(out).splitlines()[1] == ("stage 1/2: search: 90/100 · 0:10 elapsed · 0:10 left · 1:50 left in all")


def test_what_workers_take_to_load_says_nothing_of_how_long_the_search_takes(at: Callable[[float], None]) -> None:
    out, reporter = planned([Step("search", 100.0), Step("report", 100.0)])
    with reporter.stage("search", 100) as stage:
        for second in (30, 60):
            at(second)
            stage.partly(0.0)
        at(70)
        stage.partly(10.0)
    assert text(out).splitlines()[:3] == [
        "stage 1/2: search: 0/100 · 0:30 elapsed",
        "stage 1/2: search: 0/100 · 1:00 elapsed",
        "stage 1/2: search: 10/100 · 1:10 elapsed · 1:30 left · 3:10 left in all",
    ]


class TestPlan:
    STEPS = (Step("load", 10.0), Step("search: a", 60.0), Step("report", 30.0, stages=3))

    def test_says_which_stage_it_is_and_how_long_all_will_take(self, at: Callable[[float], None]) -> None:
        out, reporter = planned(self.STEPS)
        with reporter.stage("load model", 1):
            at(1)
        with reporter.stage("search: a", 6) as stage:
            at(4)
            stage.advance(3)
        assert text(out).splitlines()[1] == "stage 2/3: search: a: 3/6 · 0:03 elapsed · 0:03 left · 0:09 left in all"

    def test_all_takes_no_less_than_a_stage_that_was_planned_to_be_short(self, at: Callable[[float], None]) -> None:
        out, reporter = planned([Step("load", 90.0), Step("search", 1.0)])
        with reporter.stage("load", 1):
            at(1)
        with reporter.stage("search", 100) as stage:
            at(11)
            stage.advance(10)
        assert text(out).splitlines()[1].endswith(" · 1:30 left · 1:30 left in all")

    def test_a_slow_download_says_nothing_of_how_long_the_others_take(self, at: Callable[[float], None]) -> None:
        out, reporter = planned([Step("load", 4.0, computes=False), Step("search", 500.0)])
        with reporter.stage("load", 2) as stage:
            at(59)
            stage.advance(1)
        with reporter.stage("search", 100) as stage:
            at(64)
            stage.advance(1)
        first, _, second, _ = text(out).splitlines()
        assert first == "stage 1/2: load: 1/2 · 0:59 elapsed · 0:59 left · 8:22 left in all"  # as planned
        assert second == "stage 2/2: search: 1/100 · 0:05 elapsed · 8:15 left · 8:15 left in all"

    def test_the_first_steps_of_a_job_do_not_outweigh_its_plan(self, at: Callable[[float], None]) -> None:
        out, reporter = planned([Step("prepare", 100.0), Step("search", 900.0)])
        with reporter.stage("prepare", 10) as stage:
            at(40)
            stage.advance(1)  # four times as long as planned
            at(400)
            stage.advance(9)
        said = [line.rpartition(" · ")[2] for line in text(out).splitlines()[:2]]
        assert said == ["28:52 left in all", "49:37 left in all"]  # at the pace alone: 66:00 and 60:00

    def test_a_machine_that_others_leave_is_noticed_in_the_next_step(self, at: Callable[[float], None]) -> None:
        out = console()
        reporter = Reporter(out)
        reporter.plan([Step("prepare", 100.0), Step("search", 900.0)])
        with reporter.stage("prepare", 1) as stage:
            at(400)
            stage.advance(1)
        with reporter.stage("search", 90) as stage:
            at(700)
            stage.advance(30)  # as planned: 10:00 are left
        said = [line.rpartition(" · ")[2] for line in text(out).splitlines() if "left in all" in line]
        assert said == ["49:37 left in all", "12:06 left in all"]

    def test_a_step_may_have_several_stages(self, at: Callable[[float], None]) -> None:
        out, reporter = planned(self.STEPS)
        for label in ("load", "search: a"):
            with reporter.stage(label, 1):
                pass
        at(70)
        for label in ("report: dense", "report: uniform"):
            with reporter.stage(label, 2) as stage:
                stage.advance(1)
        said = [line for line in text(out).splitlines() if "left in all" in line]
        assert [line.rpartition(" · ")[2] for line in said] == ["0:14 left in all", "0:04 left in all"]

    def test_a_step_that_need_not_be_done_says_nothing_of_how_long_the_others_take(
        self, at: Callable[[float], None]
    ) -> None:
        out, reporter = planned(self.STEPS)
        with reporter.stage("report: dense", 1) as stage:
            at(5)
            stage.advance(1)
        assert text(out).splitlines()[0] == "stage 3/3: report: dense: 0:05 elapsed · 0:00 left · 0:13 left in all"

    def test_a_stage_that_no_step_names_stands_alone(self, at: Callable[[float], None]) -> None:
        out, reporter = planned(self.STEPS)
        with reporter.stage("write GGUF", 2) as stage:
            stage.advance(1)
        assert text(out).splitlines()[0] == "write GGUF: 1/2 · 0:00 elapsed · 0:00 left"

    def test_a_terminal_shows_the_whole_and_the_stage_within_80_columns(self, at: Callable[[float], None]) -> None:
        out = Console(file=io.StringIO(), width=80, force_terminal=True, force_interactive=True, color_system=None)
        reporter = Reporter(out)
        reporter.plan(self.STEPS)
        with reporter.stage("search: a", 229_376, "tokens") as stage:
            at(60)
            stage.advance(114_688, "reward 0.168")
            out.print(stage)
        lines = text(out).splitlines()
        assert any(re.search(r"stage 2/3  search: a  ━+╸? +1:51 left in all", line) for line in lines)
        assert any("114,688/229,376 tokens · reward 0.168 · 1:00 elapsed · 1:00 left" in line for line in lines)


def test_a_terminal_sees_a_bar_that_goes_away() -> None:
    out = console(terminal=True)
    with Reporter(out).stage("measure", 4) as stage:
        stage.advance(4, "note")
    assert "━" in text(out)
    assert "4/4" in text(out)
    assert text(out).rstrip().endswith("measure: done in 0:00")


def test_calling_a_stage_says_done_and_total() -> None:
    with Reporter(console()).stage("collect", 1) as stage:
        stage(3, 8)
        assert (stage.done, stage.total) == (3, 8)
        stage(9, 8)
        assert stage.done == 8, "it stops at the end"


def test_a_stage_that_fails_does_not_say_done() -> None:
    out = console()
    with pytest.raises(ValueError, match="broke"), Reporter(out).stage("search", 10):
        raise ValueError("broke")
    assert text(out) == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_text_in_square_brackets_is_printed_as_it_is(terminal: bool) -> None:
    out = console(terminal=terminal)
    reporter = Reporter(out)
    reporter.print("results are in runs/[red]/a")
    with reporter.stage("measure [bold]", 1) as stage:
        stage.advance(0, "[/nothing]")
    assert "runs/[red]/a" in text(out)
    assert "measure [bold]: done" in text(out)
    assert "[/nothing]" in text(out)


def test_long_lines_are_not_broken() -> None:
    out = console()
    Reporter(out).print("x" * 250)
    assert text(out) == "x" * 250 + "\n"
