"""The store: what it gives back is, bit for bit, what preparing gives; what is damaged or foreign is prepared again."""

from __future__ import annotations

import importlib
import multiprocessing
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distinct_families import DISTINCT_FAMILIES

from ffgym.criteria.wanda import Wanda
from ffgym.data import cache
from ffgym.errors import ConfigError, OutputError
from ffgym.plugins.bases import Criterion
from ffgym.prepare.paths import OnLayer, Prepared, prepare
from ffgym.prepare.store import bare_code, is_stored, opened_or_prepared, store_key, weights_digest
from ffgym.testing.models import tiny_model

WINDOWS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
KEEP = frozenset({"mean", "square", "output_gradient"})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")
    return tmp_path / "cache" / "prepared"


class Told(list[str]):
    """What the user was told, and how often a model was prepared."""

    prepared = 0


@pytest.fixture
def told() -> Told:
    return Told()


def go(
    told: Told, model: Any = None, *, criterion: Criterion | None = None, how: Any = "ridge", **facts: Any
) -> Prepared:
    model, criterion = model or tiny_model("llama"), criterion or Wanda()

    def make(on_layer: OnLayer) -> Prepared:
        told.prepared += 1
        return prepare(model, criterion, WINDOWS, ridge=0.01, calibration=how, keep=KEEP, on_layer=on_layer)

    key = store_key(model, criterion, WINDOWS, {"calibration": how, **facts}, weights_digest(model))
    return opened_or_prepared(key, model, make, {"model": "tiny"}, told.append, keep=KEEP)


def bits(prepared: Prepared) -> list[torch.Tensor]:
    """The model dense and cut, and what heuristics see."""
    found = [tensor.clone() for tensor in prepared.prunable.model.state_dict().values()]
    for half, view in zip(prepared.prunable.halves, prepared.views, strict=True):
        for units in range(1, half.sublayer.units):
            half.cut(units)
            found += [
                half.consumer.weight.clone(),
                *([] if half.consumer.bias is None else [half.consumer.bias.clone()]),
            ]
        half.restore()
        stats = (view.stats.mean, view.stats.square, view.stats.output_gradient)
        found += [view.unit_scores, *(each for each in stats if each is not None)]
        found += [torch.as_tensor(np.array([view.output_energy])), torch.as_tensor(view.removal_error)]
        found.append(torch.as_tensor(view.loss_increase))
    return found


@pytest.mark.parametrize("how", ["ridge", "affine"])
@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_opening_gives_the_bits_of_preparing(family: str, how: str, told: Told) -> None:
    first, second = (go(told, tiny_model(family, dtype=torch.bfloat16), how=how) for _ in range(2))
    assert told.prepared == 1
    assert told[-1].startswith("opened what was prepared before: ")
    assert second.ridges == first.ridges
    assert [half.affine for half in second.prunable.halves] == [half.affine for half in first.prunable.halves]
    assert all(torch.equal(one, other) for one, other in zip(bits(first), bits(second), strict=True))


class TestAnotherPreparationHasAnotherStore:
    @pytest.fixture(autouse=True)
    def _first(self, told: Told) -> None:
        go(told)

    @pytest.mark.parametrize(
        "other",
        [
            lambda told, patch: go(told, tiny_model("llama", seed=1)),
            lambda told, patch: go(told, ridge=0.1),
            lambda told, patch: patch.setattr(torch, "get_num_threads", lambda: 64) or go(told),
            # transformers may have replaced its own module by now
            lambda told, patch: patch.setattr("ffgym.prepare.store.transformers.__version__", "5.99.0") or go(told),
        ],
        ids=["model", "settings", "number of threads", "version of transformers"],
    )
    def test_of_another(self, other: Any, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
        other(told, monkeypatch)
        assert told.prepared == 2

    def test_with_a_criterion_whose_code_has_changed(self, told: Told, tmp_path: Path) -> None:
        """Its author edits it and runs again: the old order must not come back."""
        for version, sign in enumerate("+-"):
            name = f"edited_{version}"
            path = tmp_path / f"{name}.py"
            path.write_text(
                "from ffgym.plugins.bases import Criterion\n\n\nclass Mine(Criterion):\n    name = 'mine'\n\n"
                f"    def score(self, weight, stats):\n        return {sign}weight.abs()\n"
            )
            module = types.ModuleType(name)
            module.__file__ = str(path)
            sys.modules[name] = module
            exec(compile(path.read_text(), str(path), "exec"), vars(module))
            go(told, criterion=module.Mine())
        assert told.prepared == 3

    def test_with_a_criterion_whose_package_has_changed(
        self, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The class is as it was, and what it calls in the module beside it is not."""
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "acme_split").mkdir()
        (tmp_path / "acme_split" / "__init__.py").write_text(
            "from ffgym.plugins.bases import Criterion\nfrom acme_split.formula import f\n\n\n"
            "class Mine(Criterion):\n    name = 'mine'\n\n"
            "    def score(self, weight, stats):\n        return f(weight)\n"
        )
        for sign in "+-":
            (tmp_path / "acme_split" / "formula.py").write_text(f"def f(weight):\n    return {sign}weight.abs()\n")
            go(told, criterion=importlib.import_module("acme_split").Mine())
            for name in ("acme_split", "acme_split.formula"):
                monkeypatch.delitem(sys.modules, name)
        assert told.prepared == 3

    def test_of_a_family_whose_code_has_changed(self, told: Told, install: Any) -> None:
        """Its attention becomes one unit: the orders of before have as many units as it had groups."""
        family = (
            "import ffgym\n\n\nclass Starcoder2(ffgym.Family):\n    name = 'starcoder2'\n"
            "    mlp_producers = ('mlp.c_fc',)\n    mlp_consumer = 'mlp.c_proj'\n    whole_attention = {whole}\n\n\n"
            "@ffgym.hookimpl\ndef ffgym_families():\n    return [Starcoder2]\n"
        )
        install("acme-before", family.format(whole=False))
        go(told, tiny_model("starcoder2"))
        install("acme-after", family.format(whole=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FFGYM_LOAD_PLUGINS", "acme-after-entry")
            assert go(told, tiny_model("starcoder2")).prunable.dense_units == (1, 48) * 3
        assert told.prepared == 3

    def test_but_not_where_nothing_differs(self, told: Told) -> None:
        go(told)
        assert told.prepared == 1


def test_a_criterion_without_code_to_read_has_no_store() -> None:
    made: dict[str, Any] = {"__name__": "nowhere", "Criterion": Criterion}
    exec("class Typed(Criterion):\n    name = 'typed'\n    def score(self, weight, stats): return weight", made)
    assert not is_stored(made["Typed"](), "ridge")


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "record.json").write_text("{}"),
        lambda place: (place / "record.json").unlink(),
        lambda place: (place / "layer-001.safetensors").unlink(),
        lambda place: (place / "layer-001.safetensors").write_bytes(b"half"),
        lambda place: shutil.rmtree(place) or place.mkdir() or (place / "holiday.jpg").write_bytes(b"foreign"),
    ],
)
def test_what_is_damaged_or_foreign_is_prepared_again_and_said(damage: Any, told: Told, folder: Path) -> None:
    first = go(told)
    (place,) = folder.glob("llama-*")
    damage(place)
    second = go(told)
    assert told.prepared == 2
    assert told[-1] == f"{place} is damaged, or not what its name says: preparing again"
    assert all(torch.equal(one, other) for one, other in zip(bits(first), bits(second), strict=True))
    go(told)
    assert told.prepared == 2


def test_the_store_of_another_model_of_the_same_shape_is_prepared_again(told: Told, folder: Path) -> None:
    go(told)
    (other,) = folder.glob("llama-*")
    first = go(told, tiny_model("llama", seed=1))
    (place,) = set(folder.glob("llama-*")) - {other}
    shutil.rmtree(place)
    other.rename(place)
    second = go(told, tiny_model("llama", seed=1))
    assert told.prepared == 3
    assert all(torch.equal(one, other) for one, other in zip(bits(first), bits(second), strict=True))


def test_a_flipped_bit_is_found(told: Told, folder: Path) -> None:
    go(told)
    file = next(folder.glob("*/layer-000.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    go(told)
    assert told.prepared == 2


def test_a_preparation_that_fails_leaves_nothing(told: Told) -> None:
    class Broken(Wanda):
        def score(self, weight: Any, stats: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(told, criterion=Broken())
    assert cache.entries("prepared") == []


def _in_a_process(barrier: Any, made: Any) -> None:
    barrier.wait()
    told = Told()
    go(told)
    made.put(told.prepared)


def test_two_processes_that_want_the_same_prepare_it_once() -> None:
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(2), context.SimpleQueue()
    processes = [context.Process(target=_in_a_process, args=(barrier, made)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(made.get() for _ in processes) == [0, 1]


OWN_PATH = """
import ffgym
from ffgym.prepare.calibrations import Affine
from ffgym.pruning.calibration import PlainPath

class Own(Affine):
    "Keeps nothing of the refit but its bias."
    name = "own"
    def path(self, consumer):
        return PlainPath(consumer.weight, consumer.refit.bias_at(0))

@ffgym.hookimpl
def ffgym_calibrations():
    return [Own]
"""


def test_a_calibration_with_a_path_of_its_own_has_no_store(install: Any) -> None:
    install("acme-own", OWN_PATH)
    assert is_stored(Wanda(), "affine")
    assert not is_stored(Wanda(), "own")


class TestSize:
    def test_a_disk_without_room_is_an_error_before_anything_is_computed(
        self, told: Told, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
        with pytest.raises(OutputError, match=r"the prepared model takes [\d.]+ [KM]B, and 10 B are free") as caught:
            go(told)
        assert "FFGYM_CACHE_SIZE=0" in (caught.value.hint or "")
        assert told.prepared == 0

    def test_statistics_for_heuristics_need_room_too(self, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
        go(told)
        (entry,) = cache.entries("prepared")
        cache.remove(entry)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0.8 * entry.bytes))
        with pytest.raises(OutputError, match="the prepared model takes"):
            go(told)

    def test_a_cache_that_cannot_be_written_is_named(self, told: Told, folder: Path) -> None:
        folder.parent.write_text("a file where the cache should be")
        with pytest.raises(OutputError, match="cannot write") as caught:
            go(told)
        assert "FFGYM_CACHE" in (caught.value.hint or "")

    def test_a_store_that_may_only_be_read_is_opened(self, told: Told, folder: Path) -> None:
        store = go(told).store
        assert store is not None
        lock = cache.lock_of(store)
        lock.unlink(missing_ok=True)
        lock.mkdir()  # as little a file that can be locked as another account's
        assert go(told).store == store
        assert told.prepared == 1
        (store / "layer-000.safetensors").write_bytes(b"damaged")
        with pytest.raises(OutputError, match="cannot write"):
            go(told)
        assert (store / "layer-000.safetensors").exists()

    def test_a_disk_that_fills_up_is_named_and_nothing_is_left(self, told: Told, small_files: Any) -> None:
        with pytest.raises(OutputError, match=r"cannot write .*File too large") as caught, small_files(1000):
            go(told)
        assert "FFGYM_CACHE" in (caught.value.hint or "")
        assert cache.entries("prepared") == []

    def test_0_keeps_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FFGYM_CACHE_SIZE", "0")
        assert not is_stored(Wanda(), "ridge")

    def test_what_was_not_used_for_longest_goes_first(
        self, told: Told, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        go(told, which=1)
        (first,) = folder.glob("llama-*")
        size = cache.entries("prepared")[0].bytes
        monkeypatch.setenv("FFGYM_CACHE_SIZE", str(int(2.5 * size)))
        go(told, which=2)
        go(told, which=1)  # used again
        go(told, which=3)
        assert len(cache.entries("prepared")) == 2
        assert first.is_dir()
        assert any(line.startswith("removed ") for line in told)

    def test_what_is_being_opened_stays(self, told: Told, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        go(told, which=1)
        (first,) = folder.glob("llama-*")
        monkeypatch.setenv("FFGYM_CACHE_SIZE", str(int(1.5 * cache.entries("prepared")[0].bytes)))

        class OtherComes(Told):
            def append(self, line: str) -> None:
                go(told, which=2)
                assert first.is_dir()

        go(OtherComes(), which=1)
        assert not any(line.startswith("removed ") for line in told)
        go(told, which=3)
        assert not first.is_dir(), "it was opened"

    def test_the_store_in_use_stays_even_where_it_is_too_large(
        self, told: Told, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FFGYM_CACHE_SIZE", "1kB")
        go(told)
        assert len(cache.entries("prepared")) == 1

    def test_no_size_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FFGYM_CACHE_SIZE", "plenty")
        with pytest.raises(ConfigError, match="'plenty' is no size"):
            is_stored(Wanda(), "ridge")


def test_comments_docstrings_and_layout_make_no_other_store() -> None:
    said = 'def f(x):\n    """Add one."""\n    # or not\n    return (x +\n            1)\n'
    assert bare_code(said) == bare_code('def f(x):\n    """Anything."""\n    return x + 1')
    assert bare_code(said) != bare_code(said.replace("1)", "2)"))
    assert bare_code("def f(x):\n    return 'Add one.'") != bare_code("def f(x):\n    return 'Add two.'")
