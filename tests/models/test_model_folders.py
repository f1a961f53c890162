"""The folder of a checkpoint: where it lies, and what its files hold."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ffgym.errors import ModelError
from ffgym.models.checkpoint import model_folder, weights_on_disk


@pytest.fixture
def run(tmp_path):
    """The folder of a run, with a saved model's config."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    return tmp_path / "run"


class TestFolder:
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
