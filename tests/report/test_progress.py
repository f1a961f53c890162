"""Progress: plain lines where there is no terminal, bars where there is one, text as it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ffgym.report import progress
from ffgym.report.progress import Reporter, duration


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=terminal, force_interactive=terminal)


def text(of: Console) -> str:
    return of.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_without_a_terminal_a_stage_is_one_line_when_it_ends() -> None:
    out = console()
    with Reporter(out).stage("measure", 3) as stage:
        for _ in range(3):
            stage.advance()
        assert text(out) == ""
    assert text(out) == "measure: done in 0 s\n"


def test_a_long_stage_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    out = console()
    with Reporter(out).stage("search", 200) as stage:
        stage.advance(50, "tokens, reward 0.913")
        stage.advance(70)
    assert text(out).splitlines()[:2] == [
        "search: 50/200 tokens, reward 0.913, about 0 s left",
        "search: 120/200, about 0 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (5399, "90 min"), (12_600, "3.5 h")]
)
def test_durations_are_round(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_what_is_left_takes_as_long_as_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    out = console()
    with Reporter(out).stage("search", 40) as stage:
        stage.advance(10)
    assert "search: 10/40, about 60 s left" in text(out)


def test_before_the_first_step_nobody_says_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    out = console()
    with Reporter(out).stage("search", 40) as stage:
        stage.advance(0, "tokens, 80% of an update")
    assert text(out).splitlines()[0] == "search: 0/40 tokens, 80% of an update"


def test_quick_steps_stay_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1000.0)
    out = console()
    with Reporter(out).stage("search", 10) as stage:
        stage.advance(5)
    assert text(out).count("\n") == 1


def test_a_terminal_sees_a_bar_that_goes_away() -> None:
    out = console(terminal=True)
    with Reporter(out).stage("measure", 4) as stage:
        stage.advance(4, "note")
    assert "━" in text(out)
    assert "4/4" in text(out)
    assert text(out).rstrip().endswith("measure: done in 0 s")


def test_calling_a_stage_says_done_and_total() -> None:
    with Reporter(console()).stage("collect", 1) as stage:
        stage(3, 8)
        assert (stage.done, stage.total) == (3, 8)
        stage(8, 8)
        assert stage.done == 8


def test_more_steps_than_announced_stop_at_the_end() -> None:
    with Reporter(console()).stage("search", 10) as stage:
        stage.advance(25)
        assert stage.done == 10


def test_a_stage_that_fails_does_not_say_done() -> None:
    out = console()
    with pytest.raises(ValueError, match="broke"), Reporter(out).stage("search", 10):
        raise ValueError("broke")
    assert text(out) == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_text_in_square_brackets_is_printed_as_it_is(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    out = console(terminal=terminal)
    reporter = Reporter(out)
    reporter.print("results are in runs/[red]/a")
    with reporter.stage("measure [bold]", 1) as stage:
        stage.advance(1, "[/nothing]")
    assert "runs/[red]/a" in text(out)
    assert "measure [bold]: done" in text(out)
    assert "[/nothing]" in text(out)


def test_long_lines_are_not_broken() -> None:
    out = console()
    Reporter(out).print("x" * 250)
    assert text(out) == "x" * 250 + "\n"
