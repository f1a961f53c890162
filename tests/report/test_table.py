import io
import json
import math
from dataclasses import replace

import pytest
from printed import printed
from rich.console import Console
from table_costs import table_costs

from ffgym.report.layout import humane
from ffgym.report.table import ReportTable, Row

HEADER = "Perplexity on some_text, report split: 16,384 tokens in windows of 1,024, bfloat16. Seed 7."


def row(label: str, perplexity: float, sparsity: float = 0.2, **kwargs) -> Row:
    numbers = {"loss_stderr": None, "costs": table_costs(134_515_008, 107.3e6, 23_040)}
    return Row(label, perplexity, sparsity_prunable=sparsity, sparsity_model=sparsity * 0.8, **(numbers | kwargs))


def rendered(table: ReportTable, width: int) -> str:
    return printed(table.layout(), width=width)


TABLE = ReportTable(
    (
        row("dense", 24.0, 0.0),
        row("uniform + ridge", 54.214, loss_stderr=0.03),
        row("a very long label for a reference allocation + ridge", 40.0, note="as many tokens"),
        row("reinforce + ridge", 33.905, is_found=True),
        row("broken", math.inf),
        row("worse", math.nan),
    ),
    HEADER,
)


def test_best_is_the_lowest_finite_pruned_perplexity():
    assert TABLE.best is not None
    assert TABLE.best.label == "reinforce + ridge"
    assert ReportTable((row("dense", 24.0, 0.0), row("broken", math.nan)), "").best is None


def test_terminal_table_fits_and_cuts_nothing():
    text = rendered(TABLE, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for cell in ("54.21", "33.91", "2.26", "134.5 M", "107.3 M", "23.0 kB", "20.0%", "16.0%", "inf", "NaN"):
        assert cell in text
    assert "a very long label for a reference allocation + ridge  " in text, "no label is wrapped"
    assert " ".join(HEADER.split()) in " ".join(text.split())


def test_terminal_table_without_colours_has_no_escape_codes_and_still_marks_the_best():
    text = rendered(TABLE, 100)
    assert "\x1b" not in text
    assert "33.91\N{NO-BREAK SPACE}*" in text


def test_markdown_is_one_table():
    lines = TABLE.layout().markdown().splitlines()
    assert lines[0] == "| model | perplexity | x dense |"
    assert {line.count("|") for line in lines[: 2 + len(TABLE.rows)]} == {4}
    assert "| reinforce + ridge | 33.91 \\* | 1.41 |" in TABLE.layout().markdown()
    assert "<br>" not in TABLE.layout().markdown()
    assert "some\\_text" in TABLE.layout().markdown()


def test_bold_is_the_saved_model_whoever_has_the_star():
    rows = (row("dense", 24.0, 0.0), row("uniform", 30.0), row("found", 33.0, is_found=True, is_saved=True))
    text = ReportTable(rows, HEADER).layout().markdown()
    assert "| uniform | 30.00 \\* | 1.25 |\n| **found** | **33.00** | 1.38 |\n" in text
    assert "- \\* lowest perplexity of the pruned rows. Bold: the saved model.\n" in text
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    console.print(ReportTable(rows, HEADER).layout())
    (found,) = (line for line in console.file.getvalue().splitlines() if "33.00" in line)
    (lowest,) = (line for line in console.file.getvalue().splitlines() if "30.00" in line)
    assert found.startswith("\x1b[1mfound")
    assert "\x1b[" not in lowest


def test_the_equals_of_the_best_have_its_star():
    """Such as the same allocation under another label; never the dense model."""
    rows = (row("dense", 30.0, 0.0), row("uniform", 30.0), row("found", 30.0), row("worse", 31.0))
    lines = ReportTable(rows, HEADER).layout().markdown().splitlines()[2:6]
    assert [r"\*" in line for line in lines] == [False, True, True, False]


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


# what the table claims

EASY, HARD = (2.0, 3.0, 4.0), (2.5, 3.5, 4.5)


def measured(label: str, *losses: float, **kwargs) -> Row:
    return row(label, math.exp(sum(losses) / len(losses)), losses=losses, refit="ridge", **kwargs)


def compared(*rows: Row, dense: float = 20.0) -> ReportTable:
    return ReportTable((row("dense", dense, 0.0), *rows), HEADER)


WEAK = measured("uniform + ridge", 4.0, 5.0, 6.0, is_heuristic=True)
STRONG = measured("fisher + ridge", *HARD, is_heuristic=True)


def found(*losses: float, **kwargs) -> Row:
    return measured("reinforce + ridge", *losses, is_found=True, **kwargs)


@pytest.mark.parametrize(
    ("losses", "cell", "sentence"),
    [
        ((2.4, 3.4, 4.41), "-0.097 ± 0.014", "is better than the best heuristic, fisher, by 0.097 ± 0.014 nats"),
        ((2.6, 3.6, 4.59), "+0.097 ± 0.014", "is worse than the best heuristic, fisher, by 0.097 ± 0.014 nats"),
        (
            (2.4, 3.6, 4.45),
            "-0.017 ± 0.259 tie",
            "reinforce + ridge ties with the best heuristic, fisher: -0.017 ± 0.259",
        ),
        (HARD, "same model", "reinforce + ridge is the same model as the best heuristic, fisher."),
    ],
)
def test_the_search_is_compared_with_the_best_heuristic_on_the_same_windows(losses, cell, sentence):
    table = compared(WEAK, STRONG, found(*losses))
    assert table.best_heuristic is STRONG
    text = table.layout().markdown()
    assert f"| {cell} |" in text
    assert "| best heuristic |" in text
    (verdict,) = table.verdict
    assert sentence in verdict
    assert ("3 windows" in verdict) == (losses != HARD)
    assert verdict in text


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ((2.6, 3.6, 4.59), "By perplexity alone, reinforce + ridge is worse than the best heuristic"),
        ((2.4, 3.6, 4.45), "By perplexity alone, reinforce + ridge ties with the best heuristic"),
    ],
)
def test_where_the_search_had_other_aims_too_the_sentence_says_what_it_compares(losses, sentence):
    table = replace(compared(WEAK, STRONG, found(*losses)), has_objectives=True)
    assert table.verdict[0].startswith(sentence)


@pytest.mark.parametrize(("losses", "is_said"), [((2.4, 3.4, 4.41), True), ((2.4, 3.9, 4.3), False), (HARD, False)])
def test_a_refit_that_made_the_result_worse_is_pointed_out(losses, is_said):
    plain = replace(found(*losses), label="reinforce, plain", refit="")
    text = compared(WEAK, plain, found(*HARD, is_saved=True)).layout().markdown()
    assert ("made the result worse: reinforce, plain has the lower loss" in text) == is_said
    assert "text like that of the report" not in text, "the report chooses nothing"


def test_one_window_cannot_tell():
    table = compared(measured("uniform + ridge", 3.0, is_heuristic=True), found(2.0))
    assert "One window cannot say" in table.verdict[0]


def test_a_result_that_is_the_prior_is_called_so():
    text = compared(WEAK, STRONG, found(*HARD, same_as="fisher + ridge")).layout().markdown()
    assert "The result is a heuristic itself: reinforce found the same allocation as fisher." in text


def test_without_losses_of_the_windows_nothing_is_claimed():
    table = compared(row("uniform", 54.0, refit="ridge", is_heuristic=True), row("found", 30.0, is_found=True))
    assert table.verdict == []
    assert "best heuristic" not in table.layout().markdown()


@pytest.mark.parametrize("perplexity", [2440.0, math.inf, math.nan])
def test_a_destroyed_model_is_called_so(perplexity):
    table = compared(row("reinforce + ridge", perplexity, is_found=True), dense=19.6)
    assert table.warning is not None
    assert "destroyed" in table.warning
    assert table.warning in rendered(table, 2000)


def test_a_model_that_works_gets_no_warning():
    assert compared(found(*EASY)).warning is None


def test_what_is_equal_in_every_pruned_row_moves_to_the_caption():
    text = compared(WEAK, replace(STRONG, sparsity_prunable=0.3)).layout().markdown()
    assert text.startswith("| model | perplexity | x dense | nats against best heuristic | sparsity prunable |")
    assert "- In every pruned row: sparsity model 16.0%, params 134.5 M (dense 134.5 M)" in text


def test_a_narrow_console_leaves_out_the_last_columns_and_says_so():
    table = compared(WEAK, replace(STRONG, costs=table_costs(1e8, 9e7, 2e4)))
    assert "Left out" not in rendered(table, 100)
    narrow = rendered(table, 62)
    assert max(map(len, narrow.splitlines())) <= 62
    assert "Left out, because the console is narrow: MACs/token, KV/token." in " ".join(narrow.split())
    assert "params" in narrow
