"""``ffgym run --resume``: an interrupted run goes on and ends as if nothing had happened, in the same MLflow run."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from glass_runs import (
    EPISODES,
    PER_UPDATE,
    chosen_by_auto,
    ctrl_c,
    glass_config,
    glass_home,
    glass_tables,
    go,
    other_dtype,
    stopping,
)
from mlflow_store import client, new_store, runs
from processes import lines
from rich.console import Console
from safetensors.torch import load_file, save
from sqlalchemy import event
from sqlalchemy.engine import Engine
from typer.testing import CliRunner

import ffgym
from ffgym.cli import app
from ffgym.config.tables import RunConfig
from ffgym.errors import DataError, ModelError, OutputError
from ffgym.pipeline.folder import RunFolder, is_finished, read_record
from ffgym.search.log import read_log

pytestmark = pytest.mark.usefixtures("only_builtins")

TRACKED = {"enabled": True}
SAME = ("allocation.json", "policy.json", "report.json", "report.md", "losses.json")
LOGS = ("episodes.jsonl", "episodes-random.jsonl")


def config(folder: Path, **changes: dict[str, Any]) -> RunConfig:
    output = changes.pop("output", {})
    return glass_config(folder, output={"dir": str(folder / "out"), **output}, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody interrupted."""
    return go(config(tmp_path_factory.mktemp("whole")))[0].folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, hooked_episodes: Any) -> Path:
    """The folder of a run that was interrupted in its sixth episode."""
    folder, count = tmp_path_factory.mktemp("stopped"), iter(range(6))
    with hooked_episodes(lambda: next(count) == 5 and ctrl_c()), pytest.raises(KeyboardInterrupt):
        go(config(folder))
    return folder / "out"


def episodes(folder: Path, name: str) -> str:
    """A log's episodes, bit for bit; repr shows every bit of a float."""
    return repr([(e.action.tolist(), {**vars(e), "action": None}) for e in read_log(folder / name).episodes])


def assert_same(one: Path, other: Path) -> None:
    for name in SAME:
        assert (one / name).read_text() == (other / name).read_text(), name
    for name in LOGS:
        assert episodes(one, name) == episodes(other, name), name
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]


# it goes on


def test_it_ends_with_the_numbers_of_an_uninterrupted_run_and_measures_nothing_twice(
    whole: Path, tmp_path: Path, steps: list[int]
) -> None:
    out = tmp_path / "out"
    for after in (PER_UPDATE, EPISODES - 1, EPISODES + 2):  # between updates, within one, in the random baseline
        steps[0] = after
        with pytest.raises(KeyboardInterrupt) as stop:
            go(config(tmp_path), resume=out if out.exists() else None)
        again = f"ffgym.run(config, resume={str(out)!r})"
        assert stop.value.__notes__ == [f"in Python, continue where it stopped: {again}"]
    steps[0] = 10**6
    result, said = go(config(tmp_path), resume=out)
    assert len(steps) - 1 == 2 * EPISODES
    assert_same(result.folder, whole)
    assert f"{EPISODES} episodes of earlier sessions are read from episodes.jsonl" in said


def test_one_that_follows_slopes_first_ends_the_same_too(tmp_path: Path, steps: list[int]) -> None:
    slopes = {"agent": {"name": "reinforce"}, "search": {"episodes": 16}}
    whole, _ = go(config(tmp_path / "whole", **slopes))
    for number, after in enumerate((1, 3)):  # in the second slope, and while exploring
        steps[:] = [after]
        with pytest.raises(KeyboardInterrupt):
            go(config(tmp_path, **slopes), resume=tmp_path / "out" if number else None)
    steps[:] = [10**6]
    result, _ = go(config(tmp_path, **slopes), resume=tmp_path / "out")
    assert_same(result.folder, whole.folder)


def test_a_search_does_not_go_on_with_another_edition_of_a_plugin(stopped: Path, tmp_path: Path) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "editions": {"reward": 2}}))
    with pytest.raises(OutputError, match=r"the plugin named in \[reward\] has changed .* \(edition 2 then, 1 now\)"):
        go(config(tmp_path), resume=out)
    assert (out / "episodes.jsonl").read_bytes() == (stopped / "episodes.jsonl").read_bytes()


def test_a_search_does_not_go_on_with_another_model_or_text(tmp_path: Path, steps: list[int]) -> None:
    home = shutil.copytree(glass_home(), tmp_path / "home")
    texts = {role: str(home / "c4.txt") for role in ("calibration", "search")}
    settings = config(tmp_path, model={"name": str(home / "glass")}, data=texts)
    steps[0] = PER_UPDATE
    with pytest.raises(KeyboardInterrupt):
        go(settings)
    steps[0] = 10**6
    text, weights = home / "c4.txt", home / "glass" / "model.safetensors"
    others = {name: 1.01 * tensor for name, tensor in load_file(weights).items()}
    log = (tmp_path / "out" / "episodes.jsonl").read_bytes()
    for changed, file, other in (
        ("calibration text and search text", text, text.read_text("utf-8")[100:].encode()),
        ("model weights", weights, save(others, {"format": "pt"})),
    ):
        before = file.read_bytes()
        file.write_bytes(other)
        for _ in range(2):  # what the first refusal has seen is not what the run began with
            with pytest.raises(OutputError, match=f"cannot go on: its {changed} changed since it began"):
                go(settings, resume=tmp_path / "out")
            assert (tmp_path / "out" / "episodes.jsonl").read_bytes() == log
        file.write_bytes(before)
    weights.write_bytes(other)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    del record["inputs"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    go(settings, resume=tmp_path / "out")  # as a run of an earlier version does, whose record lacks them


# it is finished


def finished(config: RunConfig, folder: Path) -> tuple[ffgym.RunResult, str]:
    console = Console(file=io.StringIO(), width=200)
    result = ffgym.run(config, progress=console, resume=folder)
    assert result.found is None
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_nothing_is_done(tmp_path: Path) -> None:
    root = new_store(tmp_path / "mlruns")
    whole, _ = go(config(tmp_path, tracking=TRACKED))
    before = snapshot(tmp_path)
    result, said = finished(config(tmp_path, tracking=TRACKED), whole.folder)
    assert said == f"the run in {whole.folder} is finished: there is nothing left to do\n"
    assert snapshot(tmp_path) == before
    assert runs(root)[0].info.status == "FINISHED"
    now, then = result.to_json(), whole.to_json()
    assert now == {key: then[key] for key in now}
    assert now.keys() >= {"table", "allocation", "folder", "model", "mlflow_run"}
    assert (result.table, result.saved) == (whole.table, whole.saved)
    assert result._repr_markdown_() == (whole.folder / "report.md").read_text(), "what a notebook shows"


def test_the_command_prints_what_a_finished_run_came_to(whole: Path) -> None:
    done = CliRunner().invoke(app, ["run", "--resume", str(whole)])
    assert done.exit_code == 0, done.stderr
    assert "is finished" in done.stderr
    assert "lowest perplexity of the pruned rows" in done.stdout
    assert f"Results and pictures: {whole}" in done.stdout
    assert f"from_pretrained('{whole / 'model'}'" in done.stdout
    done = CliRunner().invoke(app, ["run", "--resume", str(whole), "--json"])
    assert json.loads(done.stdout)["model"] == str(whole / "model")


@pytest.mark.parametrize("lost", ["the table", "the model, noted by nobody"])
def test_what_a_finished_run_has_lost_comes_out_the_same_without_an_episode(
    whole: Path, tmp_path: Path, steps: list[int], lost: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    if "model" in lost:
        shutil.rmtree(folder / "model")
    else:
        (folder / "report.json").unlink()
    assert not is_finished(folder, config(tmp_path))
    if "nobody" in lost:
        (folder / "run.json").write_text("{}")
    (folder / ".model.part-0123abcd").mkdir()
    again, said = go(config(tmp_path), resume=folder)
    assert ("the search of this run is complete; only the later steps are done again" in said) == ("model" in lost)
    assert len(steps) == 1
    assert_same(again.folder, whole)
    assert not list(again.folder.glob(".model*"))


def test_a_run_is_finished_when_mlflow_knows_it_too(tmp_path: Path) -> None:
    root, due = new_store(tmp_path / "mlruns"), ["INSERT INTO metrics"]

    def executed(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if due and statement.startswith(due[0]) and "result/perplexity" in str(parameters):
            due.clear()
            os.kill(os.getpid(), signal.SIGINT)

    event.listen(Engine, "before_cursor_execute", executed)
    try:
        with pytest.raises(KeyboardInterrupt):
            go(config(tmp_path, tracking=TRACKED))
    finally:
        event.remove(Engine, "before_cursor_execute", executed)
    go(config(tmp_path, tracking=TRACKED), resume=tmp_path / "out")
    (run,) = runs(root)
    assert run.info.status == "FINISHED"
    assert "result/perplexity" in run.data.metrics
    finished(config(tmp_path, tracking=TRACKED), tmp_path / "out")


# it goes on, whatever changed


def test_the_output_may_change_and_a_model_that_was_not_wanted_may_be_wanted_later(
    whole: Path, stopped: Path, tmp_path: Path, steps: list[int]
) -> None:
    out = Path(shutil.copytree(stopped, tmp_path / "out"))
    with pytest.raises(OutputError, match=r"resumed in its own folder, .*, and output\.dir = '.*elsewhere' is another"):
        go(config(tmp_path, output={"dir": str(tmp_path / "elsewhere")}), resume=out)
    unwanted = config(tmp_path, output={"overwrite": True, "save_model": False})
    go(unwanted, resume=out)
    finished(unwanted, out)
    assert not (out / "model").exists()
    del steps[1:]
    go(config(tmp_path), resume=out)
    assert len(steps) == 1
    assert_same(out, whole)
    finished(config(tmp_path), out)


def test_a_folder_that_was_moved_is_resumed_where_it_is(whole: Path, stopped: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(stopped, tmp_path / "moved"))
    result, _ = go(config(stopped.parent), resume=moved)
    assert result.folder == moved
    assert_same(moved, whole)


# MLflow


def test_the_mlflow_run_goes_on_and_has_every_episode_once(tmp_path: Path, steps: list[int]) -> None:
    root = new_store(tmp_path / "mlruns")
    for after, resumed in ((6, None), (EPISODES + 5, tmp_path / "out")):  # within an update, in the random baseline
        steps[0] = after
        with pytest.raises(KeyboardInterrupt):
            go(config(tmp_path, tracking=TRACKED), resume=resumed)
        (killed,) = runs(root)
        assert killed.info.status == "KILLED"
        assert read_record(tmp_path / "out").mlflow_run == killed.info.run_id
    steps[0] = 10**6
    result, _ = go(config(tmp_path, tracking=TRACKED), resume=tmp_path / "out")
    (run,) = runs(root)
    assert result.mlflow_run == run.info.run_id == killed.info.run_id
    assert run.info.status == "FINISHED"
    for prefix, name in (("search", "episodes.jsonl"), ("search/random", "episodes-random.jsonl")):
        history = client(root).get_metric_history(run.info.run_id, f"{prefix}/reward")
        logged = {point.step: point.value for point in history}
        assert len(history) == EPISODES, "none twice, none left out"
        assert logged == {e.index: e.reward for e in read_log(result.folder / name).episodes}
    moved = client(root).get_metric_history(run.info.run_id, "search/policy/step")
    assert [point.step for point in moved] == list(range(PER_UPDATE - 1, EPISODES, PER_UPDATE))
    assert len(run.inputs.dataset_inputs) == 3


@pytest.mark.parametrize(
    ("stop", "failure", "ended"),
    [
        (KeyboardInterrupt(), None, "It was interrupted."),
        (DataError("the disk ate it"), "DataError: the disk ate it", "It failed: DataError: the disk ate it"),
    ],
    ids=["Ctrl-C", "an error"],
)
def test_what_stopped_a_run_after_its_search_costs_no_episode_and_is_forgotten(
    tmp_path: Path, steps: list[int], stop: BaseException, failure: str | None, ended: str
) -> None:
    root, tracked = new_store(tmp_path / "mlruns"), config(tmp_path, tracking=TRACKED)
    with pytest.raises(type(stop)):
        ffgym.run(tracked, progress=stopping("report: dense: done", stop))
    tags = runs(root)[0].data.tags
    assert tags.get("ffgym.failure") == failure
    assert tags["ffgym.resume"] == f"ffgym run --resume {tmp_path / 'out'}"
    assert read_record(tmp_path / "out").ended == ended
    result, _ = go(tracked, resume=tmp_path / "out")
    assert len(steps) - 1 == 2 * EPISODES
    assert result.saved is not None
    (run,) = runs(root)
    assert run.info.status == "FINISHED"
    assert "ffgym.failure" not in run.data.tags
    assert read_record(tmp_path / "out").ended == ""


@pytest.mark.parametrize("lost", ["another store", "the note"])
def test_without_its_mlflow_run_a_new_one_gets_everything(tmp_path: Path, steps: list[int], lost: str) -> None:
    root = new_store(tmp_path / "mlruns")
    steps[0] = 6
    with pytest.raises(KeyboardInterrupt):
        go(config(tmp_path, tracking=TRACKED))
    old = read_record(tmp_path / "out").mlflow_run
    if lost == "another store":
        root = new_store(tmp_path / "others")
    else:
        (tmp_path / "out" / "run.json").unlink()
    steps[0] = 10**6
    tracked = {**TRACKED, "root": str(root)}
    result, _ = go(config(tmp_path, tracking=tracked), resume=tmp_path / "out")
    assert result.mlflow_run not in (None, old)
    assert read_record(tmp_path / "out").mlflow_run == result.mlflow_run
    assert len(client(root).get_metric_history(result.mlflow_run, "search/reward")) == EPISODES


def test_a_session_without_tracking_does_not_lose_the_mlflow_run(tmp_path: Path, steps: list[int]) -> None:
    root = new_store(tmp_path / "mlruns")
    for enabled, resumed in ((True, None), (False, tmp_path / "out")):
        steps[0] = len(steps) + 2
        with pytest.raises(KeyboardInterrupt):
            go(config(tmp_path, tracking={"enabled": enabled}), resume=resumed)
    steps[0] = 10**6
    result, _ = go(config(tmp_path, tracking=TRACKED), resume=tmp_path / "out")
    (run,) = runs(root)
    assert result.mlflow_run == run.info.run_id
    assert len(client(root).get_metric_history(result.mlflow_run, "search/reward")) == EPISODES


def test_a_run_is_never_made_of_two_dtypes(tmp_path: Path, steps: list[int]) -> None:
    """``auto`` follows the processor, and the next session may have another one."""
    model = {**glass_tables(tmp_path)["model"], "dtype": other_dtype()}
    whole, _ = go(config(tmp_path / "whole", model=model))
    began = config(tmp_path, model=model)
    steps[0] = len(steps) + 4
    with pytest.raises(KeyboardInterrupt):
        go(began)
    steps[0] = 10**6
    result, said = go(chosen_by_auto(began), resume=tmp_path / "out")
    assert f"{other_dtype()} on cpu" in said
    assert [e.loss for e in result.found.history] == [e.loss for e in whole.found.history]


def test_a_run_of_a_folder_never_goes_on_with_the_hubs_model_of_that_name(
    tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(glass_home() / "glass", tmp_path / "models" / "mine")
    began = config(tmp_path, model={"name": "models/mine"})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    steps[0] = len(steps) + 4
    with pytest.raises(KeyboardInterrupt):
        go(began)
    steps[0] = 10**6
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="leads nowhere from here; it was ~/models/mine where the run began"):
        go(began, resume=tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    go(began, resume=tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out/model/ffgym.json").read_text(), "the model may be published"


def test_a_folder_belongs_to_one_run_at_a_time(stopped: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(stopped, tmp_path / "out"))
    half = out / ".model.part-0123abcd"
    half.mkdir()
    with RunFolder(out, resumed=True).lock(), pytest.raises(OutputError, match="another run is writing into"):
        go(config(tmp_path), resume=out)
    assert half.exists(), "the run that is alive goes on writing it"
    go(config(tmp_path), resume=out)
    assert not half.exists(), "nobody goes on writing it"
    assert not (out / ".lock").exists()


# what cannot go on


def test_a_log_of_another_search_is_refused_and_kept(stopped: Path, tmp_path: Path, steps: list[int]) -> None:
    steps[0] = 5
    with pytest.raises(KeyboardInterrupt):
        go(config(tmp_path, seed=1, output={"dir": str(tmp_path / "other")}))
    steps[0] = 10**6
    log = Path(shutil.copytree(stopped, tmp_path / "out")) / "episodes.jsonl"
    shutil.copy(tmp_path / "other" / "episodes.jsonl", log)
    before = log.read_text()
    with pytest.raises(DataError, match=r"episode \d of .*episodes\.jsonl differs from what this search proposes"):
        go(config(tmp_path), resume=tmp_path / "out")
    assert log.read_text() == before
    assert (tmp_path / "out" / "config.toml").exists()


# the command


def toml(folder: Path, **changes: dict[str, Any]) -> str:
    path = folder / "run.toml"
    output = {"dir": str(folder / "out")}
    path.write_text(tomli_w.dumps(glass_tables(folder, output=output, **changes)), encoding="utf-8")
    return str(path)


def test_the_folder_alone_or_the_same_command_with_it(whole: Path, tmp_path: Path, steps: list[int]) -> None:
    file = toml(tmp_path)
    for after, arguments in ((3, []), (6, ["--resume", str(tmp_path / "out")])):
        steps[0] = after
        done = CliRunner().invoke(app, ["run", "--config", file, *arguments])
        assert done.exit_code == 130, done.stderr
        assert f"continue where it stopped: ffgym run --resume {tmp_path / 'out'}" in done.stderr
    steps[0] = 10**6
    done = CliRunner().invoke(app, ["run", "--resume", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "out")
    assert "6 episodes of earlier sessions are read from episodes.jsonl" in done.stderr
    assert len(steps) - 1 == 2 * EPISODES
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--resume", "{whole}", "--sparsity", "0.3"], "has prune.sparsity = 0.2, this one 0.3"),
        (["--resume", "{whole}", "--seed", "1"], "has seed = 0, this one 1"),
        (["--resume", "{whole}", "--set", "agent.spread=0.3"], "has agent.spread = 0.15, this one 0.3"),
        (["--resume", "{whole}", "--sparsity", "0.3", "--set", "data.window=32"], "has data.window = 64, this one 32"),
        (["--resume", "{whole}", "--agent", "random"], "has agent.name = 'reinforce', this one 'random'"),
        (["--resume", "{whole}", "--recover", "lora"], "then train its model by `ffgym recover"),
        (["--resume", "{tmp}/nowhere"], "there is no run in"),
        (["--resume", "{whole}/model"], "is the folder of a saved model"),
        (["--output", "{whole}"], "exists and is not empty"),
    ],
)
def test_what_cannot_go_on_is_a_message_and_a_hint(
    whole: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    filled = [text.format(whole=whole, tmp=tmp_path) for text in arguments]
    done = CliRunner().invoke(app, ["run", *filled])
    assert (done.exit_code, done.stdout) == (1, "")
    assert complaint in done.stderr
    assert "hint: " in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_killed_process_goes_on(tmp_path: Path, hooked_episodes: Any) -> None:
    """SIGKILL leaves nothing but what was written: the log of episodes and the configuration."""
    new_store(tmp_path / "mlruns")
    tracked = config(tmp_path, tracking=TRACKED, search={"random_baseline": False})
    log = tmp_path / "out" / "episodes.jsonl"

    def killed() -> None:
        with hooked_episodes(lambda: lines(log) > PER_UPDATE and os.kill(os.getpid(), signal.SIGKILL)):
            go(tracked)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    result, _ = go(tracked, resume=tmp_path / "out")
    assert len(result.found.history) == EPISODES
    history = client(tmp_path / "mlruns").get_metric_history(result.mlflow_run, "search/reward")
    assert sorted(point.step for point in history) == list(range(EPISODES))
