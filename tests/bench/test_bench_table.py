"""The bench's table: means, spreads, and tokens until a goal, on marks made by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffgym.bench.page import bench_page
from ffgym.bench.table import CellResult, Final, Mark, bench_figure, bench_table, curves, markdown, tokens_until
from ffgym.report.paired import paired_difference

pytestmark = pytest.mark.usefixtures("drawn")

DATA = {"report": "demo:wiki", "window": 1024}


def cell(
    label: str, seed: int, marks: list[tuple[int, float]], *, final: float | None = None, **changes: Any
) -> CellResult:
    """A result whose final loss is its last mark's where none is given."""
    values: dict[str, Any] = {
        "label": label,
        "agent": label,
        "seed": seed,
        "settings": {"data": DATA},
        "target": 0.2,
        "dense_loss": math.log(20),
        "report_tokens": 30_720,
        "search_tokens": marks[-1][0],
        "final_tokens": 100,
        "episodes": 8,
        "seconds": 60.0,
        "threads": 1,
        "dtype": "float32",
        "asked_marks": len(marks),
        "marks": [Mark(tokens=tokens, loss=loss) for tokens, loss in marks],
        "final": Final(kept=[1, 2], loss=marks[-1][1] if final is None else final, sparsity=0.2, origin="policy"),
    }
    return CellResult(**{**values, **changes})


# tokens until a goal


@pytest.mark.parametrize(
    ("goal", "tokens"),
    [
        (5.0, 100),  # the first mark is good enough already
        (4.0, 100),
        (3.5, math.sqrt(100 * 1000)),  # half the way down is half the way in log tokens
        (3.0, 1000),
        (2.75, 1000 * 10**0.25),
        (2.0, 10_000),
        (1.9, None),
    ],
)
def test_tokens_until_a_goal_are_interpolated_in_log_tokens(goal: float, tokens: float | None) -> None:
    found = tokens_until([cell("a", 0, [(100, 4.0), (1000, 3.0), (10_000, 2.0)])], goal)
    assert found is None if tokens is None else found == pytest.approx(tokens)


def test_tokens_until_a_goal_follow_the_mean_over_seeds() -> None:
    cells = [cell("a", 0, [(100, 5.0), (1000, 3.0)]), cell("a", 1, [(100, 3.0), (1000, 1.0)])]
    assert tokens_until(cells, 3.0) == pytest.approx(math.sqrt(100 * 1000))
    assert tokens_until(cells, 2.0) == pytest.approx(1000)


def test_a_curve_that_rises_again_counts_where_it_first_came_down() -> None:
    assert tokens_until([cell("a", 0, [(10, 4.0), (100, 2.0), (1000, 5.0), (10_000, 1.0)])], 2.0) == pytest.approx(100)


def test_seeds_are_averaged_at_the_same_tokens_also_where_one_lacks_a_mark() -> None:
    all_marks = [(100, 4.0), (200, 3.0), (400, 2.0), (800, 1.0)]
    full, gap = cell("a", 0, all_marks), cell("a", 1, [all_marks[0], *all_marks[2:]])
    assert tokens_until([full, gap], 1.0) == pytest.approx(800)
    assert tokens_until([full, gap], 3.0) == pytest.approx(200)  # half the way from 100 to 400, in log tokens


def test_curves_run_from_the_last_beginning_to_the_first_end() -> None:
    tokens, losses = curves([cell("a", 0, [(100, 3.0), (900, 1.0)]), cell("a", 1, [(300, 2.0), (600, math.inf)])])
    assert tokens.tolist() == [300, 600]
    assert losses[0] == pytest.approx([2.0, 3.0 - 2.0 * math.log(6) / math.log(9)])
    assert losses[1].tolist() == [2.0, math.inf]


def test_a_search_that_ended_before_another_began_keeps_its_incumbent() -> None:
    cells = [cell("a", 0, [(100, 3.0), (200, 2.0)]), cell("a", 1, [(300, 4.0), (400, 1.0)])]
    tokens, losses = curves(cells)
    assert (tokens.tolist(), losses.tolist()) == ([300], [[2.0], [4.0]])
    assert bench_table("Bench", cells, baselines=["a"]).rows[0].first_mark == 300


def test_an_incumbent_that_broke_down_is_worse_than_any_goal() -> None:
    marks = [(100, math.inf), (1000, 2.0)]
    assert tokens_until([cell("a", 0, marks)], 3.0) == pytest.approx(1000)
    assert tokens_until([cell("a", 0, [(100, math.nan), (1000, 2.0)])], 3.0) == pytest.approx(1000)


# the table


def test_what_came_to_no_number_stands_last() -> None:
    finals = {"good": 2.3, "none": math.nan, "bad": 3.0, "broken": math.inf}
    cells = [cell(label, 0, [(100, 4.0)], final=final) for label, final in finals.items()]
    rows = bench_table("Bench", cells, baselines=["good"]).rows
    assert [row.label for row in rows] == ["good", "bad", "broken", "none"]


@pytest.mark.parametrize(
    ("calibrations", "said"),
    [
        (["ridge", "none"], "after the same ridge"),
        (["affine"], "after the same affine refit"),
        (["ridge", "affine"], "after ridge or affine"),
    ],
)
def test_the_header_names_the_refit(calibrations: list[str], said: str) -> None:
    settings = ({"data": DATA, "prune": {"calibration": name}} for name in calibrations)
    cells = [cell(each["prune"]["calibration"], 0, [(100, 4.0)], settings=each) for each in settings]
    assert said in bench_table("Bench", cells, baselines=[calibrations[0]]).header


@pytest.mark.parametrize(
    ("seeds", "widened", "of_windows_only"), [((0, 1), True, False), ((0,), False, True)], ids=["two seeds", "one seed"]
)
def test_the_header_says_what_an_interval_leaves_out(
    seeds: tuple[int, ...], widened: bool, of_windows_only: bool
) -> None:
    """A rule has one seed, too, and nothing is left out of its interval: it finds the same with every seed."""
    finals = [Final(kept=[1], loss=loss, losses=[loss, loss], sparsity=0.2, origin="policy") for loss in (3.0, 4.0)]
    cells = [cell("random", seed, [(100, 4.0)]).model_copy(update={"final": finals[0]}) for seed in seeds]
    rule = cell("uniform", 0, [(10, 4.0)], agent="one-shot").model_copy(update={"final": finals[1]})
    header = bench_table("Bench", [*cells, rule], baselines=["random"]).header
    assert ("over seeds" in header) == widened
    assert ("which both windows and seeds widen" in header) == widened
    assert ("Where a search has one seed, its interval is of the windows only" in header) == of_windows_only


def results() -> list[CellResult]:
    return [
        *(cell("evolution", s, [(100, 4.0), (1000, 3.0)], final=math.log(30 + s)) for s in (0, 2)),
        *(cell("reinforce", s, [(100, 3.0), (1000, 2.5)], final=math.log(25)) for s in (0, 1)),
        cell("uniform", 0, [(10, 4.5)], final=math.log(54)),
    ]


def test_rows_are_means_with_standard_errors_best_first() -> None:
    table = bench_table("Bench", results(), baselines=["evolution"])
    assert [row.label for row in table.rows] == ["reinforce", "evolution", "uniform"]
    reinforce, evolution, uniform = table.rows
    assert (evolution.perplexity.value, evolution.seeds) == (pytest.approx(31), 2)
    assert evolution.perplexity.stderr == pytest.approx(1.0)  # 30 and 32: deviation sqrt(2), over sqrt(2)
    assert reinforce.perplexity.stderr == pytest.approx(0)
    assert uniform.perplexity.stderr is None
    assert (reinforce.tokens, reinforce.seconds) == (1100, 60)


def test_tokens_are_counted_to_the_mean_final_quality_of_each_baseline() -> None:
    table = bench_table("Bench", results(), baselines=["evolution", "reinforce", "nobody"])
    assert table.baselines == ("evolution", "reinforce")
    reinforce, evolution, uniform = table.rows
    goals = {"evolution": (math.log(30) + math.log(32)) / 2, "reinforce": math.log(25)}
    assert reinforce.tokens_to == pytest.approx(dict.fromkeys(goals, 100))
    assert evolution.tokens_to == pytest.approx({label: 100 * 10 ** (4.0 - goal) for label, goal in goals.items()})
    assert uniform.tokens_to == {"evolution": None, "reinforce": None}


def test_what_is_reached_at_the_first_mark_may_have_been_reached_before() -> None:
    text = markdown(bench_table("B", results(), baselines=["evolution"]))
    assert re.search(r"\| reinforce \|.*\| ≤ 100 \|", text)
    assert re.search(r"\| evolution \|.*\| 369 \|", text)


def test_without_the_baseline_nothing_is_counted() -> None:
    assert "final quality" not in markdown(bench_table("Bench", results(), baselines=["nobody"]))


def test_a_column_without_any_refit_is_there_where_it_was_measured() -> None:
    assert "without any refit" not in markdown(bench_table("Bench", results(), baselines=["evolution"]))
    plain = [each.model_copy(update={"final": each.final.model_copy(deep=True)}) for each in results()]
    plain[0].final.plain_loss, plain[1].final.plain_loss = math.log(40), math.log(44)
    text = markdown(bench_table("Bench", plain, baselines=["evolution"]))
    assert "| agent | perplexity | x dense | without any refit | seeds |" in text
    assert "| evolution | 31.00 ± 1.00 | 1.55 | 42.00 ± 2.00 | 2 |" in text
    assert "| uniform | 54.00 | 2.70 | — | 1 |" in text


def test_a_report_on_the_corpus_of_the_search_is_a_report_split() -> None:
    settings = {"data": DATA | {"search": DATA["report"]}}
    cells = [each.model_copy(update={"settings": settings}) for each in results()]
    assert bench_table("Bench", cells, baselines=[]).header.startswith("Report split of demo:wiki")


def test_all_dtypes_are_named() -> None:
    other = results()[0].model_copy(update={"dtype": "bfloat16"})
    header = bench_table("Bench", [*results()[1:], other], baselines=["evolution"]).header
    assert "float32 and bfloat16" in header


def test_markdown_says_how_it_was_measured() -> None:
    text = markdown(bench_table("Bench", results(), baselines=["evolution"]))
    for part in (
        "# Bench",
        "Report split of demo:wiki, 30,720 tokens in windows of 1,024, float32",
        "dense perplexity 20.00",
        "target sparsity 20%",
    ):
        assert part in text
    assert "| evolution | 31.00 ± 1.00 | 1.55 | 2 | 1,100 |" in text
    assert "| uniform | 54.00 | 2.70 | 1 | 110 | — |" in text
    assert "- In every row: dtype float32, seconds 60." in text


def test_dense_losses_that_differ_from_machine_to_machine_are_all_shown() -> None:
    other = results()[0].model_copy(update={"dense_loss": math.log(20.02)})
    header = bench_table("Bench", [*results()[1:], other], baselines=["evolution"]).header
    assert "; dense perplexity 20.00 to 20.02; " in header


def test_targets_are_as_fine_as_they_were_chosen() -> None:
    cells = [each.model_copy(update={"target": target}) for each, target in zip(results(), (0.125, 0.2), strict=False)]
    assert "target sparsity 12.5% and 20%;" in bench_table("Bench", cells, baselines=[]).header


def test_searches_are_compared_with_the_best_heuristic_on_the_same_windows() -> None:
    def with_losses(each: CellResult, *losses: float) -> CellResult:
        final = each.final.model_copy(update={"losses": list(losses), "loss": sum(losses) / len(losses)})
        return each.model_copy(update={"final": final})

    some = [
        *(with_losses(cell("good", seed, [(100, 3.0), (200, 3.0)]), 2.4, 3.4, 4.41 + seed / 100) for seed in (0, 1)),
        with_losses(cell("tied", 0, [(100, 3.0), (200, 3.0)]), 2.4, 3.6, 4.45),
        with_losses(cell("fisher", 0, [(10, 3.5)], agent="one-shot"), 2.5, 3.5, 4.5),
        with_losses(cell("uniform", 0, [(10, 4.5)], agent="one-shot"), 3.5, 4.5, 5.5),
    ]
    text = markdown(bench_table("Bench", some, baselines=["nobody"]))
    assert re.search(r"\| good \|.*\| -0\.09\d ± 0\.0\d\d \|", text)
    assert re.search(r"\| tied \|.*\| -0\.017 ± 0\.259 tie \|", text)
    assert re.search(r"\| fisher \|.*\| best heuristic \|", text)
    assert "± half of the 95 % interval" in text
    table = bench_table("Bench", some, baselines=["tied"])
    found = {row.label: row.differences["tied"] for row in table.rows}
    assert found["tied"] is None
    assert found["good"] == paired_difference([each.final.losses for each in some[:2]], [some[2].final.losses])
    assert re.search(r"\| agent \|.*\| nats against best heuristic \|.*\| nats against tied \|", markdown(table))
    assert table.layout().as_dicts()[0]["difference_from_tied"] == pytest.approx(-0.0783, abs=1e-3)
    del some[0].final.losses[1:]
    assert re.search(r"\| good \|.*\| — \|", markdown(bench_table("Bench", some, baselines=["nobody"])))


def test_the_headline_of_a_page_names_what_ties_with_the_best(tmp_path: Path) -> None:
    losses = {"reinforce": [2.4, 3.4], "random": [2.5, 3.32], "evolution": [2.5, 3.5], "fisher": [3.4, 4.4]}
    (tmp_path / "results").mkdir()
    for label, each in losses.items():
        agent = "one-shot" if label == "fisher" else label
        result = cell(label, 0, [(100, 3.0)], agent=agent, final=sum(each) / 2)
        result.final.losses = each
        (tmp_path / "results" / f"{label}-seed0.json").write_text(result.model_dump_json())
    file = tmp_path / "bench.toml"
    file.write_text(f'title = "B"\nagents = {list(losses)}\nseeds = [0]\nresults = "results"\ndated = "earlier"\n')
    page = bench_page(file)
    assert page.summary[0] == (
        "The lowest perplexity is that of reinforce: 18.17, 0.91 x dense; a tie with random. The best heuristic, "
        "fisher, has 49.40 (reinforce against it, in nats per token: -1.000 ± 0.000)."
    )
    assert (page.settings["seeds"], page.settings["cells"]) == ("0", "4")
    with file.open("a") as text:
        text.write("[more_seeds]\nreinforce = [1, 2]\nrandom = [1]\n")
    assert bench_page(file).settings["seeds"] == "0 (reinforce: also 1, 2; random: also 1)"


def drawn_axes(table_of: list[CellResult], path: Path, *baselines: str) -> Any:
    return bench_figure(bench_table("Bench", table_of, baselines=baselines), table_of, path).axes[0]


def test_at_most_six_lines_are_told_apart_by_colour_and_marker(tmp_path: Path) -> None:
    many = [cell(f"agent {i}", 0, [(100, 3.0 + i / 100), (1000, 2.9 + i / 100)]) for i in range(25)]
    rules = [cell(label, 0, [(10, loss)], agent="one-shot") for label, loss in (("fisher", 3.0), ("uniform", 4.0))]
    axes = drawn_axes([*many, *rules], tmp_path / "bench.png", "agent 20")
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert len(lines) == 6
    assert any("agent 20: " in label for label in lines), "the baseline is among them"
    assert any("fisher (heuristic): " in label for label in lines)
    curves = [line for label, line in lines.items() if "heuristic" not in label]
    assert len({line.get_color() for line in curves}) == len({line.get_marker() for line in curves}) == 5
    said = axes.figure.get_supxlabel()
    assert "uniform 54.60" in said
    assert "agent 10" in said


def test_ticks_below_a_thousand_tokens_have_numbers_of_their_own(tmp_path: Path) -> None:
    axes = drawn_axes([cell("random", 0, [(384, 3.0), (2200, 2.0)])], tmp_path / "bench.png")
    (low, high), write = axes.get_xlim(), axes.xaxis.get_major_formatter()
    assert [write(tick) for tick in axes.get_xticks() if low <= tick <= high] == ["0.5", "1", "2"]


@pytest.mark.parametrize("count", [2, 8])
def test_several_baselines_are_drawn_and_no_more_searches_than_can_be_told_apart(tmp_path: Path, count: int) -> None:
    many = [cell(f"agent {i}", 0, [(100, 3.0 + i / 100), (1000, 2.9 + i / 100)]) for i in range(20)]
    baselines = [f"agent {i}" for i in range(10, 10 + count)]
    axes = drawn_axes(many, tmp_path / "bench.png", *baselines)
    drawn = [line.get_label().split(":")[0] for line in axes.lines if not line.get_label().startswith("_")]
    assert len(drawn) == 6
    assert len({*drawn} & {*baselines}) == min(count, 6)


def test_the_callers_style_does_not_change_the_picture(tmp_path: Path, dark_style: Any) -> None:
    some = results()
    table = bench_table("Bench", some, baselines=["evolution"])
    bench_figure(table, some, tmp_path / "plain.png")
    with dark_style:
        bench_figure(table, some, tmp_path / "dark.png")
    assert (tmp_path / "dark.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_the_final_perplexity_is_marked_and_named(tmp_path: Path) -> None:
    axes = drawn_axes(results(), tmp_path / "bench.png", "evolution")
    assert "evolution: 31.00, 2 seeds" in {line.get_label() for line in axes.lines}
    ends = [line.get_xydata()[0] for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert np.array(ends) == pytest.approx(np.array([[1100, 25], [1100, 31]])), "after the finals, with their tokens"
    assert "at\nthe tokens of search and finals" in axes.figure.legends[0].get_title().get_text()


def test_one_bad_search_does_not_set_the_scale(tmp_path: Path) -> None:
    far = cell("random", 0, [(100, math.log(300)), (1000, math.log(200))])
    axes = drawn_axes([*results(), far], tmp_path / "bench.png", "evolution")
    assert axes.get_ylim()[1] < 100
    assert "random: 200.00, 1 seed, above the scale" in {line.get_label() for line in axes.lines}


def test_an_agent_keeps_its_colour_wherever_it_ranks(tmp_path: Path) -> None:
    drawn = []
    for good, bad in (("reinforce", "random"), ("random", "reinforce")):
        losses = {good: 2.0, bad: 2.1}
        some = [cell(label, 0, [(100, losses[label]), (1000, losses[label])]) for label in ("reinforce", "random")]
        drawn.append(drawn_axes(some, tmp_path / "bench.png", "evolution"))
    first, second = ({line.get_label().split(":")[0]: line.get_color() for line in axes.lines} for axes in drawn)
    assert first["reinforce"] == second["reinforce"] != first["random"] == second["random"]


@pytest.mark.parametrize(
    "some",
    [
        [cell("uniform", 0, [(10, 4.5)])],
        [cell("uniform", 0, [(10, math.inf)]), cell("random", 0, [(100, math.nan), (1000, 2.0)])],
        [cell("random", 0, [(100, math.inf), (1000, 800.0)]), cell("random", 1, [(100, 4.0), (1000, math.inf)])],
    ],
    ids=["heuristics alone", "a heuristic that broke down", "a search that broke down"],
)
def test_odd_benches_are_drawn_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, some: list[CellResult]
) -> None:
    bench_figure(bench_table("Bench", some, baselines=["evolution"]), some, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").exists()
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_survives_the_file(loss: float) -> None:
    broken = cell("random", 0, [(100, loss), (1000, 2.0)])
    again = CellResult.model_validate_json(broken.model_dump_json())
    assert again.marks[0].loss == loss or (math.isnan(loss) and math.isnan(again.marks[0].loss))


def test_a_final_loss_beyond_all_bounds_is_an_infinite_perplexity() -> None:
    table = bench_table("Bench", [cell("random", 0, [(100, 800.0)]), *results()], baselines=["evolution"])
    assert (table.rows[-1].label, table.rows[-1].perplexity.value) == ("random", math.inf)
    assert "| random | inf |" in markdown(table)
