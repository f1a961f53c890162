"""Prepared models on disk, so that the next run, a bench, an environment or ``--resume`` need not prepare them again.

A store is a folder of the cache, named by a digest of everything that decides its bits. It holds one safetensors file a
layer (unit orders, refit factors, statistics for heuristics) and a JSON record.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from ffgym.data.cache import OTHER_CACHE, cache_dir, entries, is_whole, lock_of, shrink, size_limit, write_folder_once
from ffgym.errors import AssetError, first_line
from ffgym.files import FileFormat, check_room, exclusive_lock, writing
from ffgym.models.checkpoint import TensorFile
from ffgym.models.cut import PrunableModel
from ffgym.models.families import family_of
from ffgym.models.stream import LayerStream
from ffgym.models.sublayer import PrunableSublayer
from ffgym.plugins.bases import Criterion, Plugin
from ffgym.plugins.manager import is_built_in
from ffgym.prepare.calibrations import calibration_class, has_ridge_path
from ffgym.prepare.paths import OnLayer, Prepared, view_of
from ffgym.pruning.calibration import NestedRidge
from ffgym.pruning.factors import factor_bytes
from ffgym.pruning.statistics import kept_bytes
from ffgym.types import LayerStats, Notify, SublayerView

KIND = "prepared"
DECISIVE = (  # code that decides bits
    "prepare",
    "pruning",
    "models/walk.py",
    "models/cut.py",
    "models/modes.py",
    "models/experts.py",
    "models/sublayer.py",
    "models/families.py",
    "models/built_in_families.py",
    "models/modeling_ffgym.py",
    "plugins/contracts.py",
    "evaluation/perplexity.py",  # of the losses that are kept beside
)
STATISTICS = tuple(each.name for each in fields(LayerStats) if each.name not in ("tokens", "channels_per_unit"))


@dataclass(frozen=True)
class PreparedRecord:
    """What a store holds beside tensors."""

    key: str  # its `store_key`
    what: dict[str, str]  # what it is, for people and for `made_under`
    ridges: tuple[float, ...]  # lambda of each sublayer
    energies: tuple[float, ...]  # E||W x||^2 of each sublayer's dense consumer
    affine: tuple[bool, ...]  # whether calibration moves the consumers' biases
    tokens: tuple[int, ...]  # of each sublayer's statistics


RECORD = FileFormat("record of a prepared model", PreparedRecord, AssetError, "Delete its folder: it is written again.")


def is_stored(criterion: Criterion, calibration: str) -> bool:
    """Whether what is prepared is kept: the cache has room for it, and the code that decides its bits can be read.

    Raises:
        ConfigError: ``FFGYM_CACHE_SIZE`` is no size.
    """
    is_readable = _source(type(criterion)) is not None
    return size_limit() > 0 and is_readable and has_ridge_path(calibration_class(calibration))


def check_store_folder() -> None:
    """Raise ``OutputError`` where the folder that prepared models are kept in cannot be made."""
    if not size_limit():
        return
    folder = cache_dir() / KIND
    with writing(folder, f"{OTHER_CACHE}, or keep nothing with FFGYM_CACHE_SIZE=0"):
        folder.mkdir(parents=True, exist_ok=True)


def weights_digest(model: Any, stream: LayerStream | None = None) -> str:
    """SHA-256 of a model's weights, as it was loaded, its units not yet in order.

    Args:
        stream: reads weights that are not in memory; the digest is the same as for the model in memory. It is
            computed once, and again where the files that it reads have changed.
    """

    def compute() -> str:
        digest = hashlib.sha256()
        for name, tensor in model.named_parameters():  # a tied weight once
            if tensor.is_meta:
                assert stream is not None, "only a streamed model has weights on the meta device"
                tensor = stream.read(name)
            _add(digest, name, tensor)
        return digest.hexdigest()

    return compute() if stream is None else stream.remembered(compute)


def _add(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    content: Any = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()  # mypy takes it for no buffer
    digest.update(content)


def store_key(
    model: Any,
    criterion: Criterion,
    windows: torch.Tensor,
    facts: Mapping[str, Any],
    weights: str,
) -> str:
    """Digest of all that decides the bits of a preparation, headed by the model's type: the name of its store.

    Args:
        model: as it was loaded. Of another package's family, a change of its code makes another store.
        criterion: orders the units; a change of its code makes another store.
        windows: calibration token ids, shape (windows, length), int64.
        facts: everything else that decides the bits.
        weights: from `weights_digest`.
    """
    digest, family = hashlib.sha256(), type(family_of(model))
    for part in (
        decisive_code(),
        _source(type(criterion)) or "",
        criterion.config.model_dump_json(),
        json.dumps(facts, sort_keys=True, default=str),
        *([] if is_built_in(family) else [_source(family) or ""]),
    ):
        digest.update(part.encode())
        digest.update(b"\0")
    config = model.config.to_dict()
    said = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    devices = sorted({tensor.device.type for tensor in model.parameters() if not tensor.is_meta})
    digest.update(f"{weights} on {devices}".encode())
    _add(digest, "windows", windows)
    versions = f"{torch.__version__} {transformers.__version__} {torch.get_num_threads()}"  # kernels round by them
    digest.update(versions.encode())
    return f"{model.config.model_type}-{digest.hexdigest()[:24]}"


def _source(cls: type[Plugin]) -> str | None:
    """The code of a class: its module, and of another's package all modules, since it may call any of them.

    ``None`` for a class that was typed into a prompt.
    """
    module: Any = inspect.getmodule(cls) or cls
    try:
        own = inspect.getsource(module)
    except (OSError, TypeError):
        return None
    outermost, package = "", getattr(module, "__package__", None) or ""
    while file := getattr(sys.modules.get(package), "__file__", None):  # a namespace package has none
        outermost, package = file, package.rpartition(".")[0]
    if not outermost or is_built_in(cls):
        return own
    files = sorted(Path(outermost).parent.rglob("*.py"))
    return "\0".join(file.read_text("utf-8", errors="replace") for file in files)


@cache
def decisive_code() -> str:
    """Digest of the code that decides what a store holds."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in DECISIVE:
        path = root / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(bare_code(file.read_text("utf-8")).encode())
    return digest.hexdigest()


def bare_code(source: str) -> str:
    """What Python makes of a module: without comments, docstrings and layout, which decide nothing."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def made_under(settings: str) -> Path | None:
    """The last used store that these settings made, see `settings_of`; ``None`` where there is none.

    Weights or text that they name may be others by now, so this is for plans alone.
    """
    for entry in entries(KIND) if size_limit() > 0 else ():
        with suppress(AssetError):
            if RECORD.read(entry.path / "record.json").what.get("settings") == settings:
                return entry.path
    return None


def opened_or_prepared(
    key: str,
    model: Any,
    make: Callable[[OnLayer], Prepared],
    what: Mapping[str, str],
    notify: Notify,
    stream: LayerStream | None = None,
    keep: frozenset[str] = frozenset(),
) -> Prepared:
    """Open a store, or prepare and write it; of several processes that want the same, one prepares.

    Args:
        key: from `store_key`.
        model: the dense model; its weights are permuted in place.
        make: prepares the model, and calls its argument for each layer when it is prepared.
        what: what is prepared, for its record.
        stream: where the layers come from; their factors are then read from the store as the model runs.
        keep: statistics that are kept for heuristics.

    Raises:
        OutputError: the disk has too little room for it, or the cache cannot be written.
    """
    place = cache_dir() / KIND / key
    with _locked(place, notify) as refused:
        if place.is_dir():
            if stored := _open(place, model, stream):
                with suppress(OSError):  # a cache that may only be read
                    os.utime(place)
                notify(f"opened what was prepared before: {place}")
                return replace(stored, store=place)
            notify(f"{place} is damaged, or not what its name says: preparing again")
        if refused is not None:
            with writing(place, OTHER_CACHE):
                raise refused
        shutil.rmtree(place, ignore_errors=True)
        _check_room(place, model, keep)
        prepared: Prepared | None = None

        def fill(folder: Path) -> None:
            nonlocal prepared
            writer = _Writer(folder)
            prepared = make(writer.write)
            writer.finish(key, what)

        write_folder_once(place, fill)
        if stream is not None:
            prepared = _open(place, model, stream)
        assert prepared is not None, "it has just been written"
    for entry in shrink(KIND, size_limit(), spare=place):
        notify(
            f"removed {entry.path}, the prepared model that was used least recently:"
            " the cache is limited to FFGYM_CACHE_SIZE"
        )
    return replace(prepared, store=place)


@contextmanager
def _locked(place: Path, notify: Notify) -> Iterator[OSError | None]:
    """Hold the lock of a store; yields why that cannot be had, as in a cache that may only be read."""
    refused: OSError | None = None
    with ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            said = "another run prepares the same model: waiting for it"
            stack.enter_context(exclusive_lock(lock_of(place), waiting=lambda: notify(said)))
        except OSError as error:
            refused = error
        yield refused


def _check_room(place: Path, model: Any, keep: frozenset[str]) -> None:
    outputs = model.config.hidden_size
    channels = [s.channels for s in family_of(model).sublayers(model) if s.kind != "experts"]
    check_room(
        place.parent,
        sum(factor_bytes(outputs, n) + kept_bytes(outputs, n, keep) for n in channels),
        "the prepared model",
        hint="Free some space, set FFGYM_CACHE to a folder on a larger disk, or FFGYM_CACHE_SIZE=0 to keep none.",
    )


class _Writer:
    """Writes a store layer by layer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layers = 0
        self._facts: list[tuple[float, float, bool, int]] = []

    def write(self, halves: Sequence[PrunableSublayer], views: Sequence[SublayerView], ridges: Sequence[float]) -> None:
        """Write the next layer's file."""
        tensors: dict[str, torch.Tensor] = {}
        for half, view, ridge in zip(halves, views, ridges, strict=True):
            factors = {"removal_error": torch.from_numpy(view.removal_error)}
            if half.is_refittable:
                assert isinstance(half.path, NestedRidge)
                factors = half.path.factors
            assert half.order is not None, "its units were ordered"
            stats = {f"stats.{name}": getattr(view.stats, name) for name in STATISTICS}
            own = {"order": half.order, "unit_scores": view.unit_scores, **factors, **stats}
            tensors |= {f"{half.sublayer.kind}.{name}": t.contiguous() for name, t in own.items() if t is not None}
            self._facts.append((ridge, view.output_energy, half.affine, view.stats.tokens))
        save_file(tensors, _file(self._folder, self._layers))
        self._layers += 1

    def finish(self, key: str, what: Mapping[str, str]) -> None:
        """Write the record."""
        ridges, energies, affine, tokens = zip(*self._facts, strict=True)
        record = PreparedRecord(key, dict(what), ridges, energies, affine, tokens)
        RECORD.write(self._folder / "record.json", record)


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03}.safetensors"


def _open(place: Path, model: Any, stream: LayerStream | None) -> Prepared | None:
    """The prepared model; ``None``, with the model unchanged, where the store does not hold one."""
    prunable = PrunableModel(model, stream)
    try:
        if not is_whole(place):
            return None
        record = RECORD.read(place / "record.json")
        files = [TensorFile(_file(place, layer)) for layer in range(len(prunable.halves) // 2)]
        stored = [
            _Stored(files[half.sublayer.layer], half, half.consumer.weight.device if stream is None else stream.device)
            for half in prunable.halves
        ]
        orders = [each.read("order") for each in stored]
    except (AssetError, SafetensorError, OSError, KeyError):
        return None
    if record.key != place.name:
        return None
    views: list[SublayerView] = []
    for index, (half, each, order) in enumerate(zip(prunable.halves, stored, orders, strict=True)):
        half.affine = record.affine[index]
        if stream is not None:
            half.order, half.load_path = order, each.path
            views.append(_StoredView(prunable, each, record.tokens[index], record.energies[index]))
            continue
        half.permute(order)
        refit = each.path() if half.is_refittable else None
        if refit is not None:
            half.path = refit
        lost = each.read("removal_error") if refit is None else refit.removal_error
        stats, energy = each.stats(record.tokens[index]), record.energies[index]
        views.append(view_of(half, each.read("unit_scores"), stats, lost, energy, refit))
    return Prepared(prunable, views, record.ridges)


class _Stored:
    """A sublayer's tensors in a store, read when they are asked for."""

    def __init__(self, file: TensorFile, half: PrunableSublayer, device: torch.device) -> None:
        self._file, self.half, self._prefix, self._device = file, half, f"{half.sublayer.kind}.", device

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name in the sublayer; raises ``AssetError`` where there is none, or it cannot be read."""
        try:
            tensor = self._file.read(self._prefix + name)
        except (SafetensorError, OSError) as error:
            path = self._file.path
            raise AssetError(
                f"{path} of a prepared model cannot be read: {first_line(error)}",
                hint=f"Delete {path.parent} and run again: it is prepared again.",
            ) from error
        return tensor.to(self._device)

    def stats(self, tokens: int) -> LayerStats:
        """The statistics that heuristics asked for."""
        there = [name for name in STATISTICS if f"{self._prefix}stats.{name}" in self._file.names]
        stored: dict[str, Any] = {name: self.read(f"stats.{name}") for name in there}
        return LayerStats(tokens, **stored)

    def path(self) -> NestedRidge:
        """The refit for every level of the sublayer, whose weights are in memory."""
        weight, bias = self.half.dense_consumer
        names = [name for name in self._file.names if name.startswith(self._prefix)]
        factors = [name.removeprefix(self._prefix) for name in names if ".stats." not in name]
        return NestedRidge.restored(weight.detach(), {name: self.read(name) for name in factors}, bias)


class _StoredView(SublayerView):
    """What heuristics see of a sublayer of a streamed model: tensors are read each time that they look at them."""

    _prunable: PrunableModel
    _stored: _Stored
    _tokens: int

    def __init__(self, prunable: PrunableModel, stored: _Stored, tokens: int, output_energy: float) -> None:
        sublayer = stored.half.sublayer
        vars(self).update(
            _prunable=prunable,
            _stored=stored,
            _tokens=tokens,
            sublayer=sublayer,
            unit_scores=stored.read("unit_scores"),
            removal_error=stored.read("removal_error")[:: sublayer.channels_per_unit].cpu().numpy(),
            output_energy=output_energy,
        )

    @property
    def weight(self) -> torch.Tensor:
        with self._prunable.layer(self.sublayer.layer):
            return self._stored.half.dense_consumer[0].detach()

    @property
    def stats(self) -> LayerStats:
        return self._stored.stats(self._tokens)

    @cached_property
    def loss_increase(self) -> np.ndarray | None:
        fisher, step = self.stats.output_gradient, self.sublayer.channels_per_unit
        if fisher is None:
            return None
        with self._prunable.layer(self.sublayer.layer):
            return self._stored.path().loss_increase(fisher)[::step].cpu().numpy()
