"""Compares what a search found with its references on the report split, refits it, and saves it with its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ffgym.config.mixture import Corpora
from ffgym.config.tables import RunConfig
from ffgym.costs.resource import resource_named
from ffgym.data.splits import Split
from ffgym.evaluation.perplexity import evaluate_cut
from ffgym.export.checkpoint import SavedModel, save_pruned
from ffgym.models.hub import own_card
from ffgym.models.origin import Use, hub_base, origin_from
from ffgym.pipeline.task import Task, cut_to
from ffgym.plugins.contracts import check_reward
from ffgym.prepare.calibrations import calibration_class
from ffgym.pruning.budget import width_step
from ffgym.recover.result import RecoveredModel
from ffgym.report.card import model_card, stated_license
from ffgym.report.front import point_name
from ffgym.report.layout import humane, percent
from ffgym.report.paired import paired_difference, standard_error
from ffgym.report.progress import Reporter
from ffgym.report.table import Cost, ReportTable, Row, bos_text
from ffgym.search.loop import SearchResult
from ffgym.types import Allocation, Evaluation, JSONDict, Sublayer

REFERENCES: Mapping[str, tuple[str, JSONDict]] = {
    "uniform": ("uniform", {}),
    "mlp-first": ("mlp-first", {"spare_first": 3, "spare_last": 1}),
}
UNIFORM_REFERENCES = {**REFERENCES, "mlp-first": ("mlp-first", {"spare_first": 0, "spare_last": 0})}
DEMO_LICENSE = {"license": "apache-2.0"}
DEMO_CAVEAT = "The dense model is a dequantised Q4_1 file, not the original weights: compare within the table"


def reference_rules(config: RunConfig) -> dict[str, tuple[str, JSONDict]]:
    """The rules that a run is compared with, (heuristic, options) by label: two that are fixed, and another prior.

    Without a search the result is a rule itself, and is not compared with it.
    """
    prior, uniform = config.prior, config.prune.uniform
    rules = dict(UNIFORM_REFERENCES if uniform else REFERENCES)  # one shape for all layers spares no ends
    if not config.searches:
        return {label: rule for label, rule in rules.items() if rule[0] != prior.name}
    known = [name if uniform else (name, options) for name, options in rules.values()]
    if prior.name != "none" and (prior.name if uniform else (prior.name, prior.options)) not in known:
        rules[f"{prior.name} (prior)"] = prior.name, prior.options
    return rules


def asked_rules(config: RunConfig) -> list[tuple[str, JSONDict]]:
    """Every heuristic that a run asks, (name, options): its prior, and those that it is compared with."""
    prior = [] if config.prior.name == "none" else [(config.prior.name, config.prior.options)]
    return [*prior, *reference_rules(config).values()]


def refit_name(config: RunConfig) -> str:
    """What the rows that are not plain call their refit: the calibration, or ``ridge`` where the reward sees none."""
    return config.prune.calibration if calibration_class(config.prune.calibration).in_reward else "ridge"


def heuristic_allocations(task: Task) -> dict[str, Allocation]:
    """What the found allocation is compared with, by label, all through the same projection and rounding."""
    return {label: task.project(*rule) for label, rule in reference_rules(task.config).items()}


def compared_rows(
    task: Task,
    heuristics: Mapping[str, Allocation],
    random: Mapping[str, Allocation],
    found: SearchResult,
    reporter: Reporter,
    dense: Row | None = None,
) -> list[Row]:
    """The rows that come before the result: the dense model, every reference, the found allocation cut plainly."""
    refitted = refit_name(task.config)
    rows = [measured_row(task, "dense", reporter) if dense is None else dense]
    for label, allocation in {**heuristics, **random}.items():
        with cut_to(task, allocation.kept):
            row = measured_row(task, f"{label} + {refitted}", reporter, refit=refitted)
            rows.append(replace(row, is_heuristic=label in heuristics))
    with cut_to(task, found.best.allocation.kept, calibrated=False):
        rows.append(measured_row(task, f"{found_name(task.config)}, plain", reporter, is_found=True))
    return rows


def with_result(
    task: Task, rows: list[Row], found: SearchResult, reporter: Reporter, model: Path
) -> tuple[ReportTable, SavedModel | None]:
    """The table of the rows and the refitted result, and the checkpoint of that where one is wanted."""
    config, kept, refitted = task.config, found.best.allocation.kept, refit_name(task.config)
    with cut_to(task, kept):
        label = f"{found_name(config)} + {refitted}"
        row = measured_row(task, label, reporter, refit=refitted, is_found=True)
        heuristics = heuristic_allocations(task)
        same = [f"{rule} + {refitted}" for rule, other in heuristics.items() if other.kept == tuple(kept)]
        row = replace(
            row,
            note=_ahead(task, [*rows, row], heuristics, kept),
            same_as=same[0] if same and config.searches else "",
            is_heuristic=not config.searches,
            is_saved=config.output.save_model,
        )
        return _saved(task, found, [*rows, row], model)


def _ahead(task: Task, rows: Sequence[Row], heuristics: Mapping[str, Allocation], kept: Sequence[int]) -> str:
    """Say which heuristic earns more than the result, the last row; empty where none does or it cannot be known.

    A perplexity does not show it where a reward weighs other aims, too. As in the finals, the rewards of single windows
    are compared. What a reward needs beyond losses and costs is not measured on the report split.
    """
    env, config, dense, found = task.env, task.config, rows[0], rows[-1]
    if not env.reward.has_objectives or not set(env.reward.needs) <= {"cost"}:
        return ""

    def earned(row: Row, units: Sequence[int]) -> list[float]:
        costs, dense_costs = (
            {name: prices.allocation(each).cost for name, prices in env.prices.items()}
            for each in (units, task.prepared.prunable.dense_units)
        )
        length = task.splits.report.windows.shape[1] - 1
        pairs = [
            (Evaluation((loss,), length, costs=costs), Evaluation((reference,), length, costs=dense_costs))
            for loss, reference in zip(row.losses, dense.losses, strict=True)
        ]
        return [check_reward(env.reward, *pair) if pair[0].finite else env.reward.worst for pair in pairs]

    ours, measured = earned(found, kept), {row.label: row for row in rows}
    rivals = {
        label: earned(measured[f"{label} + {found.refit}"], allocation.kept) for label, allocation in heuristics.items()
    }
    label, theirs = max(rivals.items(), key=lambda rival: np.mean(rival[1]))
    lead = paired_difference([theirs], [ours])
    if lead is None or lead.mean <= 0 or lead.is_tie:
        return ""
    rule, prior = reference_rules(config)[label], (config.prior.name, config.prior.options)
    can_start = config.searches and not config.prune.uniform and rule != prior
    start = f": start there with --prior {rule[0]}" if can_start else ""
    return f"by its reward, {label} + {found.refit} ({np.mean(theirs):.2f}) is ahead of it ({np.mean(ours):.2f}){start}"


def target_model_folder(config: RunConfig, folder: Path, target: float) -> Path:
    """``model``, or ``model-0.20`` where the model of every point is saved."""
    return folder / (f"model-{point_name(target)}" if config.output.save_all else "model")


def with_recovered(table: ReportTable, recovered: RecoveredModel, config: RunConfig, measured_in: str) -> ReportTable:
    """The table, whose rows were measured in a dtype, with one more: the saved refit after training."""
    before, method = table.saved, config.recover.method
    note = f"training did not lower the held-out loss and was undone: the weights of {before.label}"
    if recovered.is_kept:
        note = f"trained after the final calibration, saved in {recovered.saved.path.name}/"
    if recovered.dtype != measured_in:
        note += f"; measured in {recovered.dtype}, in which it was trained"
    row = replace(
        before,
        label=f"{before.label} + {method}",
        perplexity=recovered.after.perplexity,
        loss_stderr=standard_error(recovered.after.losses),
        losses=recovered.after.losses,
        refit=f"{before.refit} + {method}",
        is_heuristic=False,
        is_saved=recovered.is_kept,
        note=note,
    )
    return replace(table, rows=(*table.rows, row))


def found_name(config: RunConfig) -> str:
    """What the rows of the found allocation are called: the agent, or the heuristic that it ran."""
    return config.agent.name if config.searches else config.prior.name


def measured_row(task: Task, label: str, reporter: Reporter, *, refit: str = "", is_found: bool = False) -> Row:
    """One row: the model as it is cut now, on the report split."""
    prunable = task.prepared.prunable
    with reporter.stage(f"report: {label}", 100) as stage:
        result = evaluate_cut(
            prunable,
            task.splits.report.windows,
            tokens_per_batch=task.env.tokens_per_batch,
            on_progress=lambda share: stage(round(100 * share), 100),
        )
    new_biases = prunable.new_bias_params(stock=task.config.prune.uniform)
    size, dense = task.sizes(prunable.kept, new_biases=new_biases), task.sizes(prunable.dense_units)
    resource = task.config.prune.resource
    resources = {name: resource_named(name) for name in size}
    return Row(
        label=label,
        perplexity=result.perplexity,
        loss_stderr=standard_error(result.losses),
        sparsity_prunable=max(0.0, task.env.budget.allocation(prunable.kept).sparsity),
        sparsity_model=1 - size[resource] / dense[resource],
        costs=tuple(
            Cost(name, counted.column, size[name], counted.text(size[name]))
            for name, counted in resources.items()
            if counted.column
        ),
        losses=result.losses,
        refit=refit,
        is_found=is_found,
    )


def header(task: Task) -> str:
    """How the table's numbers were measured; asked while the model is cut to what was found."""
    config, prunable = task.config, task.prepared.prunable
    calibration, search, report = task.splits.calibration, task.splits.search, task.splits.report
    widths = {width_step(s, config.prune.align) for s in prunable.sublayers if s.kind == "mlp"} - {1}
    active = {
        name: humane(task.sizes(kept)["params"] - sum(map(Sublayer.idle_params, prunable.sublayers, kept)))
        for name, kept in {"dense": prunable.dense_units, "pruned": prunable.kept}.items()
        if any(s.kind == "experts" for s in prunable.sublayers)
    }
    saved = str(task.loaded.saved_dtype).removeprefix("torch.")
    sentences = [
        f"Model: {task.loaded.description}.",
        f"Perplexity on {report.text}, report split: {report.predicted_tokens:,} tokens in windows of "
        f"{report.windows.shape[1]:,}, {task.loaded.dtype_name}, {bos_text(report.bos)}.",
        *([f"Saved in {saved}, as the dense checkpoint is."] if task.loaded.saved_dtype else []),
        f"Calibration: {_described(calibration)}.",
        *([f"Search: {_described(search)}."] if config.searches and search.text != calibration.text else []),
        *(f"A token passes through {count} of the {name} model's parameters." for name, count in active.items()),
        *(f"MLPs keep multiples of {width} channels." for width in sorted(widths)),
        f"MACs at {config.prune.context:,} tokens of context. Seed {config.seed}.",
        *(f"{name.capitalize()}: {how.summary}." for name, how in task.measurements.items()),
    ]
    return " ".join(sentences)


def _saved(task: Task, found: SearchResult, rows: Sequence[Row], folder: Path) -> tuple[ReportTable, SavedModel | None]:
    """The table, and where one is wanted, the model as it is cut now, saved with its card."""
    config, prunable = task.config, task.prepared.prunable
    table = ReportTable(tuple(rows), header(task), task.splits.report.digest, task.env.reward.has_objectives)
    if not config.output.save_model:
        return table, None
    is_demo = config.model.name == "demo"
    name, allocation = Path(config.model.name).name, found.best.allocation
    texts: dict[Use, Corpora] = {"calibrated": config.data.calibration}
    if config.searches:
        texts["searched"] = config.data.search
    card = model_card(
        title=f"{name}, {percent(found.target)} of {config.prune.resource} pruned",
        base_model=hub_base(config.model.name),
        license=DEMO_LICENSE if is_demo else stated_license(own_card(config.model.name, config.model.revision)),
        table=table,
        sublayers=prunable.sublayers,
        allocation=allocation,
        quantity=resource_named(allocation.resource).quantity or allocation.resource,
        command="ffgym run --config config.toml --output NEW_FOLDER",
        seed=config.seed,
        splits={split.role: _described(split) for split in task.splits},
        caveats=[DEMO_CAVEAT] if is_demo else [],
        stock=config.prune.uniform,
        towers=task.loaded.towers is not None,
    )
    return table, save_pruned(
        prunable,
        task.loaded.tokenizer,
        folder,
        card=card,
        files=[folder.parent / "config.toml"],  # what the command in the card reads
        stock=config.prune.uniform,
        towers=task.loaded.towers,
        dtype=task.loaded.saved_dtype,
        overwrite=True,  # a resumed run may have saved it before; a folder of anything else is never replaced
        origin=origin_from(config.model.name, config.model.revision, texts),
    )


def _described(split: Split) -> str:
    windows = split.windows
    return f"{split.text}, {windows.numel():,} tokens in windows of {windows.shape[1]:,}"
