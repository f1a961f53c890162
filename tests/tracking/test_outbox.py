"""Records that wait for a server survive whatever happens to their file, and to the files that they name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from mlflow_store import client, new_store

from ffgym.errors import TrackingError
from ffgym.tracking.outbox import Outbox, sync
from ffgym.tracking.records import send


@pytest.fixture
def box(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path, "a" * 32)


def test_what_could_not_be_sent_goes_on_waiting_and_no_lock_is_left(box: Outbox) -> None:
    for number in range(3):
        box.add({"write": "text", "number": number})

    def fail_at_the_second(record: Any) -> None:
        if record["number"] == 1:
            raise TrackingError("away")

    with pytest.raises(TrackingError, match="away"):
        box.forward(fail_at_the_second)
    assert len(box) == 2
    assert [path.name for path in box.path.parent.iterdir()] == [box.path.name]
    sent: list[Any] = []
    assert box.forward(sent.append) == 2
    assert [record["number"] for record in sent] == [1, 2]
    assert list(box.path.parent.iterdir()) == []


def test_two_who_send_at_once_send_a_record_once(box: Outbox) -> None:
    box.add({"write": "text"})
    sent: list[Any] = []
    with ThreadPoolExecutor() as pool:

        def send_slowly(record: Any) -> None:
            sent.append(pool.submit(box.forward, sent.append))
            wait([sent[0]], timeout=0.5)  # it does not end, since this one holds the lock

        assert box.forward(send_slowly) == 1
        assert sent[0].result() == 0
    assert len(sent) == 1


@pytest.mark.parametrize("left", ["", '{"write": "te'], ids=["empty", "half a line"])
def test_a_file_that_was_only_begun_holds_nothing(box: Outbox, left: str) -> None:
    box.path.write_text(left)
    assert len(box) == 0
    assert box.forward(lambda record: None) == 0
    assert not box.path.exists()


@pytest.mark.parametrize("is_there", [False, True], ids=["no store", "another store"])
def test_records_of_a_store_that_is_not_named_stay_and_hold_up_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root, boxes = tmp_path / "mlruns", [Outbox(tmp_path / "runs" / "a", "a" * 32)]
    if is_there:
        run_id = client(new_store(root)).create_run("0", run_name="one").info.run_id
        boxes.append(Outbox(tmp_path / "runs" / "b", run_id))
    for box in boxes:
        box.add({"write": "values", "tags": {"late": "yes"}})
    complaint = rf"{boxes[0].path}: there is no MLflow run a{{32}} in {root}/mlflow.db\n.*--root or MLFLOW_TRACKING_URI"
    if not is_there:
        complaint = r"there is no MLflow store in .*mlruns yet\n.*name its folder"
    with pytest.raises(TrackingError, match=complaint):
        sync(root, [tmp_path / "runs"], print)
    assert [len(box) for box in boxes] == [1, 0][: len(boxes)]


def test_a_folder_that_lies_in_another_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root, run = new_store(tmp_path / "mlruns"), tmp_path / "runs" / "one"
    run_id = client(root).create_run("0", run_name="one").info.run_id
    Outbox(run, run_id).add({"write": "values", "tags": {"late": "yes"}})
    assert sync(root, [tmp_path, run], print) == 1
    assert client(root).get_run(run_id).data.tags["late"] == "yes"


def test_a_record_of_a_file_that_is_gone_does_not_hold_up_the_others(
    box: Outbox, capsys: pytest.CaptureFixture[str]
) -> None:
    box.add({"write": "artifact", "path": str(box.path.parent / "moved.png")})
    assert box.forward(lambda record: send(None, box.run_id, record)) == 1
    assert "moved.png is not there any more, so MLflow does not get it" in " ".join(capsys.readouterr().err.split())
