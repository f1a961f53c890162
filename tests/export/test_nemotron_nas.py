"""A nemotron-nas folder is the model in the folder: MLX computes the same from it, or it is refused and not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_tokenizers import byte_level
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.errors import ModelError, OutputError
from ffgym.export.checkpoint import save_pruned
from ffgym.export.format import Exported, export
from ffgym.models.cut import PrunableModel
from ffgym.models.origin import Origin, origin_from
from ffgym.models.sublayer import parameter
from ffgym.testing.models import tiny_model

IDS = torch.randint(3, 128, (60,), generator=torch.Generator().manual_seed(7))
UNEVEN, EMPTIED = (1, 17, 2, 48, 1, 5), (1, 17, 0, 48, 2, 0)


def saved(folder: Path, kept: Sequence[int], family: str = "llama", origin: Origin | None = None, **config: Any) -> Any:
    """A tiny model, cut, and its checkpoint in the folder."""
    model: Any = tiny_model(family)
    for name, value in config.items():
        setattr(model.config, name, value)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight
    prunable = PrunableModel(model)
    prunable.cut(kept)
    save_pruned(prunable, byte_level(), folder, origin=origin)
    return model


def written(folder: Path, kept: Sequence[int], family: str = "llama", **config: Any) -> tuple[Any, Path, Exported]:
    """The model in memory, and what its export is."""
    model = saved(folder / "model", kept, family, **config)
    return model, folder / "nas", export(folder / "model", folder / "nas", name="nemotron-nas")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kept", [UNEVEN, EMPTIED, (2, 48) * 3])
def test_mlx_computes_the_same_logits(tmp_path: Path, kept: tuple[int, ...], tied: bool) -> None:
    core, loading = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    core.set_default_device(core.cpu)
    model, folder, _ = written(tmp_path, kept, tie_word_embeddings=tied)
    engine, _ = loading.load_model(folder)

    logits = torch.tensor(engine(core.array(IDS.tolist())[None]).tolist())
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(IDS[None]).logits, atol=1e-4, rtol=0)


def test_what_the_format_cannot_say_is_filled_with_zeros(tmp_path: Path) -> None:
    _, folder, result = written(tmp_path, UNEVEN)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            tensors |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    down, out = tensors["model.layers.0.mlp.down_proj.weight"], tensors["model.layers.0.self_attn.o_proj.weight"]
    assert down.shape == (32, 256)
    assert out.shape == (32, 32)
    assert bool(down[:, :17].all())
    assert not down[:, 17:].any()
    assert not out[:, 16:].any()
    assert result.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert [note.split(":")[0] for note in result.notes] == [
        "The format cannot hold the number of heads of 2 layers",
        "The format cannot hold the number of channels of 3 layers",
    ]


def test_removed_sublayers_are_blocks_without_operation(tmp_path: Path) -> None:
    _, folder, _ = written(tmp_path, EMPTIED)
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    assert [block["attention"].get("no_op", False) for block in blocks] == [False, True, False]
    assert [block["ffn"].get("no_op", False) for block in blocks] == [False, False, True]


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("gemma", {}, "of family 'gemma'"),
        ("mistral", {"sliding_window": 64}, "the format attends to everything, and this model to 64 tokens"),
        ("opt", {}, "of family 'opt'"),
        ("qwen2", {}, "the format computes as Llama does, and this model is of family 'qwen2'"),
    ],
)
def test_what_it_cannot_say_is_refused_by_name(
    tmp_path: Path, family: str, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        written(tmp_path, UNEVEN, family, **config)
    assert not (tmp_path / "nas").exists()


def test_biases_of_affine_calibration_are_refused_with_the_way_round(tmp_path: Path) -> None:
    prunable = PrunableModel(tiny_model("llama"))
    prunable.cut(UNEVEN)
    prunable.halves[1].consumer.bias = parameter(torch.ones(32))
    save_pruned(prunable, byte_level(), tmp_path / "model")
    with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj.bias") as caught:
        export(tmp_path / "model", tmp_path / "nas", name="nemotron-nas")
    assert "--calibration ridge" in str(caught.value.hint)


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    saved(tmp_path / "model", UNEVEN)
    (tmp_path / "nas").mkdir()
    (tmp_path / "nas" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        export(tmp_path / "model", tmp_path / "nas", name="nemotron-nas")
    assert (tmp_path / "nas" / "mine.txt").read_text() == "mine"


def test_the_model_itself_is_never_overwritten(tmp_path: Path) -> None:
    saved(tmp_path / "model", UNEVEN)
    with pytest.raises(OutputError, match="would delete the model"):
        export(tmp_path / "model", tmp_path / "model", name="nemotron-nas", overwrite=True)
    assert (tmp_path / "model" / "modeling_ffgym.py").is_file()


def test_the_dense_model_of_the_run_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even from where another folder has its name."""
    saved(tmp_path / "models" / "mine", (2, 48) * 3)
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "run" / "model", UNEVEN, origin=origin_from("models/mine", None, {}))
    for place in ("models/mine", "models"):
        with pytest.raises(OutputError, match=f"would delete the dense model in {tmp_path}/models/mine"):
            export(tmp_path / "run", Path(place), name="nemotron-nas", overwrite=True)
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(OutputError, match="would delete the dense model"):
        export(tmp_path / "run", tmp_path / "models" / "mine", name="nemotron-nas", overwrite=True)
    assert (tmp_path / "models" / "mine" / "modeling_ffgym.py").is_file()


@pytest.mark.parametrize("command", ["eval", "export"])
def test_an_export_is_no_model_for_ffgym(tmp_path: Path, command: str) -> None:
    """And no newer transformers reads it."""
    _, folder, _ = written(tmp_path, UNEVEN)
    more = {"eval": ["--tasks", "loss"], "export": ["--gguf", str(tmp_path / "m.gguf")]}[command]
    result = CliRunner().invoke(app, [command, str(folder), *more])
    assert result.exit_code == 1
    assert "is a nemotron-nas export for other software" in result.stderr
    assert "Name the folder that it was made from." in result.stderr


def test_progress_begins_at_0_and_reaches_the_end(tmp_path: Path) -> None:
    saved(tmp_path / "model", UNEVEN)
    seen: list[tuple[int, int]] = []
    export(tmp_path / "model", tmp_path / "nas", name="nemotron-nas", progress=lambda *said: seen.append(said))
    assert seen == [(done, 4) for done in range(5)]


def test_it_is_replaced_where_asked_for(tmp_path: Path) -> None:
    _, folder, _ = written(tmp_path, UNEVEN)
    (folder / "model-00009-of-00009.safetensors").write_text("old")
    export(tmp_path / "model", folder, name="nemotron-nas", overwrite=True)
    assert not (folder / "model-00009-of-00009.safetensors").exists()


def test_the_dtype_is_that_of_the_weights_where_the_config_says_none(tmp_path: Path) -> None:
    saved(tmp_path / "model", UNEVEN)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "dtype": None}))
    export(tmp_path / "model", tmp_path / "nas", name="nemotron-nas")
    assert json.loads((tmp_path / "nas" / "config.json").read_text())["torch_dtype"] == "float32"


def test_the_command_says_how_to_run_it(tmp_path: Path) -> None:
    saved(tmp_path / "model", UNEVEN)
    arguments = ["export", str(tmp_path / "model"), "--format", "nemotron-nas", "--output", str(tmp_path / "nas")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "mlx_lm generate" in result.output
