"""The ramps start easy, never fall back, arrive where they should, and measure at least one window."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffgym.config.toml import load_config
from ffgym.envs.schedule import RAMP_SHARE, Schedule, stratified
from ffgym.errors import ConfigError
from ffgym.prepare.configured import check_agent_fits

ramps = st.sampled_from(["none", "cubic", "staircase"])
schedules = st.builds(
    Schedule,
    target=st.floats(0.01, 0.9),
    windows=st.integers(1, 20),
    start=st.floats(0.01, 0.9),
    sparsity=ramps,
    fidelity=ramps,
)
CUBIC = Schedule(0.3, 8, start=0.05, sparsity="cubic", fidelity="cubic")


@given(schedules, st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted))
def test_never_falls_back_and_stays_in_range(schedule, spent):
    before, after = (schedule.stage(share) for share in spent)
    for stage in (before, after):
        assert 1 <= stage.windows <= schedule.windows
        assert stage.fidelity == stage.windows / schedule.windows
        assert min(schedule.start, schedule.target) - 1e-12 <= stage.sparsity <= schedule.target + 1e-12
    assert after.windows >= before.windows
    assert after.sparsity >= before.sparsity - 1e-12


@given(schedules, st.floats(0, 1))
def test_arrives_when_the_ramps_share_is_spent_and_stays(schedule, further):
    at_the_end = schedule.stage(RAMP_SHARE + further)
    assert at_the_end.sparsity == pytest.approx(schedule.target)
    assert (at_the_end.windows, at_the_end.fidelity) == (schedule.windows, 1.0)
    assert schedule.stage(RAMP_SHARE) == at_the_end == schedule.stage(1.0), "bit for bit: one stage"


def test_starts_where_it_should():
    first = CUBIC.stage(0.0)
    assert (first.sparsity, first.windows, first.fidelity) == (pytest.approx(0.05), 1, 1 / 8)
    harder_start = Schedule(0.1, 8, start=0.3, sparsity="cubic")
    assert harder_start.stage(0.0).sparsity == pytest.approx(0.1), "never above the target"


def test_cubic_formulas():
    for t in (0.0, 0.2, 0.5, 0.9):
        stage = CUBIC.stage(t * 0.5)
        assert stage.sparsity == pytest.approx(0.3 - 0.25 * (1 - t) ** 3)
        assert stage.windows - 1 < max(1, 8 * t**3) <= stage.windows
    assert CUBIC.stage(0.25).sparsity > 0.25, "fast at first"
    assert CUBIC.stage(0.25).windows == 1, "slow at first"


def test_ramps_over_episodes_do_not_ask_how_many_tokens_those_took():
    schedule = Schedule(0.2, 20, sparsity="cubic", fidelity="cubic", ramp_episodes=1000)
    for spent in (0.0, 0.9):
        assert schedule.stage(spent, episodes=500).sparsity == pytest.approx(0.2 - 0.15 * 0.5**3)
        assert schedule.stage(spent, episodes=500).windows == math.ceil(20 * 0.5**3)
        assert schedule.stage(spent, episodes=1000) == schedule.stage(spent, episodes=2000)
    assert schedule.stage(1.0, episodes=1005).fidelity == 1.0


def test_a_staircase_climbs_in_equal_steps():
    stairs = Schedule(0.4, 4, start=0.0, sparsity="staircase", fidelity="staircase")
    seen = [(round(s.sparsity, 9), s.windows) for s in (stairs.stage(i / 100) for i in range(101))]
    assert list(dict.fromkeys(seen)) == [(0.0, 1), (0.1, 1), (0.2, 2), (0.3, 3), (0.4, 4)]


def test_without_ramps_it_is_the_full_task_from_the_start():
    assert Schedule(0.2, 4).stage(0.0) == Schedule(0.2, 4).stage(1.0) == Schedule(0.2, 4).stage(0.0, place=0.25)
    assert Schedule(0.2, 4).stage(0.0).windows == 4


def test_a_place_in_a_range_is_its_sparsity():
    schedule = Schedule(0.5, 4, low=0.1)
    assert [schedule.stage(0.0, place).sparsity for place in (0.0, 0.25, 1.0)] == pytest.approx([0.1, 0.2, 0.5])
    assert schedule.stage(0.9, 0.25) == schedule.stage(0.0, 0.25)


def test_fidelity_may_rise_over_a_range():
    schedule = Schedule(0.5, 4, fidelity="cubic", low=0.1)
    assert [schedule.stage(spent, 0.5).windows for spent in (0.0, 0.4, 0.5)] == [1, 3, 4]
    assert schedule.stage(0.0, 0.5).sparsity == pytest.approx(0.3)


@given(st.floats(0, 1, exclude_max=True), st.integers(2, 200))
def test_every_beginning_of_the_places_covers_the_range_evenly(first, count):
    """No gap, the ends' included, is wider than about 2.7 times the even one; drawn at random it would be ln(count)."""
    places = np.sort([stratified(first, index) for index in range(count)])
    assert (places >= 0).all()
    assert (places < 1).all()
    gaps = np.diff([places[-1] - 1, *places])
    assert gaps.max() <= 2.7 / count
    assert gaps.min() >= 0.3 / count


STAIRS = {"sparsity": "staircase", "fidelity": "staircase"}


@pytest.mark.parametrize(
    ("ramps", "episodes", "ends_at"),
    [
        (STAIRS | {"ramp_episodes": 1000}, 8, "sparsity 0.05 and fidelity 0.5"),
        ({"sparsity": "cubic", "ramp_episodes": 400}, 96, "sparsity 0.129 and fidelity 1"),
        ({"fidelity": "cubic", "ramp_episodes": 1000}, 96, "sparsity 0.2 and fidelity 0.5"),
    ],
)
def test_ramps_that_do_not_end_with_the_search_are_refused(ramps, episodes, ends_at):
    config = load_config(schedule=ramps, search={"episodes": episodes}, prior={"name": "none"})
    with pytest.raises(ConfigError, match=f"too many for a search of at most .* last update would be at {ends_at}"):
        check_agent_fits(config)


@pytest.mark.parametrize(("ramp", "most"), [("sparsity", 96), ("fidelity", 150)])
def test_the_longest_ramps(ramp, most):
    """Of fidelity it is longer than the 96 episodes, most of which have one window of two."""
    check_agent_fits(load_config(schedule={ramp: "cubic", "ramp_episodes": most}, search={"episodes": 96}))
