"""Spreads are quartiles, or ranges, and what is timed is run exactly once."""

from __future__ import annotations

import torch

from ffgym.costs.timing import Spread, timed


def test_spread_is_the_median_and_the_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0]) == Spread(median=2.5, low=1.75, high=3.25)


def test_a_spread_of_fewer_than_four_is_the_median_and_the_range():
    assert Spread.of([2.0, 1.0, 6.0]) == Spread(median=2.0, low=1.0, high=6.0)
    assert Spread.of([2.0, 1.0]) == Spread(median=1.5, low=1.0, high=2.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_the_result_comes_back_with_its_seconds():
    calls = []
    result, seconds = timed(lambda: calls.append(1) or "done", {torch.device("cpu")})
    assert (result, calls) == ("done", [1])
    assert seconds >= 0


def test_accelerators_are_waited_for_before_and_after(monkeypatch):
    events = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append(str(device)))
    timed(lambda: events.append("work"), {torch.device("cuda:1"), torch.device("cpu")})
    assert events == ["cuda:1", "work", "cuda:1"]
