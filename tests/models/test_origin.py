"""Where a saved model lies, and which dense model its record names."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from ffgym.config.tables import RunConfig
from ffgym.config.toml import to_toml
from ffgym.errors import ConfigError, ModelError
from ffgym.models.loading import DEMO_BASE, load
from ffgym.models.origin import (
    absolute_name,
    dense_model,
    hub_base,
    model_folder,
    recorded_name,
    stated_license,
    weights_on_disk,
)
from ffgym.report.card import _front_matter


@pytest.fixture
def run(tmp_path):
    """The folder of a run, with a saved model's config."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    return tmp_path / "run"


class TestFolder:
    def test_is_the_one_given(self, run):
        assert model_folder(run / "model") == run / "model"

    def test_or_the_model_of_the_run(self, run):
        assert model_folder(run) == run / "model"

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(ModelError, match="nowhere' does not exist") as raised:
            model_folder(tmp_path / "nowhere")
        assert "runs/x/model" in raised.value.hint

    def test_a_file(self, tmp_path):
        (tmp_path / "model.gguf").touch()
        with pytest.raises(ModelError, match=r"model\.gguf' is a file, not the folder of a saved model") as raised:
            model_folder(tmp_path / "model.gguf")
        assert "Name the folder that it lies in or was made from" in raised.value.hint

    def test_a_folder_that_is_no_model(self, tmp_path):
        with pytest.raises(ModelError, match=r"holds no model: config\.json is missing"):
            model_folder(tmp_path)

    def test_a_run_that_has_saved_none_says_how_to_go_on(self, tmp_path):
        (tmp_path / "config.toml").touch()
        with pytest.raises(ModelError, match="has saved no model") as raised:
            model_folder(tmp_path)
        assert f"ffgym run --resume {tmp_path}" in str(raised.value.hint)

    def test_a_run_that_has_saved_several_names_them(self, tmp_path):
        (tmp_path / "config.toml").touch()
        for point in ("model-0.20", "model-0.30"):
            (tmp_path / point).mkdir()
            (tmp_path / point / "config.json").touch()
        with pytest.raises(ModelError, match=r"several models: model-0\.20, model-0\.30") as raised:
            model_folder(tmp_path)
        assert f"{tmp_path}/model-0.20" in str(raised.value.hint)

    def test_a_model_and_what_training_made_of_it_are_several(self, run):
        (run / "model-recovered.unfinished").mkdir()
        (run / "model-nas").mkdir()
        (run / "model-nas" / "config.json").touch()  # somebody's own
        assert model_folder(run) == run / "model"
        (run / "model-recovered").mkdir()
        (run / "model-recovered" / "config.json").touch()
        with pytest.raises(ModelError, match="several models: model, model-recovered") as raised:
            model_folder(run)
        assert str(run / "model") in str(raised.value.hint)
        assert model_folder(run / "model-recovered") == run / "model-recovered"


class TestDense:
    def test_what_is_given_wins(self, run):
        (run / "config.toml").write_text(to_toml(RunConfig()))
        assert dense_model(run / "model", "a/b").name == "a/b"

    def test_the_run_names_it(self, run):
        config = RunConfig.model_validate({"model": {"name": "a/b", "revision": "v2"}})
        (run / "config.toml").write_text(to_toml(config))
        found = dense_model(run / "model", None)
        assert (found.name, found.revision) == ("a/b", "v2")
        assert found.said_by.endswith("config.toml")

    def test_a_trained_model_names_it_itself_wherever_it_lies(self, run):
        (run / "config.toml").write_text("[model]\nname = 'somebody/else'\n")
        (run / "model" / "config.toml").write_text("[model]\nname = 'a/b'\n")
        assert dense_model(run / "model", None).name == "a/b"
        (run / "model" / "config.toml").write_text("[model]\ndtype = 'float32'\n")
        assert dense_model(run / "model", None).name == "somebody/else", "training was not told which one"

    @pytest.mark.parametrize("text", ["", "seed = 1\n", '[model]\ndtype = "float32"\n'])
    def test_a_run_that_does_not_say_was_the_default(self, run, text):
        (run / "config.toml").write_text(text)
        assert (dense_model(run / "model", None).name, dense_model(run / "model", None).revision) == ("demo", None)

    @pytest.mark.parametrize(("base", "name"), [(DEMO_BASE, "demo"), ("a/b", "a/b")])
    def test_the_card_names_it(self, run, base, name):
        card = run / "model" / "README.md"
        front = _front_matter(base, {"license": "apache-2.0"}, "text-generation")
        card.write_text(f"{front}\n\n# A model\n\nbase_model: not/this\n")
        found = dense_model(run / "model", None)
        assert (found.name, found.said_by) == (name, str(card))
        card.write_bytes(card.read_bytes().replace(b"\n", b"\r\n"))  # as an editor on Windows writes it
        assert dense_model(run / "model", None) == found

    @pytest.mark.parametrize(
        "card", ["base_model: a/b\n", "---\nlicense: mit\n---\nbase_model: a/b", "---\nbase_model:\n- a/b\n---"]
    )
    def test_a_card_that_does_not_say_is_no_record(self, run, card):
        (run / "model" / "README.md").write_text(card)
        with pytest.raises(ConfigError, match="cannot tell which dense model") as raised:
            dense_model(run / "model", None)
        assert "--dense" in raised.value.hint

    def test_a_folder_is_found_again_where_it_was_when_the_run_began(self, run, monkeypatch):
        """Its name may be that of somebody else's model on the hub."""
        (run / "config.toml").write_text("[model]\nname = 'models/mine'\n")
        began = run.parent / "began" / "models" / "mine"
        (run / "run.json").write_text(json.dumps({"mlflow_run": None, "dense": str(began)}))
        monkeypatch.chdir(run)
        found = dense_model(run / "model", None)
        assert (found.name, found.called) == (str(began), "models/mine")
        was = f"names 'models/mine' as the dense model; it was the folder {began} where the run began: "
        with pytest.raises(ModelError, match=re.escape(was)) as raised, found.named():
            load(found.name)
        assert "--dense" in raised.value.hint
        (run / "models" / "mine").mkdir(parents=True)
        assert dense_model(run / "model", None).name == "models/mine", "both were moved"
        began.mkdir(parents=True)
        assert dense_model(run / "model", None).name == str(began), "the one here is another one"
        monkeypatch.chdir(run.parent / "began")
        assert dense_model(run / "model", None).name == "models/mine"
        assert dense_model(run / "model", None).called is None

    def test_what_lies_in_the_home_folder_is_recorded_without_its_name(self, run, monkeypatch):
        monkeypatch.setenv("HOME", str(run.parent))
        (run.parent / "mine").mkdir()
        place = recorded_name(str(run.parent / "mine"))
        assert place == "~/mine"
        (run / "config.toml").write_text("[model]\nname = 'models/mine'\n")
        (run / "run.json").write_text(json.dumps({"dense": place}))
        found = dense_model(run / "model", None)
        assert (found.name, found.called) == (place, "models/mine")
        assert absolute_name(found.name) == str(run.parent / "mine")
        monkeypatch.chdir(run.parent)
        (run.parent / "models").mkdir()
        (run.parent / "models" / "mine").symlink_to(run.parent / "mine")
        assert dense_model(run / "model", None).name == "models/mine"

    def test_no_record_at_all(self, run):
        with pytest.raises(ConfigError, match=r"no config\.toml in it or beside it, and no base_model"):
            dense_model(run / "model", None)


class TestLicense:
    @pytest.mark.parametrize(
        ("front", "said"),
        [
            ("license: mit", {"license": "mit"}),
            ("license: 'apache-2.0'  # as the base", {"license": "apache-2.0"}),
            (
                'base_model: a/b\nlicense: other\nlicense_name: "one\'s own"\nlicense_link: https://x.org/#terms',
                {"license": "other", "license_name": "one's own", "license_link": "https://x.org/#terms"},
            ),
            ("license: [mit, apache-2.0]\ntags:\n- license: mit", {}),
            ("license:\n- mit", {}),
        ],
    )
    def test_is_what_the_card_says_of_it(self, front, said, tmp_path):
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\nlicense: not/this\n")
        assert stated_license(tmp_path) == said

    def test_no_card_or_a_damaged_one_ends_no_run(self, tmp_path):
        assert stated_license(tmp_path) == {}
        (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
        assert stated_license(tmp_path) == {}


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


class TestWeights:
    def test_are_counted_over_all_files(self, tmp_path):
        save_file({"a": torch.zeros(100, dtype=torch.bfloat16)}, tmp_path / "1.safetensors")
        save_file({"b": torch.zeros(10)}, tmp_path / "2.safetensors")
        (tmp_path / "other.bin").write_bytes(b"x" * 999)
        size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        assert weights_on_disk(tmp_path) == (size, "bfloat16")

    def test_files_that_are_not_loaded_do_not_count(self, tmp_path):
        """Some hub models hold their weights once more, for other software."""
        save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
        save_file({"a": torch.zeros(100)}, tmp_path / "consolidated.safetensors")
        assert weights_on_disk(tmp_path)[0] == (tmp_path / "model.safetensors").stat().st_size

    def test_an_index_says_which_files_are_loaded(self, tmp_path):
        for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
            save_file({"a": torch.zeros(100)}, tmp_path / name)
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert weights_on_disk(tmp_path)[0] == 2 * (tmp_path / "model-1.safetensors").stat().st_size
        (tmp_path / "model-2.safetensors").unlink()
        with pytest.raises(ModelError, match=r"model-2\.safetensors' is damaged or incomplete"):
            weights_on_disk(tmp_path)

    def test_none_are_an_error(self, tmp_path):
        with pytest.raises(ModelError, match=r"no \.safetensors file"):
            weights_on_disk(tmp_path)

    def test_a_file_that_is_cut_short_is_an_error(self, tmp_path):
        (tmp_path / "a.safetensors").write_bytes(b"\x10\x00")
        with pytest.raises(ModelError, match="is damaged"):
            weights_on_disk(tmp_path)
