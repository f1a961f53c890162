"""Timing runs the sublayers that it says it runs, and leaves the model as it was. How fast they are is not tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES

from ffgym.costs import sublayer_times
from ffgym.costs.latency_table import layer_shapes
from ffgym.costs.sublayer_times import _probes, processor, time_model
from ffgym.models.cut import PrunableModel
from ffgym.testing.models import tiny_model

CONTEXT = 16


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_a_table_of_every_family(family):
    model = tiny_model(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    done = []
    table = time_model(model, context=CONTEXT, repetitions=2, on_progress=lambda *at: done.append(at))
    assert done == [(1, 3), (2, 3), (3, 3)]
    table.check_fits(model, context=CONTEXT, source="")
    assert [curve.shape for curve in table.curves] == list(dict.fromkeys(layer_shapes(model)))
    assert [curve.sizes[-1] for curve in table.curves] == [curve.shape.units for curve in table.curves]
    for curve in table.curves:
        for low, middle, high in zip(curve.low, curve.seconds, curve.high, strict=True):
            assert 0 < low <= middle <= high
    assert (table.dtype, table.repetitions, table.threads) == ("float32", 2, torch.get_num_threads())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.shape == before[name].shape for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
@torch.inference_mode()
def test_what_is_timed_is_the_sublayer_as_the_model_runs_it(family):
    """Cut to the same size, the copy gives the same output that the model's own sublayer gives inside the model."""
    model = tiny_model(family)
    ids = torch.arange(CONTEXT)[None]
    attention, mlp = _probes(model, ids)
    prunable = PrunableModel(model)
    for probe, units, half in ((attention, 1, prunable.halves[0]), (mlp, 20, prunable.halves[1])):
        probe.half.cut(units, calibrated=False)
        timed = probe.call()
        timed = timed[0] if isinstance(timed, tuple) else timed
        half.cut(units, calibrated=False)
        seen = []
        handle = half.consumer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        if probe is mlp:
            prunable.halves[0].restore()
        model(input_ids=ids)
        handle.remove()
        assert torch.equal(timed.reshape(seen[0].shape), seen[0])


def test_every_size_is_timed_once_a_round_and_the_whole_model_too(monkeypatch):
    cut = []
    original = sublayer_times.PrunableSublayer.cut

    def counted(self, units, **options):
        cut.append((self.sublayer.kind, units))
        original(self, units, **options)

    monkeypatch.setattr(sublayer_times.PrunableSublayer, "cut", counted)
    monkeypatch.setattr(sublayer_times, "LEAST_SECONDS", 0.0)  # else calls are repeated
    model = tiny_model("llama", layers=1)
    forwards = []
    model.get_output_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    table = time_model(model, context=CONTEXT, repetitions=3)
    points = [(curve.shape.kind, size) for curve in table.curves for size in curve.sizes]
    rounds = [cut[start : start + len(points)] for start in range(0, len(cut), len(points))]
    assert [sorted(each) for each in rounds] == [sorted(points)] * 4
    assert rounds[1] != rounds[2], "the order is drawn anew"
    assert len(forwards) == 3 + 3  # the first sample calls it once more, to warm up, and twice


def test_the_processor_has_the_name_that_linux_gives_it():
    facts = Path("/proc/cpuinfo")
    if not facts.exists() or "model name" not in facts.read_text():
        pytest.skip("Linux on an x86 processor gives one")
    name, _, capability = processor(torch.device("cpu")).rpartition(" (")
    assert f": {name}\n" in facts.read_text()
    assert capability == f"{torch.backends.cpu.get_cpu_capability()})"


def test_off_linux_the_processor_has_a_name_too(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert len(processor(torch.device("cpu"))) > 3
