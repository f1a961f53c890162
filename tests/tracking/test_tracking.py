import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import made_up_episodes
import numpy as np
import pytest
from filelock import FileLock
from mlflow import MlflowClient
from mlflow_store import client, new_store
from processes import PATIENCE
from sqlalchemy import event
from sqlalchemy.engine import Engine
from typer.testing import CliRunner

from ffgym.cli.app import app
from ffgym.errors import TrackingError
from ffgym.tracking.names import Result
from ffgym.tracking.runs import list_runs
from ffgym.tracking.store import fetch_artifact
from ffgym.tracking.tracker import Tracker, environment_tags
from ffgym.types import Episode, Update


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return new_store(tmp_path / "ml runs")


def run_of(root, tracker):
    return client(root).get_run(tracker.run_id)


def episode(index: int, **changes) -> Episode:
    made_up = made_up_episodes.episode(index, index // 8, 0.5 + index / 100)
    return replace(made_up, **{"loss": 3.0, "dense_loss": 2.9, **changes})


def test_a_run_that_ends_is_finished_and_its_artifacts_lie_under_the_root(root):
    with Tracker(root, "ffgym", "my run", command="ffgym run") as tracker:
        tracker.log_config({"seed": 0}, "seed = 0\n")
    run = run_of(root, tracker)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "my run"
    assert run.data.tags["mlflow.source.name"] == "ffgym run"
    assert run.data.tags["mlflow.user"]
    assert run.info.artifact_uri.startswith(str(root / "artifacts"))
    assert (root / "artifacts" / tracker.run_id / "artifacts" / "config.toml").read_text() == "seed = 0\n"


@pytest.mark.parametrize(
    ("reason", "status", "tag"),
    [(ValueError("NaN in layer 3"), "FAILED", "ffgym.failure"), (KeyboardInterrupt(), "KILLED", "ffgym.interruption")],
)
def test_a_run_that_ended_early_says_why_and_how_to_go_on_and_forgets_it_when_it_does(root, reason, status, tag):
    command = "ffgym run --resume runs/mine"

    def end_early(tracker):
        tracker.describe("what it is")
        raise reason

    with pytest.raises(type(reason)), Tracker(root, "ffgym", "run", again=command) as tracker:
        end_early(tracker)
    run = run_of(root, tracker)
    tags = run.data.tags
    assert run.info.status == status
    assert {"ffgym.failure", "ffgym.interruption"} & tags.keys() == {tag}
    assert tags["ffgym.resume"] == command
    page = tags["mlflow.note.content"]
    assert page.startswith(
        "**Failed:** ValueError: NaN" if isinstance(reason, ValueError) else "**Interrupted:** Ctrl-C"
    )
    assert f"$ {command}" in page
    assert page.endswith("what it is")
    with Tracker(root, "ffgym", "run", resume=tracker.run_id) as tracker:
        assert "mlflow.note.content" not in run_of(root, tracker).data.tags
        tracker.describe("what came out")
    tags = run_of(root, tracker).data.tags
    assert tags["mlflow.note.content"] == "what came out"
    assert not {"ffgym.resume", "ffgym.failure", "ffgym.interruption"} & tags.keys()


def test_the_machines_load_is_logged_from_time_to_time(root, monkeypatch):
    now = time.monotonic
    with Tracker(root, "ffgym", "run") as tracker:
        monkeypatch.setattr(time, "monotonic", lambda: now() + 3600)
        tracker.log_episode(episode(0))
    assert 0 < run_of(root, tracker).data.metrics["system/system_memory_usage_percentage"] < 100


@pytest.fixture
def ctrl_c_after():
    """Makes Ctrl-C come once, right after a statement of SQL that begins with given words has been executed."""
    due = []

    def executed(connection, cursor, statement, *_):
        if due and statement.startswith(due[0]):
            due.clear()
            os.kill(os.getpid(), signal.SIGINT)

    event.listen(Engine, "after_cursor_execute", executed)
    yield due.append
    event.remove(Engine, "after_cursor_execute", executed)
    assert not due, "that was never executed"


def test_ctrl_c_in_the_middle_of_a_write_does_not_leave_the_store_locked(root, ctrl_c_after):
    ctrl_c_after("INSERT INTO metrics")
    with pytest.raises(KeyboardInterrupt), Tracker(root, "ffgym", "run") as tracker:
        tracker.log_episode(episode(0))
    run = run_of(root, tracker)
    assert run.info.status == "KILLED"
    assert run.data.metrics["search/reward"] == 0.5
    with Tracker(root, "ffgym", "next"):
        pass


@pytest.mark.parametrize("words", ["INSERT INTO runs", "UPDATE runs"], ids=["new", "resumed"])
def test_ctrl_c_while_a_run_is_opened_marks_it_killed(root, ctrl_c_after, words):
    with Tracker(root, "ffgym", "run") as first:
        pass
    tracker = Tracker(root, "ffgym", "run", resume=first.run_id if words.startswith("UPDATE") else None)
    ctrl_c_after(words)
    with pytest.raises(KeyboardInterrupt), tracker:
        raise AssertionError("interrupted before")
    assert (tracker.run_id == first.run_id) == words.startswith("UPDATE")
    assert run_of(root, tracker).info.status == "KILLED"


def test_parameters_are_cut_and_keep_their_first_value(root):
    with Tracker(root, "ffgym", "run") as tracker:
        tracker.log_config({"seed": 0, "search": {"episodes": 96}, "criterion": {"long": "x" * 7000}}, "a")
        tracker.log_config({"seed": 1, "data": {str(i): i for i in range(250)}}, "b")
    params = run_of(root, tracker).data.params
    assert params["seed"] == "0"
    assert params["episodes"] == "96"
    assert params["toml.criterion.long"] == "x" * 6000
    assert params["toml.data.249"] == "249"


def log_search(tracker, count):
    for index in range(count):
        tracker.log_episode(episode(index))
        if index % 4 == 3:
            tracker.log_update(Update(index // 4, np.zeros(4), {"policy/spread": 0.1 * index}), index)


def test_a_resumed_run_goes_on_and_no_episode_is_logged_twice(root):
    """Two updates were logged, and a replay hands all of them over again."""
    with Tracker(root, "ffgym", "run") as first:
        first.log_config({"seed": 0}, "a")
        log_search(first, 8)
    with Tracker(root, "ffgym", "run", resume=first.run_id) as second:
        assert second.run_id == first.run_id
        assert run_of(root, second).info.status == "RUNNING"
        second.log_config({"seed": 1, "more": 2}, "b")
        log_search(second, 12)
        second.log_episode(episode(0), search="search/random")
    run = run_of(root, second)
    assert run.info.status == "FINISHED"
    assert (run.data.params["seed"], run.data.params["toml.more"]) == ("0", "2")
    for metric, steps in (
        ("search/reward", list(range(12))),
        ("search/policy/spread", [3, 7, 11]),
        ("search/random/reward", [0]),
    ):
        assert [point.step for point in client(root).get_metric_history(run.info.run_id, metric)] == steps


def test_a_run_that_is_resumed_again_and_again_logs_every_figure_once(root):
    """It was killed after its result had been logged, and each session comes to that result again."""
    run_id = None
    for session in range(3):
        with Tracker(root, "ffgym", "run", resume=run_id) as tracker:
            tracker.log_result(Result(math.nan, seconds=3.0))
            if session:
                tracker.log_result(Result(30.0), step=1)
        run_id = tracker.run_id
    history = client(root).get_metric_history(run_id, "result/perplexity")
    assert [(point.step, math.isnan(point.value)) for point in history] == [(0, True), (1, False)]
    assert len(client(root).get_metric_history(run_id, "result/seconds")) == 1


def test_a_figure_that_came_out_otherwise_in_a_later_session_is_logged(root):
    with Tracker(root, "ffgym", "run") as first:
        first.log_result(Result(20.0))
    with Tracker(root, "ffgym", "run", resume=first.run_id) as second:
        second.log_result(Result(20.5))
    assert run_of(root, second).data.metrics["result/perplexity"] == 20.5


@pytest.mark.parametrize("gone", ["0" * 32, "not an id", "deleted"])
def test_where_there_is_no_run_to_go_on_with_a_new_one_is_made(root, gone):
    if gone == "deleted":
        with Tracker(root, "ffgym", "run") as first:
            pass
        client(root).delete_run(first.run_id)
        gone = first.run_id
    with Tracker(root, "ffgym", "run", resume=gone) as second:
        second.log_episode(episode(0))
    assert second.run_id != gone
    assert run_of(root, second).info.status == "FINISHED"
    assert len(client(root).get_metric_history(second.run_id, "search/reward")) == 1


def test_episodes_become_curves_by_step(root):
    with Tracker(root, "ffgym", "run") as tracker:
        for index in range(8):
            tracker.log_episode(episode(index))
        tracker.log_episode(episode(8), search="search/random")
    history = client(root).get_metric_history(tracker.run_id, "search/reward")
    assert [(metric.step, metric.value) for metric in history] == [(i, 0.5 + i / 100) for i in range(8)]
    metrics = run_of(root, tracker).data.metrics
    assert metrics["search/perplexity"] == pytest.approx(math.exp(3.0))
    assert metrics["search/nats_above_dense"] == pytest.approx(0.1)
    assert metrics["search/random/reward"] == 0.58


def test_what_never_moves_is_no_curve_and_what_moves_late_is_drawn_from_its_start(root):
    with Tracker(root, "ffgym", "run") as tracker:
        for index in range(4):
            tracker.log_episode(episode(index, failed=index > 2))
            tracker.log_update(Update(index, np.zeros(1), {"policy/spread": 0.2}), index)
    names = {name for name in run_of(root, tracker).data.metrics if not name.startswith("system/")}
    assert names == {f"search/{name}" for name in ("reward", "perplexity", "nats_above_dense", "failed")}
    failed = client(root).get_metric_history(tracker.run_id, "search/failed")
    assert [(point.step, point.value) for point in failed] == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 1.0)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1000.0])
def test_a_failed_episode_is_recorded_and_not_as_a_huge_number(root, loss):
    with Tracker(root, "ffgym", "run") as tracker:
        tracker.log_episode(episode(0, loss=loss, reward=0.0, failed=True))
    assert math.isnan(run_of(root, tracker).data.metrics["search/perplexity"])


def test_more_metrics_than_one_batch_takes(root):
    with Tracker(root, "ffgym", "run") as tracker:
        tracker.log_metrics([("many", float(i), i) for i in range(2500)])
    assert len(client(root).get_metric_history(tracker.run_id, "many")) == 2500


# The first digests are those that another run is about to log as well.
ONE_OF_TWO = """
import os, sys, time
from pathlib import Path
from ffgym.tracking import tracker
assert not {"mlflow", "torch"} & sys.modules.keys()
root, own, other = map(Path, sys.argv[1:])

def wait_for_the_other(step):
    own.with_suffix(step).touch()
    while not other.with_suffix(step).exists():
        time.sleep(0.01)

os.umask(0o002)
wait_for_the_other(".started")
with tracker.Tracker(root, "ffgym", "one of two", notify=lambda line: None) as run:
    wait_for_the_other(".open")
    for number in range(20):
        run.log_dataset(name="text", context="search", digest=str(number), corpus="demo", tokens=3)
"""


def test_runs_that_start_at_once_make_a_store_together(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here, marks = tmp_path / "here", (tmp_path / "one", tmp_path / "other")
    here.mkdir()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": here}
    both = [  # with warnings as errors, as some projects run their tests: MLflow uses what SQLAlchemy deprecates
        subprocess.Popen([sys.executable, "-W", "error", "-c", ONE_OF_TWO, here / "new", *own], **options)
        for own in (marks, marks[::-1])
    ]
    try:
        assert [(*each.communicate(timeout=PATIENCE), each.returncode) for each in both] == [("", "", 0)] * 2
    finally:
        for each in both:
            each.kill()
    assert sorted(path.name for path in here.iterdir()) == ["new"]
    assert sorted(path.name for path in (here / "new").iterdir()) == ["artifacts", "mlflow.db"]
    assert all(path.stat().st_mode & 0o020 for path in (here / "new").iterdir()), "a group may share it, as umask says"
    runs = client(here / "new").search_runs([client(here / "new").get_experiment_by_name("ffgym").experiment_id])
    assert [len(run.inputs.dataset_inputs) for run in runs] == [20] * 2


KILLED_MAKING_TABLES = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from ffgym.tracking.tracker import Tracker

steps = []

@event.listens_for(Engine, "before_cursor_execute")
def kill(connection, cursor, statement, *_):
    steps.extend([statement] * statement.startswith("UPDATE alembic_version"))
    if len(steps) == 10:
        os.kill(os.getpid(), signal.SIGKILL)

Tracker(Path(sys.argv[1]), "ffgym", "killed").__enter__()
"""


def test_a_run_starts_where_another_was_killed_as_it_made_the_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    killed = subprocess.run([sys.executable, "-c", KILLED_MAKING_TABLES, tmp_path / "new"], cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    with Tracker(tmp_path / "new", "ffgym", "next") as tracker:
        pass
    assert run_of(tmp_path / "new", tracker).info.status == "FINISHED"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["artifacts", "mlflow.db"]


def test_an_experiment_that_another_run_has_just_made_is_taken(root, monkeypatch):
    with Tracker(root, "ffgym", "first") as first:
        pass
    look, answers = MlflowClient.get_experiment_by_name, [None]
    monkeypatch.setattr(
        MlflowClient, "get_experiment_by_name", lambda self, name: answers.pop() if answers else look(self, name)
    )
    with Tracker(root, "ffgym", "second") as second:
        pass
    assert run_of(root, second).info.experiment_id == run_of(root, first).info.experiment_id


def test_a_run_says_that_another_makes_its_store_and_waits_until_it_has(root):
    whole = root / "mlflow.db"
    being_made = whole.rename(root / "being made")
    other = FileLock(root / "mlflow.lock")
    other.acquire()
    said = []

    def notify(line):
        said.append(line)
        being_made.rename(whole)
        other.release()

    with Tracker(root, "ffgym", "run", notify=notify) as tracker:
        pass
    assert said == [f"waiting for another run, which makes the MLflow store {whole}"]
    assert run_of(root, tracker).info.status == "FINISHED"


def test_a_point_of_a_range_is_a_finished_child_however_often_it_is_logged(root):
    with Tracker(root, "ffgym", "run") as tracker:
        for perplexity in (30.0, 31.0):
            tracker.log_child("sparsity 20.0%", {"agent": "ppo", "sparsity": "0.2"}, Result(perplexity, 20.0))
    child, parent = list_runs(root)
    assert (child.name, child.status, child.parent) == ("run: sparsity 20.0%", "finished", parent.id)
    assert (child.agent, child.sparsity, child.result, child.ratio) == ("ppo", 0.2, 30.0, 1.5)


def test_a_point_of_a_range_that_broke_has_no_huge_number(root):
    with Tracker(root, "ffgym", "run") as tracker:
        tracker.log_child("sparsity 50.0%", {"agent": "ppo"}, Result(math.inf, 20.0))
    assert math.isnan(list_runs(root)[0].result)


def test_files_and_folders_become_artifacts(root, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "state.npz").write_bytes(b"1")
    with Tracker(root, "ffgym", "run") as tracker:
        tracker.log_artifact(tmp_path / "policy")
        tracker.log_artifact(tmp_path / "policy" / "state.npz")
    stored = root / "artifacts" / tracker.run_id / "artifacts"
    assert (stored / "policy" / "state.npz").read_bytes() == b"1"
    assert (stored / "state.npz").read_bytes() == b"1"


def saved_model(home):
    """What the folder of a saved model looks like to MLflow."""
    folder = home / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("copied", [True, False])
def test_a_saved_model_is_a_logged_model_once_and_a_large_one_stays_where_it_is(root, tmp_path, copied):
    folder = saved_model(tmp_path)
    if not copied:
        os.truncate(folder / "model.safetensors", 2 * 10**9)  # without taking any room
    with Tracker(root, "ffgym", "a 20 % run") as tracker:
        tracker.log_params({"agent": "ppo"})
        tracker.log_result(Result(30.0))
        for _ in range(2):
            tracker.log_model(folder)
    run = run_of(root, tracker)
    (logged,) = client(root).search_logged_models([run.info.experiment_id])
    assert (logged.name, str(logged.status), logged.params) == ("a 20 _ run model", "READY", {"agent": "ppo"})
    assert [(metric.key, metric.value) for metric in logged.metrics] == [("result/perplexity", 30.0)]
    assert len(client(root).get_metric_history(tracker.run_id, "result/perplexity")) == 1
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    assert logged.tags["ffgym.folder"] == str(folder)
    assert logged.tags.get("mlflow.model.isExternal") == (None if copied else "true")
    assert (Path(logged.artifact_location) / "model" / "model.safetensors").exists() == copied


def test_tags_name_what_a_result_depends_on(root):
    tags = environment_tags(device="cpu", dtype="bfloat16", threads=2, plugins={"criterion.wanda": "ffgym 0.1.0"})
    assert tags.keys() >= {"version.ffgym", "version.torch", "version.transformers", "device", "threads"}
    assert tags["plugin.criterion.wanda"] == "ffgym 0.1.0"
    with Tracker(root, "ffgym", "run") as tracker:
        tracker.set_tags(tags | {"long": "x" * 20_000})
    assert run_of(root, tracker).data.tags.items() >= tags.items()


def test_a_disabled_tracker_takes_every_call_and_any_root_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Tracker(Path("https://example.org"), "ffgym", "run", enabled=False) as tracker:
        tracker.log_config({"seed": 0}, "")
        tracker.log_episode(episode(0))
        tracker.log_metrics([("a", 1.0, 0)])
        tracker.log_dataset(name="a", context="search", digest="b", corpus="c", tokens=1)
        tracker.log_artifact(tmp_path)
        tracker.set_tags({"a": "b"})
    assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_the_environment_variable_wins(root, tmp_path, monkeypatch):
    other = new_store(tmp_path / "other") / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    with Tracker(root / "unused", "ffgym", "run") as tracker:
        tracker.set_tags({"a": "b"})
    assert run_of(root, tracker).info.status == "FINISHED"
    assert not (root / "unused").exists()


def test_a_server_that_does_not_answer_is_an_error_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:sec@ret@127.0.0.1:9?token=secret")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI") as caught, Tracker(tmp_path, "ffgym", "run"):
        pass
    assert not re.search("sec|ret@", str(caught.value))


@pytest.mark.parametrize(
    ("uri", "package"),
    [
        ("postgresql+psycopg2://me:sec/r@et@127.0.0.1/db", "psycopg2-binary"),
        ("mysql://me:sec/r@et@127.0.0.1/db", "mysqlclient"),
        ("mssql+pyodbc://me:sec/r@et@127.0.0.1/db?token=sec", "pyodbc"),
    ],
)
def test_a_database_without_its_driver_says_what_to_install(tmp_path, monkeypatch, uri, package):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=f"pip install {package}") as caught:
        Tracker(tmp_path, "ffgym", "run").__enter__()
    assert "127.0.0.1/db" in str(caught.value)
    assert "sec" not in str(caught.value)


def test_an_address_that_is_none_is_refused_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host:port/db")
    with pytest.raises(TrackingError, match="no address of a database") as caught, Tracker(tmp_path, "ffgym", "run"):
        pass
    assert "secret" not in str(caught.value)


def test_the_reason_of_a_failure_is_stored_without_the_password(root):
    uri = "postgresql://me:se@cr/et@host/db"
    with pytest.raises(ValueError, match="lost"), Tracker(root, "ffgym", "run") as tracker:
        raise ValueError(f"lost {uri}")
    assert run_of(root, tracker).data.tags["ffgym.failure"] == "ValueError: lost postgresql://***@host/db"


def refused(root) -> str:
    """What a newcomer reads when the store cannot be opened; it must not wait for retries of minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: pytest.fail("MLflow tries again and again"))
        with pytest.raises(TrackingError) as caught, Tracker(root, "ffgym", "run"):
            pass
    assert "tracking.root" in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("root")
def test_a_root_that_is_a_file_is_refused_with_its_path(tmp_path):
    (tmp_path / "mlruns").touch()
    assert str(tmp_path / "mlruns" / "mlflow.db") in refused(tmp_path / "mlruns")


@pytest.mark.usefixtures("root")
def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(os.urandom(4096))
    assert "file is not a database" in refused(tmp_path)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("name", ["50%", "what?"])
def test_a_path_that_a_uri_cannot_hold_is_refused(tmp_path, name):
    assert name[-1] in refused(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_store_is_refused(root):
    (root / "artifacts").mkdir()
    for path in (root / "mlflow.db", root):
        path.chmod(0o500)
    try:
        assert str(root) in refused(root)
    finally:
        root.chmod(0o700)


@pytest.mark.parametrize("schema", ["0a8213491aaa", "fffffffffff1"], ids=["older", "unknown"])
def test_a_store_of_another_mlflow_says_how_to_upgrade(root, schema):
    with sqlite3.connect(root / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (schema,))
    with pytest.raises(TrackingError) as listing:
        list_runs(root)
    for said in (refused(root), str(listing.value)):
        assert f"another version of MLflow made it (its schema is {schema}" in said
        assert "mlflow db upgrade" in said
        assert "pip install --upgrade mlflow" in said


def files(folder):
    """Every file of a folder but MLflow's database, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("note.txt")}


@pytest.mark.parametrize("how", ["copied", "moved", "copied, and the original changes its name"])
def test_a_store_that_was_copied_or_moved_keeps_its_artifacts_beside_it(root, tmp_path, how):
    (tmp_path / "note.txt").write_text("first")
    with Tracker(root, "ffgym", "run") as first:
        first.log_artifact(tmp_path / "note.txt")
        first.log_model(saved_model(tmp_path))
    with Tracker(root, "another", "to be resumed") as stopped:
        pass
    here = tmp_path / "else where" / "store"
    here.parent.mkdir()
    shutil.move(root, here) if how == "moved" else shutil.copytree(root, here)
    if how.endswith("name"):
        root = root.rename(tmp_path / "renamed")
    original = files(root)

    assert fetch_artifact(here, first.run_id, "note.txt", tmp_path / "fetched").read_text() == "first"
    (tmp_path / "note.txt").write_text("second")
    for experiment, resume in (("ffgym", None), ("new", None), ("another", stopped.run_id)):
        with Tracker(here, experiment, "run", resume=resume) as second:
            second.log_artifact(tmp_path / "note.txt")
        assert fetch_artifact(here, second.run_id, "note.txt", tmp_path / "fetched").read_text() == "second"
        assert str(here / "artifacts" / second.run_id) in run_of(here, second).info.artifact_uri
    (model,) = client(here).search_logged_models([run_of(here, first).info.experiment_id])
    assert model.artifact_location.startswith(str(here / "artifacts" / "models"))
    assert files(root) == original, "nothing is written into the original"
    assert len(files(here)) == 4
    if how == "copied":
        assert str(root) in run_of(root, first).info.artifact_uri, "the original is as it was"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_copy_that_may_only_be_read_is_read(root, tmp_path):
    (tmp_path / "note.txt").write_text("first")
    with Tracker(root, "ffgym", "run") as first:
        first.log_artifact(tmp_path / "note.txt")
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "mlflow.db").chmod(0o400)
    assert fetch_artifact(copy, first.run_id, "note.txt", tmp_path / "fetched").read_text() == "first"


def test_artifacts_that_were_put_elsewhere_on_purpose_stay_there(root, tmp_path):
    place = tmp_path / "large disk" / "artifacts"
    place.mkdir(parents=True)
    client(root).create_experiment("large", artifact_location=str(place))
    (tmp_path / "note.txt").write_text("first")
    with Tracker(root, "large", "run") as tracker:
        tracker.log_artifact(tmp_path / "note.txt")
    assert (place / tracker.run_id / "artifacts" / "note.txt").read_text() == "first"


def test_a_folder_of_artifacts_that_is_gone_is_not_made_again(root, tmp_path):
    client(root).create_experiment("ffgym", artifact_location=str(tmp_path / "unmounted"))
    assert str(tmp_path / "unmounted") in refused(root)
    assert not (tmp_path / "unmounted").exists()


def test_a_deleted_experiment_is_refused(root):
    with Tracker(root, "ffgym", "run"):
        pass
    client(root).delete_experiment(client(root).get_experiment_by_name("ffgym").experiment_id)
    with pytest.raises(TrackingError, match=r"was deleted\n.*tracking\.experiment"), Tracker(root, "ffgym", "run"):
        pass


def test_an_address_of_no_kind_that_mlflow_knows_is_named(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    with pytest.raises(TrackingError, match=r"nonsense://x.*\n.*Correct MLFLOW_TRACKING_URI"), Tracker(root, "a", "b"):
        pass


@pytest.fixture
def make_trouble(root, small_files):
    """Makes a store that cannot be written, and gives what makes it well again."""
    away, disk = root.with_name("away"), contextlib.ExitStack()

    def fill():
        disk.enter_context(small_files((root / "mlflow.db").stat().st_size))
        return disk.close

    def move():
        root.rename(away)
        return lambda: away.rename(root)

    with disk:
        yield lambda trouble: {"full": fill, "moved": move}[trouble]()


@pytest.mark.parametrize("trouble", ["full", "moved"])
def test_what_a_store_does_not_take_in_mid_run_is_kept_and_sent_by_sync(root, tmp_path, make_trouble, trouble):
    said, folder = [], tmp_path / "my run"
    with Tracker(root, "ffgym", "run", unsent=folder, notify=said.append) as tracker:
        tracker.log_metrics([("search/reward", 0.1, 0)])
        make_well = make_trouble(trouble)
        tracker.log_metrics([(f"metric {index}", 0.0, 0) for index in range(4000)])
        (folder / "note.txt").write_text("kept")
        tracker.log_artifact(folder / "note.txt")
    why = {"full": "disk I/O error", "moved": "the database is not there any more"}
    assert said[0].startswith(f"cannot write to the MLflow store {root / 'mlflow.db'}: {why[trouble]}; the run goes on")
    assert said[1:] == [f"3 records of the MLflow run are still to be sent: ffgym sync '{folder}' --root '{root}'"]
    assert root.exists() == (trouble != "moved"), "it is not made again"
    make_well()
    sent = CliRunner().invoke(app, shlex.split(said[1].partition("ffgym ")[2]))
    assert (sent.exit_code, "3 records sent" in sent.output) == (0, True)
    run = run_of(root, tracker)
    assert run.info.status == "FINISHED"
    assert {"search/reward", "metric 3999"} <= run.data.metrics.keys()
    assert (root / "artifacts" / tracker.run_id / "artifacts" / "note.txt").read_text() == "kept"
    assert os.listdir(folder) == ["note.txt"]


def test_a_run_sends_what_was_kept_once_its_store_takes_it(root, make_trouble, monkeypatch):
    said, now = [], time.monotonic
    with Tracker(root, "ffgym", "run", unsent=root.parent, notify=said.append) as tracker:
        make_well = make_trouble("moved")
        for step in (0, 1):
            tracker.log_metrics([("search/reward", 0.1, step)])
        make_well()
        monkeypatch.setattr(time, "monotonic", lambda: now() + 3600)
        tracker.log_metrics([("search/reward", 0.1, 2)])
        history = client(root).get_metric_history(tracker.run_id, "search/reward")
        assert [point.step for point in history] == [0, 1, 2], "before it ends"
    assert len(said) == 1


def test_a_model_that_was_copied_in_part_is_logged_once(root, tmp_path):
    blocked = root / "artifacts" / "models"
    with Tracker(root, "ffgym", "run", notify=lambda line: None) as tracker:
        blocked.touch()
        tracker.log_model(saved_model(tmp_path))
        blocked.unlink()
    (logged,) = client(root).search_logged_models([run_of(root, tracker).info.experiment_id])
    assert str(logged.status) == "READY"


def test_the_reason_of_a_failure_is_not_hidden_by_a_broken_store(root):
    def fail():
        (root / "mlflow.db").write_bytes(b"broken" * 1000)
        raise ValueError("the real reason")

    with pytest.raises(ValueError, match="the real reason"), Tracker(root, "ffgym", "run"):
        fail()
