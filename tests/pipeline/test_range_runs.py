"""A run over a range of budgets: one policy, the whole front, a model at a chosen point; and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from glass_runs import FILES, NO_MODEL, PER_UPDATE, bench_file, glass_config, glass_tables, go, stages_are_announced
from mlflow_store import client, new_store
from printed import printed
from rich.console import Console
from typer.testing import CliRunner

import ffgym
from ffgym.bench.checks import check_benches
from ffgym.bench.file import read_bench
from ffgym.cli import app
from ffgym.config.tables import RunConfig
from ffgym.errors import BudgetError, ConfigError
from ffgym.evaluation.perplexity import evaluate
from ffgym.pipeline import compare, task
from ffgym.pipeline.stored import read_front
from ffgym.plugins import built_ins, manager
from ffgym.prepare.parts import load_parts
from ffgym.report.front import Front
from ffgym.report.progress import Reporter
from ffgym.tracking.runs import list_runs

pytestmark = pytest.mark.usefixtures("only_builtins")

TARGETS = (0.1, 0.2, 0.3, 0.4, 0.5)
NAMES = ("0.10", "0.20", "0.30", "0.40", "0.50")
EPISODES = 5 * PER_UPDATE
RANGE_FILES = FILES - {"episodes-random.jsonl"} | {"front.json", "front.md", "front.png"}
RANGE_FILES |= {f"allocation-{name}.json" for name in NAMES}


def ranged(folder: Path, **changes: dict[str, Any]) -> RunConfig:
    prune = {"sparsity": "0.1:0.5", **changes.pop("prune", {})}
    search = {"episodes": EPISODES, **changes.pop("search", {})}
    return glass_config(folder, prune=prune, search=search, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, drawing: Any) -> tuple[RunConfig, ffgym.RunResult, str]:
    """The run that most tests look at, tracked and drawn: its configuration, result and progress."""
    folder = tmp_path_factory.mktemp("finished")
    new_store(folder / "mlruns")
    config = ranged(folder, tracking={"enabled": True})
    with drawing():
        return config, *go(config)


def front_of(folder: Path) -> Front:
    front = read_front(folder)
    assert front is not None
    return front


# what comes out


def test_everything_is_written_and_nothing_else(finished: Any) -> None:
    folder = finished[1].folder
    assert {path.name for path in folder.iterdir()} == RANGE_FILES
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")


def test_its_stages_are_those_that_it_announced(finished: Any) -> None:
    config, _, said = finished
    stages_are_announced(config, said)


def test_every_point_is_on_its_budget_and_measured_beside_the_rules(finished: Any) -> None:
    result = finished[1]
    front = front_of(result.folder)
    assert front == result.front, "what is read is what was found"
    assert [point.target for point in front.points] == list(TARGETS)
    assert front.labels == ["reinforce", "uniform", "mlp-first"]
    for point in front.points:
        assert point.target - 1e-9 <= point.allocation.sparsity < point.target + 0.02
        assert all(math.isfinite(front.row(point, label).perplexity) for label in front.labels)
    parameters = [point.found.parameters for point in front.points]
    assert parameters == sorted(parameters, reverse=True)
    text = (result.folder / "front.md").read_text()
    for point in front.points:
        assert f"{point.target:.1%}" in text
        assert f"{point.found.perplexity:.2f}" in text
    assert "report split" in text
    assert f"{front.search_tokens:,} tokens of search" in text


def test_perplexities_are_those_of_the_allocations_that_are_named(finished: Any) -> None:
    config, result, _ = finished
    space = task.open_task(config, list(compare.REFERENCES.values()), Reporter(Console(quiet=True)))
    windows = space.splits.report.windows
    for point, name in zip(front_of(result.folder).points, NAMES, strict=True):
        allocation = json.loads((result.folder / f"allocation-{name}.json").read_text())
        found = point.allocation.kept
        assert allocation["kept"] == list(found)
        assert allocation["origin"] == point.origin
        assert space.env.budget.project(np.array(allocation["importance"], np.float32), point.target).kept == found
        uniform = space.project("uniform", {}, point.target).kept
        for row, units in ((point.found, found), (point.references["uniform"], uniform)):
            with task.cut_to(space, units):
                assert evaluate(space.prepared.prunable.model, windows).perplexity == row.perplexity


def test_the_point_in_the_middle_gets_the_table_and_the_model_of_a_run_at_that_target(finished: Any) -> None:
    import ffgym.models  # noqa: F401 (registers the classes)

    config, result, _ = finished
    labels = [row.label for row in result.table.rows]
    assert labels[0] == "dense"
    assert labels[-2:] == ["reinforce, plain", "reinforce + ridge"]
    assert not any(label.startswith("best of") for label in labels), "random allocations have no target to learn"
    for row in result.table.rows[1:]:
        assert 0.3 - 1e-9 <= row.sparsity_prunable < 0.32
    main = json.loads((result.folder / "allocation.json").read_text())
    assert main == json.loads((result.folder / "allocation-0.30.json").read_text())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype="auto").eval()
    _, splits = load_parts(config)
    assert evaluate(model, splits.report.windows).perplexity == result.table.saved.perplexity


def test_it_is_printed_with_every_point(finished: Any) -> None:
    text = printed(finished[1])
    for part in (*(f"{target:.1%}" for target in TARGETS), "One policy for all points", "reinforce + ridge"):
        assert part in text
    data = finished[1].to_json()
    assert [point["target"] for point in data["front"]["points"]] == list(TARGETS)


def test_mlflow_has_it_all(finished: Any) -> None:
    config, result, _ = finished
    store = client(Path(config.tracking.root))
    children = [run for run in list_runs(Path(config.tracking.root)) if run.parent == result.mlflow_run]
    points = front_of(result.folder).points
    assert {run.name: run.result for run in children} == {
        f"{result.folder.name}: sparsity {point.target:.1%}": point.found.perplexity for point in points
    }
    assert {run.agent for run in children} == {"reinforce"}
    names = {item.path for item in store.list_artifacts(result.mlflow_run)}
    assert RANGE_FILES - {"run.json", "episodes.jsonl", "model"} <= names
    assert store.get_run(result.mlflow_run).data.params["sparsity"] == "0.1:0.5"
    assert (result.folder / "front.md").read_text() in store.get_run(result.mlflow_run).data.tags["mlflow.note.content"]


def test_another_run_starts_from_its_policy_at_one_target_or_over_another_range(finished: Any, tmp_path: Path) -> None:
    folder = finished[1].folder
    policy = manager.create("agent", "reinforce")
    policy.load_state(json.loads((folder / "policy.json").read_text())["state"])
    quick = {"init_from": str(folder), "random_baseline": False}
    single = glass_config(tmp_path / "one", prune={"sparsity": 0.35}, search=quick, output={"save_model": False})
    for config, name in (
        (single, "one"),
        (ranged(tmp_path / "two", search=quick, prune={"sparsity": "0.2:0.4"}), "two"),
    ):
        output = config.output.model_copy(update={"dir": str(tmp_path / name)})
        result, _ = go(config.model_copy(update={"output": output}))
        first = result.found.history[0]
        mean = policy.recommend(np.array([first.target_sparsity, 1.0], np.float32))[-1]
        mirrored = result.found.history[PER_UPDATE // 2]
        pair = np.stack([first.action, mirrored.action])
        inside = (np.abs(pair) < 1).all(axis=0)
        assert inside.sum() >= 3
        np.testing.assert_allclose(pair.mean(axis=0)[inside], mean[inside], atol=1e-6)


# which model is saved


def test_save_all_saves_one_for_every_point(tmp_path: Path) -> None:
    config = ranged(tmp_path, prune={"front_points": 3}, output={"save_all": True})
    result, said = go(config)
    stages_are_announced(config, said)
    sizes = []
    for name, point in zip(("0.10", "0.30", "0.50"), front_of(result.folder).points, strict=True):
        card = (result.folder / f"model-{name}" / "README.md").read_text()
        assert f"{100 * point.allocation.sparsity:.1f}%" in card
        sizes.append((result.folder / f"model-{name}" / "model.safetensors").stat().st_size)
    assert sizes == sorted(sizes, reverse=True)
    finished = ffgym.run(config, progress=Console(quiet=True), resume=result.folder)
    now, then = finished.to_json(), result.to_json()
    assert now == {key: then[key] for key in now}
    assert now["measured"]
    front, table = ((result.folder / name).read_text() for name in ("front.md", "report.md"))
    shown_in_a_notebook = [result.front._repr_markdown_(), result._repr_markdown_(), finished._repr_markdown_()]
    assert shown_in_a_notebook == [front, f"{front}\n{table}", f"{front}\n{table}"]
    assert "One policy for all points" in printed(finished)
    assert not (result.folder / "model").exists()
    again, _ = go(ranged(tmp_path, prune={"front_points": 2}, output={"save_model": False, "overwrite": True}))
    assert not list(again.folder.glob("model*")), "--overwrite cleared what the first run wrote, and nothing was saved"
    assert not (again.folder / "allocation-0.30.json").exists()
    assert result.to_json() == then, "a result tells of its own run, whatever was written into the folder since"


# interrupted


def test_interrupted_and_resumed_it_is_the_same_front(finished: Any, tmp_path: Path, steps: list[int]) -> None:
    steps[0] = after = 2 * PER_UPDATE + 1
    with pytest.raises(KeyboardInterrupt):
        go(ranged(tmp_path))
    found = json.loads((tmp_path / "out" / "allocation.json").read_text())
    assert found["episodes"] == after
    assert 0.3 <= found["sparsity"] < 0.32
    steps[0] = 10**6
    result, _ = go(ranged(tmp_path), resume=tmp_path / "out")
    whole = finished[1].folder
    assert len(steps) - 1 == EPISODES, "nothing was measured twice"
    for name in (*(f"allocation-{name}.json" for name in NAMES), "allocation.json", "policy.json", "report.json"):
        assert (result.folder / name).read_text() == (whole / name).read_text(), name
    assert replace(front_of(result.folder), seconds=0) == replace(front_of(whole), seconds=0)


# refused


@pytest.mark.parametrize("agent", sorted(set(built_ins.BUILTINS["agent"]) - {"reinforce"}))
def test_an_agent_that_does_not_follow_the_target_is_refused_by_name(tmp_path: Path, agent: str) -> None:
    name = f"'{agent}'" if agent != "one-shot" else "'one-shot' with prior 'mlp-first'"
    with pytest.raises(ConfigError, match=f"agent {name} proposes the same at every target") as raised:
        go(ranged(tmp_path, agent={"name": agent}, model=NO_MODEL))
    assert "--agent reinforce" in str(raised.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_range_whose_upper_end_is_out_of_reach_is_refused_with_what_can_be_reached(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"sparsity 0\.95 of params is out of reach") as raised:
        go(ranged(tmp_path, prune={"sparsity": "0.1:0.95", "min_units": 8}))
    assert "Ask for at most" in str(raised.value.hint)
    assert not (tmp_path / "out").exists(), "the corrected command can have the folder"


def test_a_bench_is_of_one_target(tmp_path: Path) -> None:
    file = bench_file(tmp_path, agents=["reinforce"], tables={"prune": {"sparsity": "0.1:0.5"}, "model": NO_MODEL})
    with pytest.raises(ConfigError, match=r"a bench compares at one target, and reinforce has .*'0\.1:0\.5'"):
        check_benches([read_bench(file)])


def test_the_command_runs_a_range(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(glass_tables(tmp_path)), "utf-8")
    arguments = ["--sparsity", "0.1:0.4", "--save-at", "0.2", "--set", "prune.front_points=2", "--json"]
    done = CliRunner().invoke(app, ["run", "--config", str(file), *arguments])
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert [point["target"] for point in data["front"]["points"]] == [0.1, 0.2, 0.4]
    assert data["allocation"]["sparsity"] == pytest.approx(0.2, abs=0.02)
