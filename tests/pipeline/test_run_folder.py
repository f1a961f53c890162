"""Files of a run are written whole or not at all, and no folder is cleared that something still needs."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config
from ffgym.errors import OutputError, PluginError
from ffgym.files import write_text
from ffgym.pipeline.folder import LOCK, RunFolder, RunRecord


def overwriting(folder: Path, start: object = None) -> RunConfig:
    return load_config(
        output={"dir": str(folder), "overwrite": True}, search={"init_from": None if start is None else str(start)}
    )


def new(folder: Path) -> RunFolder:
    return RunFolder.claim(load_config(output={"dir": str(folder)}))


def resumed(folder: Path) -> RunFolder:
    """The folder of a run that goes on and has begun to write."""
    place = RunFolder(folder, resumed=True)
    place.begin("seed = 1", RunRecord())
    return place


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "scores.json"
    link.symlink_to(tmp_path / "there" / "scores.json")
    write_text(link, "{}")
    assert link.is_symlink()
    assert (tmp_path / "there" / "scores.json").read_text() == "{}"


def test_a_log_without_an_episode_is_no_reason_to_keep_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for log, stays in (("", False), ("{}\n", True)):
        place = new(folder)
        place.begin("seed = 1", RunRecord())
        (folder / "episodes.jsonl").write_text(log)
        place.end_early(RuntimeError(), print)
        assert folder.exists() == stays


def test_a_folder_that_was_there_before_is_emptied_and_stays(tmp_path: Path) -> None:
    place = new(tmp_path)
    place.begin("seed = 1", RunRecord())
    place.end_early(RuntimeError(), print)
    assert list(tmp_path.iterdir()) == []


def test_what_is_to_be_overwritten_is_an_earlier_runs_until_it_is_cleared(tmp_path: Path) -> None:
    for name in ("config.toml", "run.json"):
        (tmp_path / name).write_text("{}")
    place = RunFolder.claim(overwriting(tmp_path))
    assert not place.can_go_on()
    place.end_early(RuntimeError(), print)
    assert len(list(tmp_path.iterdir())) == 2
    place.clear()
    place.end_early(RuntimeError(), print)
    assert list(tmp_path.iterdir()) == []


def test_after_ctrl_c_a_log_is_something_to_go_on_with(tmp_path: Path) -> None:
    """Of a run that was killed before, so that nothing else was written."""
    (tmp_path / "episodes.jsonl").write_text("{}\n")
    said: list[str] = []
    resumed(tmp_path).end_early(KeyboardInterrupt(), said.append)
    assert said == [
        f"the episodes so far are in {tmp_path / 'episodes.jsonl'}",
        f"continue where it stopped: ffgym run --resume {tmp_path}",
    ]


@pytest.mark.parametrize("are_new", [True, False])
def test_after_an_error_new_episodes_are_something_to_go_on_with(tmp_path: Path, are_new: bool) -> None:
    log, said = tmp_path / "episodes.jsonl", list[str]()
    log.write_text("{}\n")

    place = resumed(tmp_path)
    log.write_text("{}\n{}\n" if are_new else "{}\n")
    place.end_early(PluginError("it failed", hint="Mend it."), said.append)
    assert (f"continue where it stopped: ffgym run --resume {tmp_path}" in said) == are_new


def test_a_resumed_run_removes_what_it_was_writing_when_it_was_killed(tmp_path: Path) -> None:
    for name in (".run.json.part-0123abcd", ".report.md.part-0123abcd", ".thesis.tex.part-0123abcd"):
        (tmp_path / name).write_text("")
    (tmp_path / ".model-0.20.part-0123abcd").mkdir()
    resumed(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".thesis.tex.part-0123abcd", "config.toml", "run.json"}


def test_a_run_that_was_killed_while_it_wrote_its_configuration_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".config.toml.part-0123abcd").write_text("")
    RunFolder.claim(overwriting(tmp_path)).clear()
    assert not list(tmp_path.iterdir())


def test_a_page_of_an_unfinished_run_goes_when_it_is_finished(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("This run is not finished.")
    resumed(tmp_path).finish()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "name",
    [
        ".config.toml.part-0123abcd",
        ".model-0.20-recovered.part-0123abcd",
        "allocation-0.266667.json",
        f"{'0a1b2c3d' * 4}.unsent.jsonl",
        f"{'0a1b2c3d' * 4}.unsent.lock",
        ".model-recovered.lock",
    ],
)
def test_what_a_killed_run_left_is_cleared(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.toml").write_text("")
    (tmp_path / name).write_text("")
    place = RunFolder.claim(overwriting(tmp_path))
    assert (tmp_path / name).exists(), "not before the run could be loaded"
    place.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.py", ".download.part", ".thesis.tex.part-0123abcd", ".config.toml.part"])
def test_what_somebody_else_left_is_not(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    for _ in range(2):  # of a run's folder, and of one that ffgym did not make
        with pytest.raises(OutputError, match="--overwrite will not clear it"):
            RunFolder.claim(overwriting(tmp_path))
        (tmp_path / "config.toml").write_text("")
    assert (tmp_path / name).read_text() == "mine"


def test_several_may_write_the_same_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_text(tmp_path / "table.md", f"{number}" * 1000), range(10)))
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert len((tmp_path / "table.md").read_text()) == 1000


@pytest.mark.parametrize("key", ["model", "report", "search"])
def test_a_model_or_a_text_that_is_read_is_not_overwritten(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "model").mkdir()
    mine = str(tmp_path)
    tables = {
        "model": {"model": {"name": str(tmp_path / "model")}},
        "report": {"data": {"report": mine}},
        "search": {"data": {"search": ["demo:c4", mine]}},
    }[key]
    with pytest.raises(OutputError, match=f"--overwrite would delete .* and .*{key}"):
        RunFolder.claim(load_config(output={"dir": str(tmp_path), "overwrite": True}, **tables))
    assert (tmp_path / "model").exists()


@pytest.mark.parametrize("start", ["", "policy.json"])
def test_the_policy_to_start_from_is_not_overwritten(tmp_path: Path, start: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    (folder / "policy.json").write_text("{}")
    with pytest.raises(OutputError, match="--overwrite would delete"):
        RunFolder.claim(overwriting(folder, folder / start))
    assert (folder / "policy.json").exists()


def test_an_mlflow_run_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text("")
    RunFolder.claim(overwriting(tmp_path, "0123456789abcdef0123456789abcdef")).clear()
    assert not (tmp_path / "config.toml").exists()


def test_what_came_into_a_claimed_folder_since_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    place = RunFolder.claim(overwriting(tmp_path))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"thesis\.tex, which ffgym did not write"):
        place.clear()


def test_runs_that_start_in_the_same_second_get_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: RunFolder.claim(load_config()).path, range(8)))
    assert len(set(folders)) == 8
    assert all(folder.parent == tmp_path / "runs" and "-reinforce-wanda" in folder.name for folder in folders)


def test_a_folder_is_held_by_one_run_and_not_by_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()  # what a kill leaves
    assert new(tmp_path).is_ours, "nothing is in it"
    one, other = new(tmp_path), new(tmp_path)
    with one.lock(), pytest.raises(OutputError, match="another run is writing into"), other.lock():
        raise AssertionError("held twice")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_deleted_meanwhile_hides_no_error(tmp_path: Path) -> None:
    place = new(tmp_path / "out")
    place.begin("seed = 1", RunRecord())
    shutil.rmtree(place.path)
    place.end_early(KeyboardInterrupt(), print)
    assert not place.path.exists()
