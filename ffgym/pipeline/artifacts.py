"""The files that a run writes into its folder, and their copies in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ffgym.config.mixture import shares
from ffgym.config.tables import RunConfig
from ffgym.costs.resource import resource_class
from ffgym.data.corpora import source_of
from ffgym.data.splits import ROLES, Splits
from ffgym.export.checkpoint import SavedModel, load_code
from ffgym.files import write_text
from ffgym.pipeline.stored import FRONT, TABLE
from ffgym.pipeline.task import Task
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.plugins.contracts import check_state
from ffgym.prepare.configured import used_plugins
from ffgym.report.comparison import differences_figure
from ffgym.report.figures import allocations_figure, reward_figure, units_kept_figure
from ffgym.report.front import Front, front_figure, point_name
from ffgym.report.layout import strict
from ffgym.report.table import ReportTable, Row
from ffgym.search.loop import SearchResult
from ffgym.search.policy import POLICY, Policy
from ffgym.tracking.names import Result, parameters
from ffgym.tracking.tracker import Tracker, environment_tags
from ffgym.types import Allocation, JSONDict

REPEAT = """Repeat the run with its artifact `config.toml`:

```console
$ ffgym run --config config.toml --output NEW_FOLDER
```"""


def write_table(folder: Path, table: ReportTable) -> None:
    """``report.md``, ``report.json``, ``losses.json`` and, where differences are known, ``differences.png``."""
    TABLE.write(folder / "losses.json", table)  # first: the table is read from it
    write_text(folder / "report.md", table.layout().markdown())
    write_text(folder / "report.json", json.dumps(table.layout().as_dicts(), indent=2))
    differences = [(row.label, found) for row in table.rows if (found := table.difference(row)) is not None]
    if differences and table.best_heuristic is not None:
        differences_figure(differences, f"the best heuristic, {table.best_heuristic.label}", folder / "differences.png")


def write_found(
    folder: Path, main: SearchResult, points: Sequence[SearchResult], agent: Agent, task: Task, tracker: Tracker
) -> None:
    """Write the allocations and the policy; ``allocation.json`` is that of the main target."""
    files = {"allocation.json": main}
    if len(points) > 1:
        files |= {f"allocation-{point_name(found.target)}.json": found for found in points}
    for file, found in files.items():
        write_text(folder / file, json.dumps(allocation_json(found), indent=2))
        tracker.log_artifact(folder / file)
    if state := check_state(agent):
        sublayers = tuple(sublayer.name for sublayer in task.prepared.prunable.sublayers)
        policy = Policy(agent=task.config.agent.name, state=state, sublayers=sublayers)
        POLICY.write(folder / "policy.json", policy)
        tracker.log_artifact(folder / "policy.json")


def allocation_json(found: SearchResult) -> JSONDict:
    """What ``allocation.json`` holds: units kept per sublayer, and where the search found them."""
    best = found.best
    return strict(
        {
            "kept": list(best.allocation.kept),
            "importance": [round(float(a), 6) for a in best.importance],
            "resource": best.allocation.resource,
            "sparsity": best.allocation.sparsity,
            "origin": best.origin,
            "finals_loss": best.loss,
            "finals_dense_loss": found.dense_loss,
            "episodes": len(found.history),
        }
    )


def write_pictures(
    folder: Path, task: Task, allocations: Mapping[str, Allocation], searches: Mapping[str, SearchResult]
) -> None:
    """``units_kept.png``, of a search ``reward.png`` and, if it had several updates, ``allocations.png``.

    The run's own allocation and search come first.
    """
    sublayers = task.prepared.prunable.sublayers
    units_kept_figure(sublayers, allocations, folder / "units_kept.png")
    if not task.config.searches:
        return
    histories = {label: found.history for label, found in searches.items()}
    reward_figure(histories, folder / "reward.png")
    (label, history), *_ = histories.items()
    if history[-1].update > 0:
        title = f"What {label} kept in the course of its search"
        allocations_figure(sublayers, history, title, folder / "allocations.png")


def description(table: ReportTable, saved: SavedModel | None) -> str:
    """What MLflow shows on the page of a run: its result, its table, how to load the model, how to repeat the run."""
    row, dense = table.result, table.dense
    reached = f"{row.perplexity / dense.perplexity:.2f} x dense, at {row.sparsity_prunable:.1%} sparsity"
    parts = [f"**Perplexity {row.perplexity_text}**, {reached}", table.layout().markdown()]
    if saved is not None:
        parts.append(f"Load the pruned model:\n\n```python\n{load_code(saved.path)}\n```")
    return "\n\n".join([*parts, REPEAT])


def tracked_result(row: Row, dense: Row, found: SearchResult) -> Result:
    """What MLflow calls the result: a row of the table, and what the search for it took."""
    return Result(
        perplexity=row.perplexity,
        dense_perplexity=dense.perplexity,
        sparsity=row.sparsity_prunable,
        params=row.parameters,
        search_tokens=found.search_tokens,
        seconds=found.seconds,
        accuracy=found.best.objectives.get("accuracy"),
    )


def write_front(
    tracker: Tracker, front: Front, points: Sequence[SearchResult], config: RunConfig, folder: Path
) -> None:
    """Write a front down; in MLflow every point is a child of the run."""
    FRONT.write(folder / "front.json", front)
    write_text(folder / "front.md", front.layout().markdown())
    front_figure(front, folder / "front.png")
    settings = parameters(config.model_dump(mode="json"))
    for point, found in zip(front.points, points, strict=True):
        result = tracked_result(point.found, front.dense, found)
        tracker.log_child(f"sparsity {point.target:.1%}", settings | {"sparsity": str(point.target)}, result)
    for name in ("front.json", "front.md", "front.png"):
        tracker.log_artifact(folder / name)


def log_splits(tracker: Tracker, splits: Splits) -> None:
    """The three splits as MLflow datasets, with their digests."""
    for split in splits:
        tokens = split.windows.numel()
        tracker.log_dataset(name=split.name, context=split.role, digest=split.digest, corpus=split.text, tokens=tokens)


def run_tags(task: Task) -> dict[str, str]:
    """MLflow tags: versions, device, dtype, threads, and which package each plugin is from."""
    used = [*used_plugins(task.config).values(), *(("resource", resource_class(name)) for name in task.env.prices)]
    specs = {spec for role in ROLES for spec in shares(getattr(task.config.data, role))}
    used += [("corpus", manager.get_class("corpus", source)) for source in filter(None, map(source_of, specs))]
    plugins = {f"{kind}.{cls.name}": str(manager.package_of(cls)) for kind, cls in used}
    loaded, threads = task.loaded, torch.get_num_threads()
    return environment_tags(device=str(loaded.device), dtype=loaded.dtype_name, threads=threads, plugins=plugins)
