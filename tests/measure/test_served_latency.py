"""`ffgym latency --engine`: the times of sublayers in an engine. The engine is a fake one, with a pace."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_engine import noted
from glass_runs import glass_home
from tiny_tokenizers import byte_level
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.costs.latency_table import LatencyTable
from ffgym.costs.resource import CostSetting, resource_named
from ffgym.errors import BudgetError, ConfigError, ModelError, OutputError
from ffgym.measure import served_latency
from ffgym.measure.bursts import Answer, Burst
from ffgym.measure.served_latency import served_latency_table
from ffgym.measure.server import Server
from ffgym.models.loading import load
from ffgym.testing.models import tiny_model

GLASS = str(glass_home() / "glass")
QUICK: dict[str, Any] = {"context": 24, "output_tokens": 2, "repetitions": 2, "requests": 2}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))


def timed(**changes: Any) -> LatencyTable:
    given = {"model": GLASS, "engine": "vllm"} | QUICK | changes
    return served_latency_table(**given)[0]


def pace(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, int], float]) -> None:
    """Let an answer take so long by the units of each attention and each MLP of its model."""

    def serve(servers: Any, workloads: Any, *_: Any, **__: Any) -> Any:
        def burst(server: Server) -> Burst:
            kind, _, size = server.role.partition(" ")
            sizes = {"attention": 2, "mlp": 341} | ({kind: int(size)} if size else {})
            return Burst((Answer(2, 7.0, 7.0, 7.0 + seconds(*sizes.values())),))

        return {(server.role, load): [burst(server)] * 2 for server in servers for load in workloads}

    monkeypatch.setattr(served_latency, "serve_in_turn", serve)


@pytest.fixture
def paced(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer takes 0.1 s and half a millisecond for every channel of the 4 MLPs."""
    pace(monkeypatch, lambda attention, mlp: 0.1 + 4 * 5e-4 * mlp)


@pytest.mark.usefixtures("paced")
def test_a_sublayer_takes_its_share_of_what_its_units_add() -> None:
    table = timed()
    _, mlp = table.curves
    assert mlp.sizes == (1, 85, 170, 256, 341)
    assert mlp.seconds == pytest.approx([5e-4 * size for size in mlp.sizes])
    assert table.whole_seconds == pytest.approx(0.1 + 4 * mlp.seconds[-1])


def test_sublayers_that_add_up_to_more_than_the_whole_are_too_noisy_for_a_budget(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for least, is_said in ((0.6, False), (0.2, True)):  # of the time, without attention or without MLP
        share = 1 - least
        pace(monkeypatch, lambda attention, mlp, share=share: 1 - share * (2 - attention / 2 - mlp / 341))
        for rebuild in (True, False):
            timed(rebuild=rebuild)
            said = f"the sublayers add up to {2e3 * share:,.3f} ms, more than the 1,000.000 ms of the whole model"
            assert (said in capsys.readouterr().err) == is_said


@pytest.mark.usefixtures("paced")
def test_the_same_engine_on_another_device_is_timed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert timed().device != "Abacus"
    monkeypatch.setenv("FFGYM_VLLM_PYTHON", str(shutil.copy(tmp_path / "python", tmp_path / "python-there")))
    monkeypatch.setenv("FAKE_GPU", "Abacus")
    assert timed().device == "Abacus"


@pytest.mark.usefixtures("paced")
def test_an_engine_on_a_gpu_serves_the_dtype_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GPU", "Abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert timed().dtype == "float16"
    assert timed(dtype="float32").dtype == "float32", "what is asked for wins"


def test_a_table_is_timed_once_for_an_engine_and_what_it_is_asked(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = timed()
    started = len(noted(log, "started"))
    assert started == 1 + sum(len(curve.sizes) - 1 for curve in table.curves)
    assert len({line["asked"] for line in noted(log, "asked")}) == started
    assert len(noted(log, "asked")) == started * 3 * 2, "twice after a warm-up"
    assert timed() == table
    assert len(noted(log, "started")) == started
    capsys.readouterr()
    timed(repetitions=9)
    assert "from the cache, where each was timed 2 times; --rebuild times again" in capsys.readouterr().err
    assert "vllm-fake 9.9" in table.measured
    assert "2 requests at the same moment, prompts of 22 tokens and answers of 2" in table.measured
    timed(requests=1)
    assert len(noted(log, "started")) == 2 * started


def test_a_run_counts_the_times_of_an_engine(log: Path, tmp_path: Path) -> None:
    output = tmp_path / "served.json"
    asked = ["--context", "24", "--output-tokens", "2", "--repetitions", "1", "--output", str(output)]
    done = CliRunner().invoke(app, ["latency", GLASS, "--engine", "vllm", *asked])
    assert done.exit_code == 0, done.stderr
    assert "vllm-fake 9.9" in done.stdout
    model = load(GLASS).model
    resource = resource_named("latency")
    costs = resource.measure(model, CostSetting(24, 4), file=output, on_progress=None, notify=None)
    assert costs.measurement is not None
    assert "prompts of 22 tokens" in costs.measurement.summary
    with pytest.raises(BudgetError, match="timed on 24 tokens"):
        resource.measure(model, CostSetting(48, 4), file=output, on_progress=None, notify=None)


def test_an_engine_that_is_not_installed_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFGYM_VLLM_PYTHON", "/no/such/python")
    with pytest.raises(ModelError, match="FFGYM_VLLM_PYTHON names /no/such/python, which is no program"):
        timed(model="no/such/model")


def test_a_disk_without_room_for_the_models_is_refused_before_one_is_saved(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match=r"what vllm is to serve takes .* are free in") as raised:
        timed()
    assert "TMPDIR" in str(raised.value.hint)


def test_a_model_that_llama_cpp_cannot_say_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama-server").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "model"
    tiny_model("granite").save_pretrained(folder)
    byte_level().save_pretrained(folder)
    with pytest.raises(ModelError, match="the model 'dense': ffgym does not write models of family 'granite'"):
        timed(model=str(folder), engine="llama-cpp")


def test_bad_arguments_are_named(log: Path) -> None:
    for changes, said in (
        ({"output_tokens": 24}, "--output-tokens is 24, and a request has --context = 24 tokens"),
        ({"context": 128}, "--context 128: the model takes at most 128 tokens"),
    ):
        with pytest.raises(ConfigError, match=said):
            timed(**changes)
    for given, said in (
        (["--batch-size", "2"], "goes with --engine"),
        (["--engine", "vllm", "--device", "cpu"], "itself"),
    ):
        done = CliRunner().invoke(app, ["latency", GLASS, *given])
        assert done.exit_code == 2
        assert said in done.stderr
