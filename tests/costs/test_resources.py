"""Resources: what the built-in ones cost, and that a third party's is one class and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from glass_runs import WINDOW, glass_config, glass_tables, go
from rich.console import Console
from typer.testing import CliRunner

from ffgym.bench.bench import bench
from ffgym.bench.checks import check_benches
from ffgym.bench.file import read_bench
from ffgym.cli.app import app
from ffgym.config.toml import load_config, to_toml
from ffgym.costs.resource import Costs, CostSetting, Measurement, Resource, costs_of, resource_named
from ffgym.errors import ConfigError, PluginError, UnknownNameError
from ffgym.models.cut import PrunableModel
from ffgym.models.loading import load
from ffgym.pipeline.make_env import make_pruning_env
from ffgym.pipeline.task import open_task
from ffgym.plugins import discovery, manager
from ffgym.prepare import configured
from ffgym.prepare.parts import make_reward
from ffgym.pruning.budget import Budget
from ffgym.report.progress import Reporter
from ffgym.testing.models import tiny_model
from ffgym.types import Sublayer

ENERGY = """
import ffgym

class Energy(ffgym.Resource):
    '''Picojoules of one token: attention moves more data than an MLP.'''

    name = "energy"
    quantity = "energy"
    column = "uJ/token"

    def unit_price(self, sublayer, setting):
        return (5 if sublayer.kind == "attention" else 2) * sublayer.unit_macs

    def rest(self, model, setting):
        return 3 * model.get_output_embeddings().weight.numel()

    def text(self, cost):
        return f"{cost / 1e6:.3f}"

@ffgym.hookimpl
def ffgym_resources():
    return [Energy]
"""

# Every measurement says something else: which one a run counts can be told.
HEAT = """
import json
import ffgym

measured = []

class Heat(ffgym.Resource):
    '''Degrees.'''

    name = "heat"
    unit = "K"
    column = "heat"

    def measure(self, model, setting, *, file, on_progress, notify):
        import numpy as np
        from ffgym.costs.resource import Costs, Measurement
        from ffgym.models.families import family_of

        if file is None:
            measured.append(1 + len(measured))
            on_progress(1, 1)
        degrees = measured[-1] if file is None else json.loads(file.read_text())["degrees"]
        tables = [np.arange(s.units + 1) * s.unit_params * degrees for s in family_of(model).sublayers(model)]
        text = json.dumps({"degrees": degrees})
        return Costs(tables, 7, Measurement(f"thermometer at {degrees}", f"digest-of-{degrees}", text))

@ffgym.hookimpl
def ffgym_resources():
    return [Heat]
"""

ATTENTION = Sublayer(0, "attention", 3, 192, 294_912, 294_912, query_heads_per_unit=3, head_dim=64)
MLP = Sublayer(0, "mlp", 1536, 1, 1728, 1728)


class TestBuiltIns:
    """SmolLM2-135M: d = 576, 9 query heads in 3 groups, head_dim = 64, 1,536 intermediate channels."""

    @pytest.mark.parametrize(
        ("resource", "attention", "mlp"),
        [
            ("params", 576 * (192 + 64 + 64 + 192), 3 * 576),
            ("macs", 294_912 + 3 * (64 * 1024 + 1024 * 64), 1728),  # q k^T and p v for 3 heads
            ("kv", 2 * 64 * 2, 0),  # a key and a value of 64 numbers of 2 bytes
        ],
    )
    def test_prices(self, resource: str, attention: int, mlp: int) -> None:
        setting = CostSetting(context=1024, number_bytes=2)
        assert resource_named(resource).unit_price(ATTENTION, setting) == attention
        assert resource_named(resource).unit_price(MLP, setting) == mlp

    def test_costs_are_prices_times_units_and_whole_numbers(self) -> None:
        model = tiny_model("llama")
        costs = costs_of(resource_named("params"), model, context=64)
        sublayers = PrunableModel(model).sublayers
        assert [table.tolist() for table in costs.tables] == [
            [k * s.unit_params for k in range(s.units + 1)] for s in sublayers
        ]
        assert isinstance(costs.of([s.units for s in sublayers]), int)
        budget = Budget(sublayers, costs.tables)
        assert budget.dense_cost == Budget(sublayers).dense_cost  # a budget that is given no costs counts parameters

    def test_an_unknown_one_is_answered_with_the_near_match(self) -> None:
        for check in (configured.with_options, make_reward):
            with pytest.raises(UnknownNameError, match="unknown resource 'latencyy'") as raised:
                check(load_config(prune={"resource": "latencyy"}))
            assert "Did you mean 'latency'?" in str(raised.value.hint)


class TestThirdParty:
    def test_its_price_is_a_budget_from_the_command_line(self, install: Any, tmp_path: Path) -> None:
        install("ffgym-energy", ENERGY)
        config = tmp_path / "config.toml"
        config.write_text(to_toml(glass_config(tmp_path, search={"random_baseline": False})))
        done = CliRunner().invoke(app, ["run", "--config", str(config), "--resource", "energy"])
        assert done.exit_code == 0, done.output
        folder = tmp_path / "out"
        allocation = json.loads((folder / "allocation.json").read_text())
        assert allocation["resource"] == "energy"
        # By hand: the trained tiny Llama's units.
        prunable = PrunableModel(load(load_config(config).model.name, dtype="float32").model)
        prices = [(5 if s.kind == "attention" else 2) * s.unit_macs for s in prunable.sublayers]
        dense = sum(s.units * p for s, p in zip(prunable.sublayers, prices, strict=True))
        kept = sum(k * p for k, p in zip(allocation["kept"], prices, strict=True))
        assert allocation["sparsity"] == pytest.approx(1 - kept / dense)
        assert 0.2 <= allocation["sparsity"] < 0.25
        # In the tables, with the rest of the model; after the columns of every run.
        rest = 3 * prunable.model.get_output_embeddings().weight.numel()
        rows = json.loads((folder / "report.json").read_text())
        found = next(row for row in rows if row["is_found"])
        assert found["costs"]["energy"] == rest + kept
        assert found["sparsity_model"] == pytest.approx(1 - (rest + kept) / (rest + dense))
        report = (folder / "report.md").read_text()
        assert "uJ/token" in report
        assert f"{(rest + kept) / 1e6:.3f}" in report
        assert "of the energy of its attention and MLP" in (folder / "model" / "README.md").read_text()

    def test_it_is_weighed_by_a_reward(self, install: Any, tmp_path: Path) -> None:
        install("ffgym-energy", ENERGY)
        reward = {"name": "multi-objective", "accuracy": 0, "resource": "energy"}
        result, _ = go(glass_config(tmp_path, reward=reward, search={"random_baseline": False}))
        assert list(result.found.best.objectives) == ["perplexity_ratio", "energy_saved"]
        assert "energy" in json.loads((result.folder / "report.json").read_text())[0]["costs"]

    def test_what_it_measures_is_kept_reported_and_counted_again(self, install: Any, tmp_path: Path) -> None:
        install("ffgym-heat", HEAT)
        config = glass_config(
            tmp_path, prune={"resource": "heat", "ridge": 0.1, "context": WINDOW}, search={"random_baseline": False}
        )
        result, said = go(config)
        assert "heat: thermometer at 1; table digest-of-1" in said
        assert result.table.header.endswith("Heat: thermometer at 1.")
        assert json.loads((result.folder / "heat.json").read_text()) == {"degrees": 1}
        quiet = Reporter(Console(quiet=True))
        resumed = open_task(config, [], quiet, recorded=result.folder)
        assert resumed.measurements["heat"].digest == "digest-of-1"
        overwriting = config.model_copy(update={"output": config.output.model_copy(update={"overwrite": True})})
        assert "heat: thermometer at 2" in go(overwriting)[1]

    def test_its_progress_is_shown_to_nobody_where_nobody_looks(self, install: Any, tiny_run: dict[str, Any]) -> None:
        install("ffgym-heat", HEAT)
        assert make_pruning_env(tiny_run, prune={"resource": "heat", "ridge": 0.1}).budget.dense_cost > 0

    def test_a_bench_would_measure_it_in_every_cell(self, install: Any, tmp_path: Path) -> None:
        install("ffgym-heat", HEAT)
        run = glass_tables(tmp_path, prune={"resource": "heat"})
        path = tmp_path / "small.toml"
        path.write_text(tomli_w.dumps({"title": "S", "agents": ["random"], "seeds": [0], "results": "s", "run": run}))
        with pytest.raises(
            ConfigError, match="cells of one table count the same heat, and random names none"
        ) as raised:
            check_benches([read_bench(path)])
        assert "price per unit" in str(raised.value.hint)

    def test_cells_of_a_bench_may_weigh_it_where_others_do_not(self, install: Any, tmp_path: Path) -> None:
        install("ffgym-energy", ENERGY)
        run = glass_tables(tmp_path, agent={"name": "random"})
        del run["output"]
        weighed = {"reward": {"name": "multi-objective", "accuracy": 0, "resource": "energy"}}
        content = {"title": "S", "agents": ["random", "weighed"], "seeds": [0], "results": "s", "run": run}
        path = tmp_path / "small.toml"
        path.write_text(tomli_w.dumps({**content, "baseline": "random", "variants": {"weighed": weighed}}))
        (table,) = bench([path], progress=Console(quiet=True))
        assert {row.label for row in table.rows} == {"random", "weighed"}

    def test_its_edition_counts(self, install: Any) -> None:
        install("ffgym-energy", ENERGY.replace('name = "energy"', 'name = "energy"\n    edition = 2'))
        others = configured.editions(load_config())
        assert configured.editions(load_config(prune={"resource": "energy"})) == {**others, "prune.resource": 2}
        weighing = load_config(reward={"name": "multi-objective", "resource": "energy"})
        assert configured.editions(weighing) == {**others, "reward.energy": 2}

    def test_one_without_price_and_measurement_is_refused_when_it_is_loaded(self, install: Any) -> None:
        install("ffgym-energy", ENERGY.replace("def unit_price", "def price_of_unit"))
        (record,) = [row for row in discovery.records() if row.package == "ffgym-energy"]
        assert "Energy defines neither unit_price nor measure (" in str(record.failure)
        assert "ffgym_energy.py, line 4)" in str(record.failure), "the author's line, not ffgym's"
        assert "energy" not in manager.names("resource")


class Broken(Resource):
    """Costs whatever a test says."""

    name = "broken"
    price: Any = 1.0
    beside: Any = 0

    def unit_price(self, sublayer: Sublayer, setting: CostSetting) -> float:
        price: float = self.price
        return price

    def rest(self, model: Any, setting: CostSetting) -> float:
        rest: float = self.beside
        return rest


@pytest.mark.parametrize(
    ("attributes", "complaint"),
    [
        ({"price": -1.0}, "layer 0 attention is negative or falls"),
        ({"price": float("nan")}, "unit_price of layer 0 attention is nan, not a finite number"),
        ({"price": None}, "unit_price of layer 0 attention is None, not a finite number"),
        ({"price": 0}, "no unit costs anything"),
        ({"beside": float("inf")}, "rest is inf, not a finite number"),
        ({"beside": torch.tensor(3)}, r"rest is tensor\(3\), not a finite number"),
        ({"text": lambda self, cost: 1 / 0}, "failed while writing a cost: ZeroDivisionError"),
        ({"text": lambda self, cost: cost}, "text returned float, not a string"),
    ],
)
def test_costs_that_are_none_name_the_resource(attributes: dict[str, Any], complaint: str) -> None:
    resource = type("Broken", (Broken,), attributes)()
    with pytest.raises(PluginError, match=complaint) as raised:
        costs_of(resource, tiny_model("llama"), context=64)
    assert "resource 'broken'" in str(raised.value)


MEASUREMENT = Measurement("made up", digest="7", text="{}")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (np.arange(3), "no Costs with a measurement"),
        (Costs([], measurement="x"), "no Costs with a measurement"),  # type: ignore[arg-type]
        (Costs(None, measurement=MEASUREMENT), "its tables are not arrays of numbers"),  # type: ignore[arg-type]
        (Costs([np.array(["a", "b", "c"])] * 6, measurement=MEASUREMENT), "its tables are not arrays of numbers"),
        (Costs([[0, [1, 2]]] * 6, measurement=MEASUREMENT), "its tables are not arrays of numbers"),  # type: ignore[list-item]
    ],
    ids=["no costs", "text", "nothing", "tables of text", "ragged tables"],
)
def test_a_measurement_that_is_none_names_the_resource(answer: Any, complaint: str) -> None:
    measured = type("Broken", (Broken,), {"measure": lambda self, *_, **__: answer})()
    with pytest.raises(PluginError, match=f"resource 'broken'.*{complaint}"):
        costs_of(measured, tiny_model("llama"), context=64)


def test_a_digest_that_is_no_text_is_named() -> None:
    tables = [np.arange(units + 1.0) for units in (2, 48) * 3]
    costs = Costs(tables, measurement=Measurement("made up", digest=7, text="{}"))  # type: ignore[arg-type]
    measured = type("Broken", (Broken,), {"measure": lambda self, *_, **__: costs})()
    with pytest.raises(PluginError, match=r"resource 'broken'.*digest of its Measurement is 7, not text"):
        costs_of(measured, tiny_model("llama"), context=64)


def test_numbers_of_numpy_are_numbers() -> None:
    """A cost is written as JSON, which numpy's numbers are not."""
    priced = type("Broken", (Broken,), {"price": np.float32(2), "beside": np.int64(5)})()
    assert json.dumps(costs_of(priced, tiny_model("llama"), context=64).of([1] * 6)) == "17.0"


def test_every_sublayer_has_a_price_of_its_own() -> None:
    twice = type("Broken", (Broken,), {"unit_price": lambda self, s, _: 1 + s.layer})()
    costs = costs_of(twice, tiny_model("llama"), context=64)
    assert [table[1] for table in costs.tables] == [1, 1, 2, 2, 3, 3]
    assert replace(costs, rest=5).of((1, 0, 1, 0, 0, 2)) == 5 + 1 + 2 + 6
