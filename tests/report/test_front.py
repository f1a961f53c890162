"""The front: its table, its data, its picture."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from table_costs import table_costs

from ffgym.report.front import TIE, Front, FrontPoint, front_figure, point_name
from ffgym.report.table import Row
from ffgym.types import Allocation

pytestmark = pytest.mark.usefixtures("drawn")


def row(label: str, perplexity: float, sparsity: float) -> Row:
    return Row(label, perplexity, 0.05, sparsity, 0.8 * sparsity, table_costs(int(1e8 * (1 - sparsity)), 1e8, 2e4))


def point(target: float, found: float, uniform: float) -> FrontPoint:
    return FrontPoint(
        target=target,
        found=row("reinforce + ridge", found, target),
        references={"uniform": row("uniform + ridge", uniform, target)},
        allocation=Allocation((1, 2), 100 * (1 - target), 100.0),
        origin="policy",
        finals_loss=3.0,
    )


@pytest.fixture
def front() -> Front:
    points = (point(0.1, 22.0, 25.0), point(0.3, 40.0, 39.0), point(0.5, 90.0, math.inf))
    return Front("reinforce", points, row("dense", 20.0, 0.0), "Model: a|b, report split", 327_680, 98_304, 330.0)


def test_markdown_has_every_point_the_best_starred_and_what_it_took(front: Front) -> None:
    lines = front.layout().markdown().splitlines()
    assert lines[0] == "| perplexity at | reinforce | uniform | params |"
    assert lines[2].startswith("| 0% (dense) | 20.00 | 20.00 | 100.0 M |")
    assert lines[3].startswith(r"| 10.0% | 22.00 \* | 25.00 |")
    assert lines[4].startswith(r"| 30.0% | 40.00 | 39.00 \* |")
    assert "| inf |" in lines[5]
    assert len({line.count("|") for line in lines[:6]}) == 1
    text = front.layout().markdown()
    assert "327,680 tokens of search, 98,304 of finals, 5.5 min" in text
    assert r"a\|b, report split" in text


def test_what_ties_with_the_best_has_the_word_and_no_star(front: Front) -> None:
    first = front.points[0]
    uniform = replace(first.references["uniform"], losses=(3.0, 3.4, 3.1))
    for losses, mark in (((3.1, 3.2, 3.1), TIE), ((3.3, 3.7, 3.4), "")):
        tied = replace(first, found=replace(first.found, losses=losses), references={"uniform": uniform})
        line = replace(front, points=(tied, *front.points[1:])).layout().markdown().splitlines()[3]
        assert rf"| 22.00 \* | 25.00{mark} |" in line


def test_where_everything_broke_down_nothing_is_best(front: Front) -> None:
    front = replace(front, points=(*front.points[:2], point(0.5, math.inf, math.nan)))
    assert "*" not in front.layout().markdown().splitlines()[5]


def test_the_picture_is_drawn_also_where_a_rule_broke_down(front: Front, tmp_path) -> None:
    figure = front_figure(front, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert [list(line.get_ydata())[-1] for line in figure.axes[0].lines] == [90.0, math.inf, 20.0]
    (label,) = figure.axes[0].texts
    assert (label.get_text(), label.xy[0], label.get_ha()) == ("dense 20.0", 1, "right"), "away from the first targets"
    broken = replace(front, dense=replace(front.dense, perplexity=math.nan))
    figure = front_figure(broken, tmp_path / "again.png")
    assert len(figure.axes[0].lines) == 2, "no line of a dense model that has no perplexity"


def test_the_callers_style_does_not_change_the_picture(front: Front, tmp_path, dark_style) -> None:
    front_figure(front, tmp_path / "plain.png")
    with dark_style:
        front_figure(front, tmp_path / "dark.png")
    assert (tmp_path / "dark.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


@pytest.mark.parametrize(
    ("found", "rule", "labels"),
    [
        ((35, 37), (38, 48), ["36", "38", "40", "42", "44", "46", "48"]),
        ((12, 15), (13, 19), ["12", "13", "14", "15", "16", "17", "18", "19"]),
        ((25, 60), (40, 300), ["30", "50", "100", "200", "300"]),
    ],
    ids=["from 35 to 48", "from 12 to 19", "more than a decade"],
)
def test_a_short_axis_has_a_number_at_every_tick(tmp_path, found, rule, labels) -> None:
    points = tuple(point(target, *values) for target, *values in zip((0.1, 0.3), found, rule, strict=True))
    axes = front_figure(
        Front("reinforce", points, row("dense", found[0], 0.0), "measured somehow", 1, 1, 1.0), tmp_path / "front.png"
    ).axes[0]
    low, high = axes.get_ylim()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    shown = sorted((tick.get_loc(), tick.label1.get_text()) for tick in ticks if low <= tick.get_loc() <= high)
    assert [text for _, text in shown if text] == labels


@pytest.mark.parametrize(
    ("target", "name"),
    [(0.1, "0.10"), (0.225, "0.225"), (0.475, "0.475"), (0.266667, "0.266667"), (0.996, "0.996"), (5e-5, "0.00005")],
)
def test_a_point_is_named_by_its_target_exactly(target: float, name: str) -> None:
    assert point_name(target) == name
