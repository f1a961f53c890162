"""Memory is that of a process that has done nothing else; a process that dies is an error."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from glass_runs import glass_home

import ffgym.measure.speed  # noqa: F401 - it keeps what it imports, and must not keep what a test puts there
from ffgym.errors import ModelError
from ffgym.export.checkpoint import save_pruned
from ffgym.measure import memory
from ffgym.measure.memory import Memory, MemoryProbe, measure_memory
from ffgym.models import loading, placement
from ffgym.models.cut import PrunableModel

CUDA = torch.device("cuda", 0)


@pytest.fixture
def probe():
    return MemoryProbe(str(glass_home() / "glass"), None, "float32", "cpu", threads=1, batch=2, length=32)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what is resident")
def test_a_fresh_process_measures_itself_and_a_pruned_model_takes_what_its_parameters_say(
    probe, tmp_path, word_tokenizer
):
    """Large enough (50 MB of MLPs, an eighth of which stays) for the system's pages not to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
    prunable = PrunableModel(LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=128, **sizes)))
    kept = {"dense": (8, 2048) * 4, "pruned": (8, 256) * 4}
    found, parameters = {}, {}
    hoard = bytearray(2**30)  # a peak of this process that its children must not inherit
    hoard[:: 2**12] = b"x" * len(range(0, 2**30, 2**12))
    for name, units in kept.items():
        prunable.cut(units)
        folder = tmp_path / name
        saved = save_pruned(prunable, word_tokenizer, folder)
        parameters[name] = saved.parameters
        found[name] = measure_memory(replace(probe, name=str(folder)))
        shutil.rmtree(folder)
        assert found[name].kind == "resident"
        assert 0 < found[name].before < found[name].loaded <= found[name].peak < len(hoard)
        assert found[name].net_loaded == found[name].loaded - found[name].before > 0.9 * 4 * parameters[name]
    said = 4 * (parameters["dense"] - parameters["pruned"])
    assert said == 4 * 4 * 3 * 512 * (2048 - 256)
    print(said, found)  # shown where the test fails
    assert found["dense"].net_loaded - found["pruned"].net_loaded == pytest.approx(said, rel=0.25)
    assert found["dense"].net_peak - found["pruned"].net_peak == pytest.approx(said, rel=0.25)


def test_a_process_that_fails_is_an_error(probe):
    with pytest.raises(ModelError, match=r"memory of 'no/such/folder' failed: .*no/such/folder") as raised:
        measure_memory(replace(probe, name="no/such/folder"))
    assert "Check the path" not in raised.value.message, "the reason, not its hint"
    assert "--batch-sizes" in raised.value.hint


def test_a_process_that_is_killed_is_an_error(probe, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, "", "warnings.warn('something harmless')")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    with pytest.raises(ModelError, match="failed: it was ended by signal 9"):
        measure_memory(probe)


def test_a_system_that_does_not_say_is_no_figure(probe, monkeypatch):
    silent = subprocess.CompletedProcess([], 0, "a library talks\nnull\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: silent)
    assert measure_memory(probe) is None


def test_on_several_gpus_it_is_their_sum(probe, monkeypatch):
    real, places = loading.load, (CUDA, torch.device("cuda", 1))
    monkeypatch.setattr(loading, "load", lambda *args, **options: replace(real(*args, **options), device=CUDA))
    monkeypatch.setattr(placement, "devices_of", lambda model: set(places))
    monkeypatch.setattr(torch.cuda, "memory_allocated", dict(zip(places, (300, 200), strict=True)).get)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", dict(zip(places, (500, 400), strict=True)).get)
    assert memory._run(probe) == Memory("cuda", before=0, loaded=500, peak=900)


def test_of_other_accelerators_there_is_no_figure(probe, monkeypatch):
    real = loading.load
    monkeypatch.setattr(
        loading, "load", lambda *args, **options: replace(real(*args, **options), device=torch.device("mps"))
    )
    assert memory._run(probe) is None


def test_where_the_peak_of_loading_is_not_forgotten_there_is_no_figure(probe, monkeypatch):
    def refused(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refused)  # of /proc/self/clear_refs
    assert memory._run(probe) is None
