"""A table is timed once and found again; what is damaged is timed again, with a word."""

from __future__ import annotations

import pytest
import torch
from latency_tables import made_up_table

from ffgym.costs.latency_cache import cached_table, place_of, timed_once
from ffgym.errors import BudgetError
from ffgym.testing.models import tiny_model
from ffgym.types import do_nothing


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def timed():
    """The repetitions of every table that was timed."""
    return []


@pytest.fixture
def ask(model, cache, timed):
    """``ask()``: the model's table, from the cache or made up."""

    def ask(*, rebuild=False, repetitions=9, notify=do_nothing):
        def time():
            timed.append(repetitions)
            return made_up_table(model).model_copy(update={"repetitions": repetitions})

        place = place_of(model, context=64)
        return timed_once(place, time, repetitions=repetitions, rebuild=rebuild, notify=notify)

    return ask


def test_is_timed_once(model, ask, timed):
    assert ask() == ask()
    assert len(timed) == 1
    assert [path.name for path in place_of(model, context=64).parent.iterdir()] == [place_of(model, context=64).name]


def test_rebuild_times_again(ask, timed):
    ask()
    ask(rebuild=True, repetitions=2)
    assert ask().repetitions == 2
    assert timed == [9, 2]


def test_another_context_dtype_thread_count_or_model_is_another_table(model):
    places = {place_of(model, context=64), place_of(model, context=32)}
    places |= {place_of(tiny_model("llama", dtype=torch.bfloat16), context=64)}
    places |= {place_of(tiny_model("llama", layers=2), context=64), place_of(tiny_model("gemma"), context=64)}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        places |= {place_of(model, context=64)}
    finally:
        torch.set_num_threads(threads)
    assert len(places) == 6


def test_another_machine_is_another_table(model):
    assert place_of(model, context=64, device="abacus") != place_of(model, context=64)


def test_another_torch_is_another_table(model, monkeypatch):
    here = place_of(model, context=64)
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert place_of(model, context=64) != here


def test_a_damaged_file_is_timed_again_with_a_word(model, ask, timed):
    said = []
    table = ask()
    place_of(model, context=64).write_text('{"format": "another"}')
    assert ask(notify=said.append) == table
    assert len(timed) == 2
    assert len(said) == 1
    assert "damaged" in said[0]
    assert "timing again" in said[0]
    assert ask() == table
    assert len(timed) == 2


def test_a_cache_that_cannot_be_written_stops_nothing(ask, cache):
    cache.write_text("")
    said = []
    assert ask(notify=said.append).context == 64
    assert "could not be saved" in said[0]


def test_a_busy_machine_is_named(tmp_path, model):
    steady = made_up_table(model)

    def spread(share, repetitions=9):
        curves = [c.model_copy(update={"high": tuple((1 + share) * s for s in c.seconds)}) for c in steady.curves]
        return steady.model_copy(update={"curves": tuple(curves), "repetitions": repetitions})

    said = []
    timed_once(tmp_path / "steady.json", lambda: spread(0.2), repetitions=9, rebuild=False, notify=said.append)
    assert not said
    for _ in range(2):
        timed_once(tmp_path / "busy.json", lambda: spread(0.3), repetitions=9, rebuild=False, notify=said.append)
    assert len(said) == 2, "it is said again of the table from the cache"
    assert all("30% (quartiles): the machine was busy" in one for one in said)
    timed_once(tmp_path / "few.json", lambda: spread(0.3, 3), repetitions=3, rebuild=False, notify=said.append)
    assert "30% (range): the machine was busy" in said[-1]
    assert "--rebuild, with the other options" in said[-1], "of an engine's table and of a file, too"


def test_a_context_that_the_model_does_not_take(model, cache):
    with pytest.raises(BudgetError, match=r"prune\.context = 1024 tokens, and this model takes at most 128") as raised:
        cached_table(model, context=1024)
    assert "prune.context=128" in raised.value.hint
    assert not cache.exists()
