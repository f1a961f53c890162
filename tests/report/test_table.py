import io
import json
import math

import pytest
from rich.console import Console
from table_costs import table_costs

from ffgym.report.layout import humane
from ffgym.report.table import ReportTable, Row, measurement

HEADER = measurement(
    model="tiny (random weights)",
    corpus="some_text",
    split="report",
    tokens=16384,
    window=1024,
    dtype="bfloat16",
    bos=True,
    calibration="other text, 32,768 tokens",
    seed=7,
    context=1024,
)


def row(label: str, perplexity: float, sparsity: float = 0.2, **kwargs) -> Row:
    numbers = {"loss_stderr": None, "costs": table_costs(134_515_008, 107.3e6, 23_040)}
    return Row(label, perplexity, sparsity_prunable=sparsity, sparsity_model=sparsity * 0.8, **(numbers | kwargs))


def rendered(table: ReportTable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table.layout().terminal())
    return console.file.getvalue()


TABLE = ReportTable(
    (
        row("uniform + ridge", 54.214, loss_stderr=0.03),
        row("a very long label for a reference allocation + ridge", 40.0, note="as many tokens"),
        row("dense", 24.0, 0.0),
        row("reinforce + ridge", 33.905, is_found=True),
        row("broken", math.inf),
        row("worse", math.nan),
    ),
    HEADER,
)


def test_the_header_says_how_it_was_measured():
    for part in (
        "some_text, report split",
        "16,384",
        "1,024",
        "bfloat16",
        "BOS before the first window alone",
        "tiny",
        "32,768",
        "Seed 7",
    ):
        assert part in HEADER


def test_dense_stands_first_and_the_others_keep_their_order():
    assert [r.label for r in TABLE.rows][:3] == ["dense", "uniform + ridge", TABLE.rows[2].label]
    assert TABLE.rows[3].label == "reinforce + ridge"


def test_best_is_the_lowest_finite_pruned_perplexity():
    assert TABLE.best is not None
    assert TABLE.best.label == "reinforce + ridge"
    assert ReportTable((row("dense", 24.0, 0.0), row("broken", math.nan)), "").best is None


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        ReportTable((), "")


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_table_fits_and_cuts_nothing(width):
    text = rendered(TABLE, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for cell in ("54.21 ± 1.63", "33.91", "134.5 M", "107.3 M", "23.0 kB", "20.0%", "16.0%", "inf", "NaN"):
        assert cell in text
    assert " ".join(HEADER.split()) in " ".join(text.split())


def test_terminal_table_without_colours_has_no_escape_codes_and_still_marks_the_best():
    text = rendered(TABLE, 100)
    assert "\x1b" not in text
    assert "reinforce + ridge\N{NO-BREAK SPACE}*" in text


def test_markdown_is_one_table_with_the_best_in_bold():
    lines = TABLE.layout().markdown().splitlines()
    assert lines[0].startswith("| model | perplexity |")
    assert {line.count("|") for line in lines[: 2 + len(TABLE.rows)]} == {8}
    assert "| **reinforce + ridge** \\* | **33.91** |" in TABLE.layout().markdown()
    assert "some\\_text" in TABLE.layout().markdown()


def test_markdown_survives_signs_in_a_label():
    text = ReportTable((row("a|b_c*", 2.0),), "").layout().markdown()
    assert "a\\|b\\_c\\*" in text


def test_dicts_are_strict_json_and_say_which_row_is_which():
    rows = json.loads(json.dumps(TABLE.layout().as_dicts(), allow_nan=False))
    assert rows[0]["is_dense"]
    assert [r["label"] for r in rows if r["is_best"]] == ["reinforce + ridge"]
    assert rows[-1]["perplexity"] is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (134_515_008, "", "134.5 M"),
        (107.3e6, "", "107.3 M"),
        (23_040, "B", "23.0 kB"),
        (999_960, "B", "1.0 MB"),
        (0, "B", "0 B"),
        (999, "", "999"),
    ],
)
def test_humane_numbers(value, unit, text):
    assert humane(value, unit) == text
