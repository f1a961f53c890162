"""What a saved model says of the dense model and the texts that it was made from."""

from __future__ import annotations

import json
import re

import pytest

from ffgym.errors import ConfigError, ModelError
from ffgym.models.loading import DEMO_BASE, load
from ffgym.models.origin import absolute_name, dense_model, hub_base, recorded_name, texts_of


def record(folder, **origin):
    (folder / "ffgym.json").write_text(json.dumps(origin))
    return folder


class TestDense:
    def test_what_is_given_wins(self, tmp_path):
        assert dense_model(record(tmp_path, dense="demo"), "a/b").name == "a/b"

    def test_the_record_names_it(self, tmp_path):
        found = dense_model(record(tmp_path, dense="a/b", revision="v2"), None)
        assert (found.name, found.revision, found.said_by) == ("a/b", "v2", str(tmp_path / "ffgym.json"))

    def test_nothing_else_does(self, tmp_path):
        (tmp_path / "config.toml").write_text("[model]\nname = 'a/b'\n")
        (tmp_path / "README.md").write_text("---\nbase_model: a/b\n---\n")
        for folder in (tmp_path, record(tmp_path, texts={"trained": "mine.txt"})):
            with pytest.raises(ConfigError, match=r"cannot tell which dense model .* no ffgym\.json") as raised:
                dense_model(folder, None)
            assert "--dense" in raised.value.hint

    def test_a_folder_is_found_again_where_it_was_when_the_run_began(self, tmp_path, monkeypatch):
        """Its name may be that of somebody else's model on the hub."""
        began, run = tmp_path / "began" / "models" / "mine", tmp_path / "run"
        run.mkdir()
        monkeypatch.chdir(record(run, dense="models/mine", place=str(began)))
        found = dense_model(run, None)
        assert (found.name, found.called) == (str(began), "models/mine")
        was = f"names 'models/mine' as the dense model; it was the folder {began} where the run began: "
        with pytest.raises(ModelError, match=re.escape(was)) as raised, found.named():
            load(found.name)
        assert "--dense" in raised.value.hint
        (run / "models" / "mine").mkdir(parents=True)
        assert dense_model(run, None).name == "models/mine", "both were moved"
        began.mkdir(parents=True)
        assert dense_model(run, None).name == str(began), "the one here is another one"
        monkeypatch.chdir(tmp_path / "began")
        assert dense_model(run, None).name == "models/mine"
        assert dense_model(run, None).called is None

    def test_what_lies_in_the_home_folder_is_recorded_without_its_name(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "mine").mkdir()
        place = recorded_name(str(tmp_path / "mine"))
        assert place == "~/mine"
        record(tmp_path, dense="models/mine", place=place)
        found = dense_model(tmp_path, None)
        assert (found.name, found.called) == (place, "models/mine")
        assert absolute_name(found.name) == str(tmp_path / "mine")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "mine").symlink_to(tmp_path / "mine")
        assert dense_model(tmp_path, None).name == "models/mine"

    @pytest.mark.parametrize("content", ["no JSON", "[]", '{"dense": 1}', '{"texts": {"eaten": "c4"}}'])
    def test_a_damaged_record_is_named(self, tmp_path, content):
        (tmp_path / "ffgym.json").write_text(content)
        with pytest.raises(ConfigError, match=r"ffgym\.json is no record of a dense model, or a damaged one") as raised:
            dense_model(tmp_path, None)
        assert "--dense" in raised.value.hint
        assert texts_of(tmp_path) == {}, "they only add a note"


def test_texts_are_recorded_by_what_was_done_with_them(tmp_path):
    assert texts_of(tmp_path) == {}
    record(tmp_path, texts={"calibrated": ["3*demo:c4", "mine.txt"], "searched": "demo:c4"})
    assert texts_of(tmp_path) == {"calibrated": ("3*demo:c4", "mine.txt"), "searched": "demo:c4"}


def test_a_card_names_a_base_model_that_the_hub_knows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert (hub_base("someone/tiny"), hub_base("demo")) == ("someone/tiny", DEMO_BASE)
    assert [hub_base(name) for name in ("models/mine", str(tmp_path), "~/mine", "mine", "a/b/mine.gguf")] == [None] * 5


def test_what_is_on_this_machine_has_an_absolute_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert absolute_name("models/mine") == str(tmp_path / "models" / "mine")
    assert absolute_name("/no/longer/here") == "/no/longer/here"
    assert [absolute_name(name) for name in ("demo", "someone/tiny", "gpt2")] == [None] * 3
