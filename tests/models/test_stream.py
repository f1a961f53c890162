"""A model whose layers stay on the disk: the same bits as in memory, each layer read once, and clear refusals."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from safetensors.torch import load_file

from ffgym.agents.pathwise import Pathwise
from ffgym.config.toml import load_config
from ffgym.criteria.taylor import Taylor
from ffgym.criteria.wanda import Wanda
from ffgym.envs.schedule import Schedule
from ffgym.envs.vector import PruningVectorEnv
from ffgym.errors import AssetError, ModelError, OutputError
from ffgym.evaluation.evaluator import ModelEvaluator, Request
from ffgym.evaluation.perplexity import evaluate, evaluate_cut
from ffgym.export.checkpoint import save_pruned
from ffgym.heuristics.uniform import Uniform
from ffgym.models.cut import PrunableModel
from ffgym.models.loading import load
from ffgym.models.stream import LayerStream, streamed_model
from ffgym.pipeline.make_env import make_pruning_env
from ffgym.plugins.bases import Criterion
from ffgym.plugins.contracts import check_importance
from ffgym.prepare.paths import OnLayer, Prepared, prepare
from ffgym.prepare.store import opened_or_prepared, store_key, weights_digest
from ffgym.testing.models import tiny_model

WINDOWS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny llama, in more than one shard."""
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="40kB")
    return tmp_path / "model"


def on_disk(folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> tuple[Any, LayerStream]:
    return streamed_model(folder.name, folder, dtype, device)


def prepared_from_disk(
    folder: Path,
    calibration: str = "ridge",
    *,
    criterion: Criterion | None = None,
    keep: frozenset[str] = frozenset(),
    device: torch.device = CPU,
) -> Prepared:
    model, stream = on_disk(folder, device=device)
    scores = criterion or Wanda()

    facts: dict[str, Any] = {"ridge": 0.01, "calibration": calibration, "keep": keep}

    def make(on_layer: OnLayer) -> Prepared:
        return prepare(model, scores, WINDOWS, source=stream, on_layer=on_layer, **facts)

    key = store_key(model, scores, WINDOWS, facts, weights_digest(model, stream))
    return opened_or_prepared(key, model, make, {}, lambda line: None, stream)


def in_memory(folder: Path, calibration: str = "ridge") -> Prepared:
    return prepare(load_model(folder), Wanda(), WINDOWS, ridge=0.01, calibration=calibration)


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def some_cut(prepared: Prepared) -> tuple[int, ...]:
    """A sublayer of every kind: cut, emptied, whole."""
    units = prepared.prunable.dense_units
    return (max(1, units[0] // 2), units[1] // 3, 0, 0, *units[4:])


def saved(prepared: Prepared, place: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    save_pruned(prepared.prunable, None, place, dtype=dtype)
    return {name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("calibration", ["ridge", "affine"])
@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_everything_has_the_bits_of_the_model_in_memory(family: str, calibration: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model(family).save_pretrained(folder, max_shard_size="40kB")
    here, there = in_memory(folder, calibration), prepared_from_disk(folder, calibration)
    kept = some_cut(here)
    requests = [
        Request(kept, (0, 1, 2), needs=frozenset({"kl", "slopes"})),
        Request((kept[0], *here.prunable.dense_units[1:]), (1, 2)),
    ]
    found = []
    for name, prepared in {"here": here, "there": there}.items():
        prunable = prepared.prunable
        measured = ModelEvaluator(prunable, WINDOWS).measure(requests)
        slopes = measured[0].slopes
        assert slopes is not None
        prunable.cut(kept)
        numbers = [[m.losses, m.kls] for m in measured], evaluate_cut(prunable, WINDOWS).losses, prepared.ridges
        weights = saved(prepared, tmp_path / name), saved(prepared, tmp_path / f"{name}-16", torch.bfloat16)
        found.append((numbers, slopes, *weights))
        prunable.restore()
    (numbers, slopes, *weights), (numbers2, slopes2, *weights2) = found
    assert numbers == numbers2
    assert all(np.array_equal(one, other) for one, other in zip(slopes, slopes2, strict=True))
    for one, other in zip(weights, weights2, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
    for view, other_view in zip(here.views, there.views, strict=True):
        assert torch.equal(view.weight, other_view.weight)
        assert torch.equal(view.unit_scores, other_view.unit_scores)
        assert np.array_equal(view.removal_error, other_view.removal_error)


def test_a_store_that_is_damaged_while_it_is_in_use_is_named(folder: Path) -> None:
    prepared = prepared_from_disk(folder)
    assert prepared.store is not None
    file = prepared.store / "layer-001.safetensors"
    os.truncate(file, 2000)
    with pytest.raises(AssetError, match=re.escape(str(file))) as raised:
        ModelEvaluator(prepared.prunable, WINDOWS).measure([Request((1,) * 6, (0,))])
    assert str(prepared.store) in str(raised.value.hint)


def test_a_checkpoint_that_is_damaged_while_it_is_in_use_is_named(folder: Path) -> None:
    prunable = PrunableModel(*on_disk(folder))
    for file in folder.glob("*.safetensors"):
        os.truncate(file, 2000)
    with pytest.raises(ModelError, match=r"layers\.1\..* cannot be read from .*\.safetensors"), prunable.layer(1):
        pass


def test_what_was_saved_a_layer_to_a_file_loads(folder: Path, tmp_path: Path, word_tokenizer: Any) -> None:
    prepared = prepared_from_disk(folder)
    prepared.prunable.cut(some_cut(prepared))
    losses = evaluate_cut(prepared.prunable, WINDOWS).losses
    saved(prepared, tmp_path / "saved")
    word_tokenizer.save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    model = load(str(tmp_path / "saved"), dtype="float32", device="cpu", any_family=True).model
    assert evaluate(model, WINDOWS).losses == losses


def test_settings_of_generation_are_found_in_old_configs(folder: Path, word_tokenizer: Any) -> None:
    word_tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "temperature": 0.7, "max_length": 20}))
    here, there = (load(str(folder), dtype="float32", device="cpu", streamed=streamed) for streamed in (False, True))
    assert there.model.generation_config.max_length == 20
    assert there.model.generation_config.to_dict() == here.model.generation_config.to_dict()


def test_first_order_statistics_have_the_bits_too(folder: Path) -> None:
    keep = frozenset({"gradient", "output_gradient"})
    here = prepare(load_model(folder), Taylor(), WINDOWS, ridge=0.01, keep=keep)
    there = prepared_from_disk(folder, criterion=Taylor(), keep=keep)
    for view, other in zip(here.views, there.views, strict=True):
        for name in keep:
            assert torch.equal(getattr(view.stats, name), getattr(other.stats, name))
        assert torch.equal(view.unit_scores, other.unit_scores)
        assert view.loss_increase is not None
        assert other.loss_increase is not None
        assert np.array_equal(view.loss_increase, other.loss_increase)


def test_an_agent_that_follows_slopes_searches_a_streamed_model_too(tiny_run: Any) -> None:
    histories = []
    for placement in ("resident", "stream"):
        env = make_pruning_env(load_config(**tiny_run | {"model": tiny_run["model"] | {"placement": placement}}))
        vector = PruningVectorEnv(env, Schedule(env.sparsity, 2), num_envs=1, token_budget=1200, slope_episodes=1)
        Pathwise().learn(vector, seed=0, on_update=lambda update: None)
        histories.append([(episode.kept, episode.reward, episode.slopes) for episode in vector.history])
    assert len(histories[0]) > 1
    assert histories[0] == histories[1]


def test_nothing_temporary_is_left_of_a_preparation(folder: Path, tmp_path: Path) -> None:
    prepared_from_disk(folder, criterion=Taylor())
    left = {path.name for path in (tmp_path / "cache").iterdir()} - {"digests.txt"}
    assert left == {"prepared"}, "gradients are as large as weights"


def test_a_disk_that_fills_up_is_named(folder: Path, small_files: Any) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*File too large"), small_files(1000):
        prepared_from_disk(folder, criterion=Taylor())


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=ON_GPU)], ids=str)
def test_both_placements_share_a_store(folder: Path, device: torch.device) -> None:
    model, stream = on_disk(folder, device=device)
    here = load_model(folder).to(device)
    digests = weights_digest(model, stream), weights_digest(here)
    assert digests[0] == digests[1]
    assert store_key(model, Wanda(), WINDOWS, {}, digests[0]) == store_key(here, Wanda(), WINDOWS, {}, digests[1])


def test_weights_on_the_disk_are_read_once_for_their_digest(folder: Path) -> None:
    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    first, again = on_disk(folder), on_disk(folder)
    digest = weights_digest(*first)
    before = read()
    assert weights_digest(*again) == digest
    assert read() - before < sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 10
    tiny_model("llama", seed=1).save_pretrained(folder)
    assert weights_digest(*on_disk(folder)) != digest


def test_between_layers_nothing_but_sizes_is_in_memory(folder: Path) -> None:
    prepared = prepared_from_disk(folder)
    prunable = prepared.prunable
    kept = some_cut(prepared)
    prunable.cut(kept)
    here = in_memory(folder).prunable
    here.cut(kept)
    for half, other in zip(prunable.halves, here.halves, strict=True):
        assert half.consumer.weight.is_meta
        assert half.consumer.weight.shape == other.consumer.weight.shape
        assert half.new_bias_params() == other.new_bias_params()
    evaluate_cut(prunable, WINDOWS)
    with prunable.layer(1) as halves:
        assert not any(half.consumer.weight.is_meta for half in halves)
    assert all(half.consumer.weight.is_meta for half in prunable.halves)


def test_an_update_reads_each_layer_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepared_from_disk(folder)
    read = Counter[int]()
    fetch = LayerStream._fetch
    monkeypatch.setattr(LayerStream, "_fetch", lambda self, layer: read.update([layer]) or fetch(self, layer))
    kept = some_cut(prepared)
    requests = [Request((units, *kept[1:]), (0, 1)) for units in (1, 2)] * 2
    evaluator = ModelEvaluator(prepared.prunable, WINDOWS)
    evaluator.measure(requests)
    assert read == {0: 1, 1: 1, 2: 1}


def test_no_layer_is_read_for_a_heuristic_that_looks_at_none(folder: Path) -> None:
    views = prepared_from_disk(folder).views
    for file in folder.glob("*.safetensors"):
        os.truncate(file, 2000)
    check_importance(Uniform(), views)
    with pytest.raises(ModelError, match="cannot be read"):
        _ = views[2].weight


def test_after_an_error_inside_a_layer_it_goes_on(folder: Path) -> None:
    prunable = prepared_from_disk(folder).prunable
    wanted = evaluate_cut(prunable, WINDOWS).losses
    with pytest.raises(KeyboardInterrupt), prunable.layer(1):
        raise KeyboardInterrupt
    assert evaluate_cut(prunable, WINDOWS).losses == wanted


class TestRefuses:
    def test_a_missing_shard(self, folder: Path) -> None:
        sorted(folder.glob("*.safetensors"))[1].unlink()
        with pytest.raises(ModelError, match=r"lacks model-00002-of-\d+\.safetensors"):
            load(str(folder), device="cpu", dtype="float32", streamed=True)

    def test_a_missing_weight(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        lost = content["weight_map"]["model.layers.2.mlp.up_proj.weight"]
        for name, file in list(content["weight_map"].items()):
            if file == lost:
                del content["weight_map"][name]
        index.write_text(json.dumps(content))
        with pytest.raises(ModelError, match="weights are not in the checkpoint"):
            on_disk(folder)


@ON_GPU
def test_on_a_gpu_layers_come_on_a_stream_of_their_own(folder: Path) -> None:
    cuda = torch.device("cuda")
    prunable = prepared_from_disk(folder, device=cuda).prunable
    here = prepare(load_model(folder).to(cuda), Wanda(), WINDOWS, ridge=0.01).prunable
    for each in (prunable, here):
        each.cut(some_cut_of(each))
    assert evaluate_cut(prunable, WINDOWS).losses == evaluate_cut(here, WINDOWS).losses


def some_cut_of(prunable: PrunableModel) -> tuple[int, ...]:
    return tuple(max(1, units // 2) for units in prunable.dense_units)
