"""`ffgym latency` shows every time that was taken, and what the budget makes of it."""

from __future__ import annotations

from pathlib import Path

from latency_tables import made_up_table
from printed import printed

from ffgym.costs.latency_report import layout, rows
from ffgym.costs.latency_table import Serving
from ffgym.testing.models import tiny_model


def test_every_size_has_its_time_and_its_cost():
    table = made_up_table(tiny_model("llama"))
    found = rows(table)
    assert found[0] == ("attention", "1", "3.000", "3.000 to 3.000", "3.000", "75%")
    assert found[2] == ("mlp", "1", "1.000", "1.000 to 1.000", "0.950", "11%")  # pooled with the next, 0.9 ms
    assert found[-1] == ("mlp", "48", "9.000", "9.000 to 9.000", "9.000", "100%")
    assert len(found) == 2 + 17


def test_the_terminal_says_where_it_is_from():
    table = made_up_table(tiny_model("llama"))
    text = printed(layout(table, Path("somewhere/table.json")))
    for part in ("made up, 1 thread, float32", "50.000 ms", table.digest[:12], "somewhere/table.json", " range "):
        assert part in text
    heads = [column.head for column in layout(table.model_copy(update={"repetitions": 4}), Path()).columns]
    assert "quartiles" in heads


def test_in_an_engine_dense_sizes_have_no_quartiles_and_a_note_says_why():
    serving = Serving(engine="vllm 9.9", requests=1, output_tokens=8, arguments=())
    table = made_up_table(tiny_model("llama")).model_copy(update={"serving": serving, "repetitions": 5})
    spreads = {(name, size): spread for name, size, _, spread, *_ in rows(table)}
    assert [size for size, spread in spreads.items() if not spread] == [("attention", "2"), ("mlp", "48")]
    assert "so dense sizes have no quartiles" in layout(table, Path("table.json")).markdown()
