"""Runs on a real MLflow server: as on a file, and without a loss when it goes away."""

import json
import os
import re
from types import SimpleNamespace

import pytest
from glass_runs import glass_config
from mlflow import MlflowClient
from mlflow_server import serving
from mlflow_store import new_store
from processes import PATIENCE
from rich.console import Console
from typer.testing import CliRunner

import ffgym
from ffgym.cli.app import app
from ffgym.errors import TrackingError
from ffgym.tracking.names import Result
from ffgym.tracking.runs import find_run
from ffgym.tracking.tracker import Tracker
from ffgym.tracking.ui import open_ui

pytestmark = pytest.mark.slow
SECRETS = ("somebody", "pa55word")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(new_store(tmp_path_factory.mktemp("server"))) as server:
        yield server


@pytest.fixture(scope="module")
def address(server):
    """With a name and a password, which this server does not ask for."""
    uri = server.uri.replace("://", f"://{SECRETS[0]}:{SECRETS[1]}@")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(PATIENCE)))
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


def secrets_under(*folders):
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in SECRETS)]


def test_a_whole_run_on_a_server_is_as_on_a_file(server, address, tmp_path, capfd):
    result = ffgym.run(glass_config(tmp_path, tracking={"enabled": True}), progress=Console(stderr=True))
    run = MlflowClient(server.uri).get_run(result.mlflow_run)
    assert run.info.status == "FINISHED"
    assert {"result/perplexity", "search/reward"} <= run.data.metrics.keys()
    assert len(run.inputs.dataset_inputs) == 3
    names = {item.path for item in MlflowClient(server.uri).list_artifacts(result.mlflow_run)}
    assert {"config.toml", "report.json", "units_kept.png"} <= names
    assert find_run(tmp_path, result.mlflow_run).result == run.data.metrics["result/perplexity"]
    assert secrets_under(server.folder, result.folder) == []
    assert not [secret for secret in SECRETS if secret in "".join(capfd.readouterr())]


def run_in(folder, notify=lambda line: None):
    return Tracker(folder, "ffgym", folder.name, unsent=folder, notify=notify)


@pytest.fixture(scope="module")
def outage(server, address, tmp_path_factory):
    """The server goes away from four runs: three end meanwhile, one of them empty, and one goes on when it is back."""
    names = ("synced", "resumed", "lasting", "empty")
    synced, resumed, lasting, empty = (tmp_path_factory.mktemp(name) for name in names)
    said = []
    with run_in(lasting) as third, pytest.MonkeyPatch.context() as patch:
        third.log_metrics([("search/reward", 0.1, 0)])
        with run_in(synced, said.append) as first, run_in(resumed) as second, run_in(empty) as fourth:
            for tracker in (first, second):
                tracker.log_metrics([("search/reward", 0.1, 0)])
            server.stop()
            empty.rmdir()
            fourth.log_metrics([("search/reward", 0.1, 0)])
            for tracker, folder in ((first, synced), (second, resumed)):
                tracker.log_metrics([("search/reward", 0.2, 1)])
                (folder / "picture.png").write_bytes(b"picture")
                tracker.log_artifact(folder / "picture.png")
                tracker.log_dataset(name="text", context="search", digest="0" * 64, corpus="demo", tokens=3)
                tracker.log_child("sparsity 20.0%", {"agent": "ppo"}, Result(30.0, 20.0))
                tracker.log_result(Result(float("nan"), 20.0))
        patch.setattr("ffgym.tracking.tracker.RETRY_SECONDS", 0.0)
        third.log_metrics([("search/reward", 0.2, 1)])
        with pytest.raises(TrackingError) as refused, run_in(tmp_path_factory.mktemp("late")):
            pass
        sync = CliRunner().invoke(app, ["sync", str(synced)])
        server.start()
        third.log_metrics([("search/reward", 0.3, 2)])
        left = list(lasting.iterdir())
    return SimpleNamespace(
        synced=(synced, first.run_id),
        resumed=(resumed, second.run_id),
        lasting=(left, third.run_id),
        empty=empty,
        said=said,
        refused=str(refused.value),
        sync=sync,
    )


def test_a_server_that_is_down_at_the_start_is_a_clear_error(outage):
    assert re.match(r"cannot open the MLflow store http://\*\*\*@127.*\n.*server answers", outage.refused)
    assert outage.refused.splitlines()[0].endswith("Connection refused")
    assert "HTTPConnection" not in outage.refused
    assert not [secret for secret in SECRETS if secret in outage.refused]


def test_a_run_that_found_nothing_leaves_no_folder_behind(outage):
    assert not outage.empty.exists()


def check_complete(server, run_id):
    client = MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run_id, "search/reward")
    assert [(point.step, point.value) for point in history] == [(0, 0.1), (1, 0.2)]
    assert [item.path for item in client.list_artifacts(run_id)] == ["picture.png"]
    assert len(run.inputs.dataset_inputs) == 1
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert [child.data.metrics["result/ratio_to_dense"] for child in children] == [1.5]
    assert [child.info.start_time - run.info.end_time < 1 for child in children] == [True], "not when it was sent"
    assert "result/perplexity" in run.data.metrics


def test_what_a_server_that_went_away_did_not_take_is_sent_by_sync(server, outage):
    folder, run_id = outage.synced
    said = outage.said
    assert [line for line in said if "the run goes on, and keeps what it logs in" in line] == said[:1]
    assert said[1].endswith(f"6 records of the MLflow run are still to be sent: ffgym sync {folder}")
    assert secrets_under(folder) == []
    assert not [line for line in said if any(secret in line for secret in SECRETS)]
    assert (outage.sync.exit_code, "server answers" in outage.sync.output) == (1, True)
    done = CliRunner().invoke(app, ["sync", str(folder)])
    assert "6 records sent" in done.output
    assert sorted(os.listdir(folder)) == ["picture.png"]
    check_complete(server, run_id)
    assert "nothing is waiting" in CliRunner().invoke(app, ["sync", str(folder)]).output


def test_a_resumed_run_sends_what_was_left_and_nothing_twice(server, outage):
    folder, run_id = outage.resumed
    with Tracker(folder, "ffgym", "again", unsent=folder, resume=run_id) as tracker:
        tracker.log_metrics([("search/reward", 0.1, 0), ("search/reward", 0.2, 1)])
    check_complete(server, run_id)


def test_a_run_sends_what_was_left_once_the_server_is_back(server, outage):
    left, run_id = outage.lasting
    assert left == []
    history = MlflowClient(server.uri).get_metric_history(run_id, "search/reward")
    assert [point.step for point in history] == [0, 1, 2]


def test_what_a_server_refuses_holds_up_nothing_else(server, address, tmp_path, capsys):
    client, said = MlflowClient(server.uri), []
    with run_in(tmp_path, said.append) as tracker:
        client.log_param(tracker.run_id, "agent", "ppo")
        tracker.log_params({"agent": "random"})  # which it has with another value
        tracker.log_metrics([("search/reward", 0.1, 0)])
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.params["agent"]) == ("FINISHED", "ppo")
    assert run.data.metrics["search/reward"] == 0.1
    assert "MLflow refuses values of this run: INVALID_PARAMETER_VALUE" in capsys.readouterr().err
    assert (said, list(tmp_path.iterdir())) == ([], [])


def test_what_is_logged_to_a_deleted_run_waits_until_it_is_restored(server, address, tmp_path):
    client = MlflowClient(server.uri)
    with run_in(tmp_path) as tracker:
        client.delete_run(tracker.run_id)
        tracker.log_metrics([("search/reward", 0.1, 0)])
    client.restore_run(tracker.run_id)
    assert "records sent" in CliRunner().invoke(app, ["sync", str(tmp_path)]).output
    assert client.get_run(tracker.run_id).data.metrics["search/reward"] == 0.1


def test_records_of_a_run_that_the_store_does_not_have_stay(server, address, tmp_path):
    box = tmp_path / f"{'0' * 32}.unsent.jsonl"
    box.write_text(json.dumps({"write": "values", "tags": {"a": "b"}}) + "\n")
    refused = CliRunner().invoke(app, ["sync", str(tmp_path)])
    assert refused.exit_code == 1
    assert f"there is no MLflow run {'0' * 32} in http" in refused.output
    assert not [secret for secret in SECRETS if secret in refused.output]
    assert box.exists()


def test_the_page_of_a_server_is_printed_without_its_password(server, address, tmp_path):
    with Tracker(tmp_path, "ffgym", "run"):
        pass
    said = []
    open_ui(tmp_path, notify=said.append, browser=False)
    assert said[0].startswith(f"The runs are shown at {server.uri}/#/experiments/")
    assert not [secret for secret in SECRETS if secret in said[0]]
