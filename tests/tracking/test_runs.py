import json
import math
import re
import time
from datetime import timedelta

import pytest
from mlflow_store import client, new_store
from typer.testing import CliRunner

from ffgym.cli.app import app
from ffgym.cli.runs import COLUMNS
from ffgym.errors import TrackingError
from ffgym.tracking.names import Result
from ffgym.tracking.runs import find_run, list_runs
from ffgym.tracking.store import FOLDER_TAG
from ffgym.tracking.tracker import Tracker


def track(root, name, agent="reinforce", result=None, **others):
    with Tracker(root, "ffgym", name) as tracker:
        config = {"agent": {"name": agent}, "criterion": {"name": "wanda"}, "model": {"name": "demo"}}
        tracker.log_config({**config, "prune": {"sparsity": 0.2}, **others}, "")
        tracker.set_tags({FOLDER_TAG: str(root.parent / name)})
        if result is not None:
            tracker.log_result(result)
    return tracker.run_id


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = new_store(tmp_path_factory.mktemp("runs") / "mlruns")
        track(root, "first", result=Result(30.19, 19.6, 0.1998, 1e6, 196_608, 60.0), seed=7)
        track(root, "second", "random", Result(40.0, 19.6, 0.1997))
        track(root, "third", "evolution", Result(25.0, 20.0), prune={"sparsity": 0.3})
        with pytest.raises(ValueError, match="NaN"), Tracker(root, "ffgym", "fourth"):
            raise ValueError("NaN")
        track(root, "twice")
        track(root, "twice")
        track(root, "broken", "random", Result(math.inf, 20.0))
        yield root


def listed(root, *arguments):
    done = CliRunner().invoke(app, ["runs", "--root", str(root), *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def names(root, *arguments):
    return [run["name"] for run in json.loads(listed(root, "--json", *arguments))]


def test_a_tracked_run_has_its_settings_and_its_result(root):
    runs = {run.name: run for run in list_runs(root)}
    first, third, fourth = runs["first"], runs["third"], runs["fourth"]
    assert (first.agent, first.criterion, first.model, first.sparsity) == ("reinforce", "wanda", "demo", 0.1998)
    assert (first.status, first.result, first.tokens, first.seed) == ("finished", 30.19, 196_608, 7)
    assert first.folder == root.parent / "first"
    assert (third.agent, third.sparsity, third.result, third.ratio) == ("evolution", 0.3, 25.0, 1.25)
    assert third.tokens is None
    assert (fourth.status, fourth.result, fourth.agent) == ("failed", None, None)


def test_a_run_is_found_by_id_the_beginning_of_one_and_name(root):
    (run,) = (run for run in list_runs(root) if run.name == "first")
    for text in (run.id, run.id[:8].upper(), run.id[:4], "first"):
        assert find_run(root, text) == run
    with pytest.raises(TrackingError):
        find_run(root, run.id[:3])


def test_a_whole_id_is_found_in_any_experiment(root):
    (run,) = (run for run in list_runs(root) if run.name == "first")
    for experiment in ("ffgym", "nobody's"):
        assert find_run(root, run.id, experiment) == run


def test_people_are_shown_local_time(root, monkeypatch):
    """As in the names of runs."""
    monkeypatch.setenv("TZ", "Etc/GMT-9")
    time.tzset()
    try:
        (run,) = (run for run in list_runs(root) if run.name == "first")
        there = f"{run.started + timedelta(hours=9):%Y-%m-%d %H:%M}"
        assert there in listed(root, "--filter", "name=first")
        with pytest.raises(TrackingError, match=f"{there[:-5]}"):
            find_run(root, "twice")
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("frist", "no run has the id or the name 'frist'.*\n.*Did you mean 'first'"),
        ("twice", "'twice' means 2 runs: [0-9a-f]{8} of 20.*\n.*id of one"),
        ("0" * 32, "no MLflow run 0{32} in .*mlflow.db"),
    ],
)
def test_what_is_no_run_or_several_is_refused(root, text, complaint):
    with pytest.raises(TrackingError, match=complaint):
        find_run(root, text)


def test_a_deleted_run_is_named_as_such(root):
    run_id = track(root, "deleted")
    client(root).delete_run(run_id)
    with pytest.raises(TrackingError, match=r"was deleted.*\n.*mlflow runs restore"):
        find_run(root, run_id)


def test_a_store_or_an_experiment_that_is_not_there_is_named(root, tmp_path):
    with pytest.raises(TrackingError, match=r"no MLflow store in .*nowhere"):
        list_runs(tmp_path / "nowhere")
    with pytest.raises(TrackingError, match=r"no MLflow experiment 'ffgmy'.*\n.*'ffgym'"):
        list_runs(root, "ffgmy")


def test_the_list_shows_what_runs_are_compared_by(root):
    head, *lines = listed(root, "--filter", "name=first").splitlines()
    assert re.split(r"  +", head) == [*list(COLUMNS)[:10], "x dense", "tokens"]
    (line,) = lines
    for part in ("first", "finished", "reinforce  wanda      7     demo", "20.0%", "30.19", "1.540", "196,608"):
        assert part in line


def test_many_agents_are_counted_and_a_range_is_shown_as_such(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = new_store(tmp_path / "mlruns")
    track(root, "bench", "reinforce, cma-es, random")
    track(root, "range", result=Result(22.0, 20.0, 0.35), prune={"sparsity": "0.1:0.6"})
    _, line = listed(root, "--filter", "agent=*cma-es*").splitlines()
    assert "bench" in line
    assert "3 agents" in line
    _, line = listed(root, "--filter", "sparsity=0.1:0.6").splitlines()
    assert "range" in line
    assert "35.0%" not in line


def test_the_perplexity_of_a_destroyed_model_is_as_short_as_in_the_table_of_its_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = new_store(tmp_path / "mlruns")
    track(root, "destroyed", result=Result(130_331_837.013, 20.0, 0.2))
    assert "1.30e+08" in listed(root)


def test_it_is_sorted_with_what_has_no_value_last(root):
    assert names(root, "--sort", "result")[:3] == ["third", "first", "second"]
    assert names(root, "--sort=-result")[:3] == ["second", "first", "third"]
    assert "broken" in names(root, "--sort", "result")[3:]


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ("agent=re*", {"first", "twice"}),
        ("status=FAILED", {"fourth"}),
        ("sparsity=0.2", {"first", "second", "twice", "broken"}),
        ("sparsity=0.3", {"third"}),
        ("sparsity=30.0%", {"third"}),
        ("tokens=196,608", {"first"}),
        ("result=30.19", {"first"}),
        ("result=much", set()),
    ],
)
def test_it_is_filtered(root, condition, found):
    assert set(names(root, "--filter", condition)) == found


def test_a_run_is_found_by_the_sparsity_that_was_asked_for_and_by_the_one_that_was_reached(tmp_path, monkeypatch):
    """A KV budget, or one shape for all layers, removes more than was asked for: units are large."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = new_store(tmp_path / "mlruns")
    track(root, "kv", result=Result(22.0, 20.0, 0.375), prune={"sparsity": 0.3})
    for condition, found in (("0.3", ["kv"]), ("0.375", ["kv"]), ("37.5%", ["kv"]), ("0.5", [])):
        assert names(root, "--filter", f"sparsity={condition}") == found
    assert "37.5%" in listed(root)


def test_a_folder_lists_the_runs_that_lie_there(root):
    assert names(root, str(root.parent / "first")) == ["first"]
    assert set(names(root, str(root.parent))) >= {"first", "second", "twice"}
    assert names(root, str(root.parent / "fir")) == []


def test_json_has_all_there_is(root):
    (run,) = json.loads(listed(root, "--json", "--filter", "name=first"))
    assert run["ratio"] == pytest.approx(30.19 / 19.6)
    assert run["started"].endswith("+00:00")
    assert run["folder"] == str(root.parent / "first")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sort", "perplexty"], "unknown column 'perplexty'\nhint: Known: "),
        (["--filter", "agnet=ppo"], "Did you mean 'agent'?"),
        (["--filter", "agent"], "cannot read --filter 'agent'"),
    ],
)
def test_an_unknown_column_is_refused(root, arguments, complaint):
    done = CliRunner().invoke(app, ["runs", "--root", str(root), *arguments])
    assert done.exit_code == 1
    assert complaint in done.output


def test_a_store_that_cannot_be_read_names_options_that_the_command_has(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_text("junk " * 1000)
    done = CliRunner().invoke(app, ["runs", "--root", str(tmp_path)])
    assert done.exit_code == 1
    assert "or name another store: --root DIR" in " ".join(done.stderr.split())
    assert "tracking.enabled" not in done.stderr
