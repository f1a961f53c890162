"""The latency table: what it costs, what it fits, and that a file says the same everywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from distinct_families import DISTINCT_FAMILIES
from latency_tables import made_up_table
from pydantic import ValidationError

from ffgym.costs.latency_table import LatencyTable, layer_shapes, read_table, to_json
from ffgym.costs.resource import Measurement, costs_of, resource_named
from ffgym.errors import BudgetError, ConfigError
from ffgym.models.cut import PrunableModel
from ffgym.pruning.budget import Budget
from ffgym.testing.models import tiny_model


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def table(model):
    return made_up_table(model)


def changed(table, **values):
    return LatencyTable.model_validate_json(json.dumps(table.model_dump(mode="json") | values))


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_layers_of_one_shape_share_a_curve(family):
    shapes = layer_shapes(tiny_model(family))
    assert len(shapes) == 6
    assert len(set(shapes)) == 2
    assert [shape.kind for shape in shapes] == ["attention", "mlp"] * 3


def test_layers_that_attend_differently_have_curves_of_their_own(model):
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    shapes = layer_shapes(model)
    assert [shape.attends for shape in shapes] == ["", "", "sliding_attention", "", "", ""]
    assert len(set(shapes)) == 3


def test_costs_are_the_times_in_whole_picoseconds(model, table):
    attention, mlp, *_ = table.costs(model).tables
    assert attention.tolist() == [0, 3e9, 4e9]
    assert mlp[[0, 1, 3, 48]].tolist() == [0, 0.95e9, 0.95e9, 9e9]  # 1.0 ms and then 0.9 ms are pooled
    assert (np.diff(mlp) >= 0).all()


def test_the_rest_is_what_no_sublayer_takes(model, table):
    assert table.costs(model).rest == 50e9 - 3 * (4e9 + 9e9)
    assert changed(table, whole_seconds=1e-9).costs(model).rest == 0  # noise may make the parts more than the whole


def test_a_whole_model_takes_what_the_table_says(model, table, tmp_path):
    path = tmp_path / "latency.json"
    path.write_text(to_json(table))
    costs = costs_of(resource_named("latency"), model, context=64, file=path)
    assert costs.measurement == Measurement(table.measured, table.digest, to_json(table))
    dense, kept = (2, 48) * 3, (1, 20, 2, 30, 1, 9)
    assert costs.of(dense) == 50e9
    budget = Budget(PrunableModel(model).sublayers, costs.tables)
    assert costs.of(dense) - costs.of(kept) == budget.dense_cost - budget.allocation(kept).cost


class TestFile:
    def test_gives_the_same_table_back(self, table, tmp_path):
        (tmp_path / "latency.json").write_text(to_json(table))
        again = read_table(tmp_path / "latency.json")
        assert again == table
        assert again.digest == table.digest

    def test_something_else_is_refused(self, tmp_path):
        path = tmp_path / "latency.json"
        path.write_text('{"format": "something else"}')
        with pytest.raises(ConfigError, match="no latency table, or a damaged one: format") as raised:
            read_table(path)
        assert "ffgym latency" in raised.value.hint

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("sizes", [1]),
            ("sizes", [2, 1]),
            ("seconds", [0.1]),
            ("seconds", [0.1, 0.0]),
            ("seconds", [0.1, float("inf")]),
            ("low", []),
        ],
    )
    def test_curves_that_are_none_are_refused(self, table, field, value):
        plain = table.model_dump(mode="json")
        plain["curves"][0][field] = value
        with pytest.raises(ValidationError):
            LatencyTable.model_validate_json(json.dumps(plain))

    def test_two_curves_of_one_shape_are_refused(self, table):
        curves = table.model_dump(mode="json")["curves"]
        with pytest.raises(ValidationError, match="two curves have the same shape"):
            changed(table, curves=[*curves, curves[0]])


def test_a_budget_that_a_wrong_time_puts_out_of_reach_says_where_to_look(model, table):
    curves = table.model_dump(mode="json")["curves"]
    for times in ("seconds", "low", "high"):
        curves[0][times] = [1e30, *curves[0][times][1:]]
    tables = changed(table, curves=curves).costs(model).tables
    with pytest.raises(BudgetError, match="out of reach") as raised:
        Budget(PrunableModel(model).sublayers, tables, resource="latency").check(0.2)
    assert "a wrong time in the latency table" in raised.value.hint


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (tiny_model("llama", layers=4), r"latency table x\.json .*another model: layers 3, here 4\n"),
        (tiny_model("qwen2"), "family 'llama', here 'qwen2'; attention: unit_params"),
        (tiny_model("llama", grouped_query=False), "attention: units 2, here 4.*\n.*ffgym latency"),
    ],
    ids=["deeper", "family", "heads"],
)
def test_the_times_of_another_model_are_refused(table, other, said):
    with pytest.raises(BudgetError, match=said):
        table.check_fits(other, context=64, source="x.json")


def test_times_of_one_kind_or_another_context_are_refused(model, table):
    only = changed(table, curves=[table.curves[0].model_dump(mode="json")])
    with pytest.raises(BudgetError, match="mlp: no times"):
        only.check_fits(model, context=64, source="x.json")
    with pytest.raises(BudgetError, match=r"timed on 64 tokens, prune\.context is 1024") as raised:
        table.check_fits(model, context=1024, source="x.json")
    assert "prune.context=64" in raised.value.hint
