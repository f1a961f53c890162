"""The Pareto set as data and as a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from ffgym.report.pareto import ParetoPoint, pareto_figure, pareto_json
from ffgym.types import Allocation

pytestmark = pytest.mark.usefixtures("drawn")

ALLOCATION = Allocation((2, 30, 1, 64), 80.0, 100.0)
DENSE = {"perplexity_ratio": 1.0, "accuracy": 0.6, "macs_saved": 0.0}
BEST = ParetoPoint(
    ALLOCATION,
    "policy",
    loss=3.2,
    reward=0.6,
    objectives={"perplexity_ratio": 0.8, "accuracy": 0.5, "macs_saved": 0.2},
    dominated=False,
    chosen=True,
)
POINTS = [
    BEST,
    replace(BEST, origin="episode 3", chosen=False, objectives={**BEST.objectives, "accuracy": 0.4}, dominated=True),
    replace(BEST, origin="episode 7", chosen=False, objectives={**BEST.objectives, "macs_saved": 0.3, "accuracy": 0.3}),
]


def test_the_data_say_who_is_in_it_and_on_what_it_was_measured():
    data = json.loads(json.dumps(pareto_json(POINTS, DENSE, tokens=8192, examples=128)))
    assert data["objectives"] == ["perplexity_ratio", "accuracy", "macs_saved"]
    assert data["measured_on"] == {"tokens": 8192, "examples": 128}
    assert data["dense"] == DENSE
    assert [(row["number"], row["origin"], row["chosen"]) for row in data["pareto_set"]] == [
        (1, "policy", True),
        (2, "episode 7", False),
    ]
    assert [row["origin"] for row in data["dominated"]] == ["episode 3"]
    row = data["pareto_set"][0]
    assert row["kept"] == [2, 30, 1, 64]
    assert row["objectives"] == BEST.objectives
    assert (row["sparsity"], row["resource"]) == (pytest.approx(0.2), "params")


@pytest.mark.parametrize("names", [["perplexity_ratio", "accuracy"], list(DENSE)])
def test_a_picture_has_a_panel_for_every_pair(names, tmp_path):
    points = [replace(p, objectives={name: p.objectives[name] for name in names}) for p in POINTS]
    dense = {name: DENSE[name] for name in names}
    figure = pareto_figure(points, dense, tmp_path / "pareto.png", "on 8 examples")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == len(names) * (len(names) - 1) // 2
    assert "2 of 3 allocations" in figure.get_suptitle()
    assert "on 8 examples" in figure.get_suptitle()
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2"], "numbered as in pareto.json"
    assert figure.axes[0].get_xlabel() == "perplexity ratio (more is better)"


def test_the_callers_style_does_not_change_the_picture(tmp_path, dark_style):
    pareto_figure(POINTS, DENSE, tmp_path / "plain.png", "on 8 examples")
    with dark_style:
        pareto_figure(POINTS, DENSE, tmp_path / "dark.png", "on 8 examples")
    assert (tmp_path / "dark.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_a_dense_model_far_off_does_not_press_the_allocations_together(tmp_path):
    figure = pareto_figure(POINTS, {**DENSE, "accuracy": 50.0}, tmp_path / "pareto.png", "on 8 examples")
    low, high = figure.axes[0].get_ylim()
    assert 0.2 < low < high < 0.6


def test_numbers_on_an_axis_do_not_run_into_each_other(tmp_path):
    places = (0.2265625, 0.2109375, 0.21875)
    points = [replace(p, objectives={**p.objectives, "accuracy": a}) for p, a in zip(POINTS, places, strict=True)]
    for axes in pareto_figure(points, DENSE, tmp_path / "pareto.png", "on 8 examples").axes:
        low, high = axes.get_xlim()
        boxes = [
            tick.label1.get_window_extent() for tick in axes.xaxis.get_major_ticks() if low < tick.get_loc() < high
        ]
        assert len(boxes) > 1
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
