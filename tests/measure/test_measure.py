"""`ffgym measure` and `ffgym latency` on small models: what is found, written and refused. No speed is tested."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from glass_runs import glass_home
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.costs.latency_table import read_table
from ffgym.errors import BudgetError, ConfigError, ModelError
from ffgym.measure.measure import latency_table, measure
from ffgym.measure.memory import Memory, MemoryProbe
from ffgym.measure.table import Measurement
from ffgym.models.loading import load
from ffgym.testing.models import tiny_model


def make_up_memory(patch: pytest.MonkeyPatch) -> list[MemoryProbe]:
    """Memory is made up instead of measured in processes of their own; what these would have done."""
    jobs: list[MemoryProbe] = []

    def run(command: list[str], **_: Any) -> Any:
        jobs.append(MemoryProbe(**json.loads(command[-1])))
        made_up = Memory("resident", 1000, 5000 - 1000 * len(jobs), 9000 - 1000 * len(jobs))
        return subprocess.CompletedProcess(command, 0, json.dumps(asdict(made_up)))

    patch.setattr(subprocess, "run", run)
    return jobs


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> list[MemoryProbe]:
    return make_up_memory(monkeypatch)


def measure_quickly(folder: Path, **changes: Any) -> Measurement:
    quick: dict[str, Any] = {"batch_sizes": (1,), "prompt_lengths": (16,), "repetitions": 1}
    quick |= {"dtype": "float32", "device": "cpu"}
    return measure(folder, **(quick | changes))


# what is found


@pytest.fixture(scope="module")
def found(run: Path) -> Measurement:
    """One whole measurement."""
    with pytest.MonkeyPatch.context() as patch:
        make_up_memory(patch)
        return measure_quickly(run / "model", batch_sizes=(1, 2), prompt_lengths=(8, 16), repetitions=2)


def test_every_workload_is_measured_in_both_phases(found: Measurement) -> None:
    assert [(each.phase, each.workload.batch, each.workload.length) for each in found.speeds] == [
        (phase, batch, length) for batch in (1, 2) for length in (8, 16) for phase in ("prefill", "decode")
    ]
    for each in found.speeds:
        assert 0 < each.ratio.low <= each.ratio.median <= each.ratio.high
        assert each.ceiling > 1


def test_sizes_are_those_of_the_models(found: Measurement, run: Path) -> None:
    dense, pruned = load(str(glass_home() / "glass"), dtype="float32"), load(str(run / "model"), dtype="float32")
    for footprint, loaded in ((found.dense, dense), (found.pruned, pruned)):
        parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
        assert (footprint.parameters, footprint.weight_bytes) == (parameters, 4 * parameters)
    assert found.dense.parameters == 852_608
    assert found.pruned.parameters < found.dense.parameters
    assert found.pruned.macs < found.dense.macs
    assert found.pruned.kv_bytes == found.dense.kv_bytes * 6 / 8  # KV groups
    assert found.pruned.disk_bytes == (run / "model" / "model.safetensors").stat().st_size
    assert (found.dense.disk_dtype, found.context, found.memory_work) == ("float32", 16, (2, 16))


def test_how_it_was_measured_is_recorded(found: Measurement) -> None:
    assert (found.dtype, found.threads, found.repetitions) == ("float32", torch.get_num_threads(), 2)
    assert found.torch == torch.__version__
    assert found.device


def test_the_run_folder_will_do_and_threads_are_put_back(run: Path, no_children: list[MemoryProbe]) -> None:
    before = torch.get_num_threads()
    result = measure_quickly(run, threads=before + 1)
    assert result.threads == before + 1
    assert torch.get_num_threads() == before
    assert [(job.name, job.threads, job.batch, job.length) for job in no_children] == [
        (str(glass_home() / "glass"), before + 1, 1, 16),
        (str(run / "model"), before + 1, 1, 16),
    ]
    assert [each.memory and each.memory.loaded for each in (result.dense, result.pruned)] == [4000, 3000]


def test_the_dense_model_can_be_named(run: Path, no_children: list[MemoryProbe], tmp_path: Path) -> None:
    alone = shutil.copytree(run / "model", tmp_path / "alone", ignore=shutil.ignore_patterns("ffgym.json"))
    with pytest.raises(ConfigError, match="cannot tell which dense model") as caught:
        measure_quickly(alone)
    assert "--dense" in str(caught.value.hint)
    result = measure_quickly(alone, dense=str(glass_home() / "glass"))
    assert result.dense.parameters == 852_608


def test_the_callers_autocast_is_not_what_is_timed(
    run: Path, no_children: list[MemoryProbe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path))
    modes: set[bool] = set()
    watch = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: modes.add(torch.is_autocast_enabled("cpu"))
    )
    with watch, torch.autocast("cpu", dtype=torch.bfloat16):
        measure_quickly(run)
        latency_table(str(glass_home() / "glass"), 16, repetitions=1)
    assert modes == {False}


def test_a_model_beside_itself_is_no_smaller(no_children: list[MemoryProbe]) -> None:
    glass = glass_home() / "glass"
    result = measure_quickly(glass, dense=str(glass))
    assert {each.ceiling for each in result.speeds} == {1.0}
    assert result.dense.macs == result.pruned.macs


def test_lengths_that_nobody_named_are_those_that_fit(run: Path, no_children: list[MemoryProbe]) -> None:
    result = measure_quickly(run, prompt_lengths=None)
    assert {each.workload.length for each in result.speeds} == {112}  # 128 positions, 16 of them to decode


# what is refused


def test_prompts_that_are_too_long(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--prompt-lengths 120: the models take at most 128 tokens") as raised:
        measure_quickly(run, prompt_lengths=(16, 120))
    assert "at most 112" in str(raised.value.hint)
    assert capsys.readouterr().err == "", "before either model is loaded"


def test_prompts_that_do_not_fit_the_memory(run: Path) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with (
        torch.nn.modules.module.register_module_forward_pre_hook(full),
        pytest.raises(ModelError, match="1 x 16 tokens do not fit") as raised,
    ):
        measure_quickly(run)
    assert "--batch-sizes" in str(raised.value.hint)


def test_a_dense_model_of_another_family(run: Path, tmp_path: Path) -> None:
    tiny_model("opt").save_pretrained(tmp_path / "opt")
    for file in (glass_home() / "glass").glob("*token*"):
        shutil.copy(file, tmp_path / "opt")
    with pytest.raises(ModelError, match="pruned model is of family 'llama', the dense one of 'opt'"):
        measure_quickly(run, dense=str(tmp_path / "opt"))


def test_a_record_that_leads_nowhere_is_named(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "model" / "ffgym.json").write_text('{"dense": "no/such/folder/here"}')
    with pytest.raises(ModelError, match=r"ffgym\.json names 'no/such/folder/here' as the dense model") as raised:
        measure_quickly(moved)
    assert "--dense" in str(raised.value.hint)


@pytest.mark.parametrize("name", ["measure.txt", "measure", "measure.md", "measure.md/x.md"])
def test_an_output_that_cannot_be_written_is_refused_first(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "measure.md").write_text("mine")
    done = call("measure", str(run), "--output", str(tmp_path / name))
    assert done.exit_code == 1
    assert "hint: " in done.stderr
    assert "done in" not in done.stderr, "no model was loaded"
    assert (tmp_path / "measure.md").read_text() == "mine"


# the commands


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_prints_the_tables_or_pure_data_and_writes_what_the_suffix_says(
    run: Path, no_children: list[MemoryProbe], tmp_path: Path
) -> None:
    quick = ["measure", str(run), "--batch-sizes", "1,2", "--prompt-lengths", "8", "--repetitions", "1"]
    markdown, data = tmp_path / "new" / "measure.md", tmp_path / "measure.json"
    done = call(*quick, "--output", str(markdown))
    assert done.exit_code == 0, done.stderr
    for part in ("parameters", "852.6 k", "prefill", "decode", "peak memory", "times as fast"):
        assert part in done.stdout
    assert "speed, in turn: done" in done.stderr
    assert markdown.read_text().startswith("|  | dense | pruned |")
    done = call(*quick, "--json", "--output", str(data))
    assert json.loads(done.stdout)["pruned"]["model"] == "folder model"
    assert json.loads(data.read_text())["dense"]["parameters"] == 852_608


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--batch-sizes", value) for value in ("", "1,0")),
        *(("--prompt-lengths", value) for value in ("", "-5", "16,many")),
        *(("--repetitions", value) for value in ("0", "few")),
        ("--threads", "0"),
        ("--output-tokens", "1"),
        ("--engine", "vlm"),
    ],
)
def test_options_that_mean_nothing(run: Path, option: str, value: str) -> None:
    done = call("measure", str(run), option, value)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Invalid value for" in done.stderr
    assert option in done.stderr


# latency tables


def test_latency_is_timed_once_shown_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    glass = str(glass_home() / "glass")
    arguments = ["latency", glass, "--context", "64", "--dtype", "float32", "--repetitions", "2"]
    shown = []
    for options in ([], ["--json"], ["--json"], ["--json", "--rebuild", "--output", str(tmp_path / "table.json")]):
        done = call(*arguments, *options)
        assert done.exit_code == 0, done.stderr
        assert "from the cache" not in done.stderr
        shown.append(done.stdout)
    assert "attention" in shown[0]
    assert json.loads(shown[1])["context"] == 64
    assert shown[1] == shown[2] != shown[3], "times differ whenever they are taken"
    again = call(*arguments[:-1], "5")
    assert "from the cache, where each was timed 2 times; --rebuild times again" in again.stderr
    written = read_table(tmp_path / "table.json")
    written.check_fits(load(glass, dtype="float32").model, context=64, source="")


def test_latency_of_what_cannot_be_timed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    glass = str(glass_home() / "glass")
    with pytest.raises(ModelError, match="already pruned by ffgym"):
        latency_table(str(run / "model"), 64)
    with pytest.raises(BudgetError, match="at most 128"):
        latency_table(glass, 1024)
    assert capsys.readouterr().err.count("load the model") == 1, "too long a context is refused before that"
    done = call("latency", glass, "--output", str(tmp_path / "table.md"))
    assert done.exit_code == 1
    assert "Use a name that ends in .json" in done.stderr
    for wrong in (("--context", "0"), ("--repetitions", "0"), ("--threads", "-1"), ("--output-tokens", "1")):
        assert call("latency", glass, *wrong).exit_code == 2
