"""Prepared models on disk: what one run has prepared, the next one, a bench, an environment or ``--resume`` opens.

A store is a folder of the cache, named by a digest of everything that decides its bits. It holds a safetensors file a
layer (unit orders, refit factors, what heuristics asked for) and a JSON record.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ffgym.data.cache import cache_dir, is_whole, shrink, size_limit, write_folder_once
from ffgym.errors import AssetError, OutputError
from ffgym.files import FileFormat, write_text, writing
from ffgym.models.cut import PrunableModel, PrunableSublayer
from ffgym.plugins.bases import Criterion
from ffgym.prepare.paths import Prepared, view_of
from ffgym.pruning.calibration import NestedRidge
from ffgym.types import LayerStats

KIND = "prepared"
DECISIVE = ("prepare", "pruning", "models/walk.py", "models/cut.py", "plugins/contracts.py")  # code that decides bits
STATISTICS = tuple(field.name for field in fields(LayerStats) if field.name != "tokens")

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Record:
    """What a store holds beside tensors.

    Attributes:
        what: what it is, for people.
        ridges: lambda of each sublayer.
        energies: E||W x||^2 of each sublayer's dense consumer.
        affine: whether calibration moves the consumers' biases.
        tokens: of each sublayer's statistics.
        calibration_tokens: tokens that the statistics run over.
    """

    what: dict[str, str]
    ridges: tuple[float, ...]
    energies: tuple[float, ...]
    affine: tuple[bool, ...]
    tokens: tuple[int, ...]
    calibration_tokens: int


RECORD = FileFormat("record of a prepared model", Record, AssetError, "Delete its folder: it is written again.")


def store_place(model: Any, criterion: Criterion, windows: torch.Tensor, facts: Mapping[str, Any]) -> Path | None:
    """Where the store of a preparation belongs; ``None`` where none is kept, or the criterion's code cannot be read.

    Args:
        model: the dense model.
        criterion: orders the units; a change of its code makes another store.
        windows: calibration token ids, shape (windows, length), int64.
        facts: everything else that decides the bits.

    Raises:
        ConfigError: ``FFGYM_CACHE_SIZE`` is no size.
    """
    source = _source(type(criterion))
    if size_limit() == 0 or source is None:
        return None
    digest = hashlib.sha256()
    for part in (_code(), source, criterion.config.model_dump_json(), json.dumps(facts, sort_keys=True, default=str)):
        digest.update(part.encode())
        digest.update(b"\0")
    config = model.config.to_dict()
    said = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), ("windows", windows)):  # a tied weight once
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    digest.update(f"{torch.__version__} {torch.get_num_threads()}".encode())  # kernels round by them
    return cache_dir() / KIND / f"{model.config.model_type}-{digest.hexdigest()[:24]}"


def _source(cls: type) -> str | None:
    try:
        return inspect.getsource(inspect.getmodule(cls) or cls)
    except (OSError, TypeError):  # typed into a prompt
        return None


def _code() -> str:
    """Digest of the code that decides what a store holds."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in DECISIVE:
        path = root / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def opened_or_prepared(
    place: Path, model: Any, make: Callable[[], Prepared], what: Mapping[str, str], notify: Notify
) -> Prepared:
    """Open a store, or prepare and write it; of several processes that want the same, one prepares.

    Args:
        place: from `store_place`.
        model: the dense model; its weights are permuted in place.
        make: prepares the model.
        what: what the store is of, for people.
        notify: told where it came from.

    Raises:
        OutputError: the disk has too little room for it.
    """
    with _locked(place, notify):
        if place.is_dir():
            if prepared := _open(place, model):
                os.utime(place)
                notify(f"prepared before: opened {place}")
                return prepared
            notify(f"{place} is damaged, or not a prepared model: preparing again")
            shutil.rmtree(place, ignore_errors=True)
        _check_room(place, PrunableModel(model))
        prepared = make()
        write_folder_once(place, lambda folder: _write(folder, prepared, what))
    for entry in shrink(KIND, size_limit(), spare=place):
        notify(f"removed {entry.path}, which was not used for longest (FFGYM_CACHE_SIZE)")
    return prepared


@contextmanager
def _locked(place: Path, notify: Notify) -> Iterator[None]:
    lock = FileLock(place.parent / f".{place.name}.lock")
    with writing(place):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            notify("another process prepares the same model: waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_room(place: Path, prunable: PrunableModel) -> None:
    needed = sum(4 * (half.consumer.weight.numel() + half.consumer.in_features**2) for half in prunable.halves)
    free = shutil.disk_usage(place.parent).free
    if free < needed:
        raise OutputError(
            f"the prepared model takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free in {place.parent}",
            hint="Free some space, set FFGYM_CACHE to a folder on a larger disk, or FFGYM_CACHE_SIZE=0 to keep none.",
        )


def _write(folder: Path, prepared: Prepared, what: Mapping[str, str]) -> None:
    halves, views = prepared.prunable.halves, prepared.views
    for layer in range(len(halves) // 2):
        tensors: dict[str, torch.Tensor] = {}
        for index in (2 * layer, 2 * layer + 1):
            half, view = halves[index], views[index]
            assert isinstance(half.path, NestedRidge)
            assert half.order is not None, "its units were ordered"
            stats = {f"stats.{name}": getattr(view.stats, name) for name in STATISTICS}
            own = {"order": half.order, "unit_scores": view.unit_scores, **half.path.factors, **stats}
            tensors |= {f"{half.sublayer.kind}.{name}": t.contiguous() for name, t in own.items() if t is not None}
        save_file(tensors, folder / f"layer-{layer:03}.safetensors")
    record = Record(
        dict(what),
        prepared.ridges,
        tuple(view.output_energy for view in views),
        tuple(half.affine for half in halves),
        tuple(view.stats.tokens for view in views),
        prepared.calibration_tokens,
    )
    write_text(folder / "record.json", json.dumps(asdict(record), indent=1) + "\n")


def _open(place: Path, model: Any) -> Prepared | None:
    """The prepared model; ``None`` where the store does not hold one, and the model has not been touched."""
    prunable = PrunableModel(model)
    try:
        if not is_whole(place):
            return None
        record = RECORD.read(place / "record.json")
        layers = [load_file(place / f"layer-{layer:03}.safetensors") for layer in range(len(prunable.halves) // 2)]
        parts = [_parts(layers[half.sublayer.layer], half) for half in prunable.halves]
    except (AssetError, SafetensorError, OSError, KeyError):
        return None
    if len(record.ridges) != len(prunable.halves):
        return None
    views = []
    for index, (half, tensors) in enumerate(zip(prunable.halves, parts, strict=True)):
        half.affine = record.affine[index]
        half.permute(tensors["order"])
        weight, bias = half.consumer.weight.detach(), half.consumer.bias
        half.path = refit = NestedRidge.restored(weight, tensors, bias)
        kept = {name: tensors.get(f"stats.{name}") for name in STATISTICS}
        stats = LayerStats(record.tokens[index], **kept)
        views.append(view_of(half, tensors["unit_scores"], stats, refit, record.energies[index]))
    return Prepared(prunable, tuple(views), record.ridges, record.calibration_tokens)


def _parts(layer: Mapping[str, torch.Tensor], half: PrunableSublayer) -> dict[str, torch.Tensor]:
    """A sublayer's tensors by name, on its device, out of the file's memory.

    Raises:
        KeyError: it has none of the size.
    """
    prefix, n = f"{half.sublayer.kind}.", half.consumer.in_features
    device = half.consumer.weight.device
    own = {key.removeprefix(prefix): t.to(device, copy=True) for key, t in layer.items() if key.startswith(prefix)}
    if own["inverse"].shape != (n, n) or own["projected"].shape != half.consumer.weight.shape:
        raise KeyError(f"{half.sublayer.name}: factors of another size")
    return own
