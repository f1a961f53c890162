"""``run(config)``: the whole pipeline on one page.

model, data -> statistics -> order -> refits -> search -> final calibration -> report -> saved model -> MLflow
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ffgym.config import RunConfig, to_toml
from ffgym.data.splits import Split, Splits
from ffgym.envs.building import (
    make_reward,
    tokens_per_batch,
)
from ffgym.errors import ConfigError
from ffgym.evaluation.latency import to_json
from ffgym.evaluation.perplexity import evaluate
from ffgym.models.export import SavedModel, load_line, save_pruned
from ffgym.models.loading import DEMO_BASE
from ffgym.output import (
    claim_folder,
    disk_errors,
    leaving_no_husk,
    mlflow_run,
    note_mlflow_run,
    reopen_folder,
    saying_what_is_kept,
    write_text,
)
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.plugins.contracts import called, check_objectives
from ffgym.policy import make_agent, policy_text
from ffgym.recovery import Material, Recovered, check_method, gather, output_folder, train_and_save
from ffgym.report.card import model_card
from ffgym.report.figures import reward_figure, units_kept_figure
from ffgym.report.front import Front, FrontPoint, front_figure, point_names
from ffgym.report.front import as_dict as front_as_dict
from ffgym.report.front import markdown as front_markdown
from ffgym.report.front import terminal as front_terminal
from ffgym.report.pareto import ParetoPoint, pareto_figure, pareto_json
from ffgym.report.progress import Reporter
from ffgym.report.recovery import loss_error
from ffgym.report.table import ReportTable, Row, as_dicts, markdown, measurement, terminal
from ffgym.search import (
    Found,
    SearchInterrupted,
    finals_examples,
    finals_loss,
    finals_windows,
    read_episodes,
    search_front,
)
from ffgym.tracking import Tracker, environment_tags, slug
from ffgym.types import Allocation, Episode, JSONDict, Update
from ffgym.workspace import Refit, Workspace, at_target, cut_to, give_prior, make_schedule, open_workspace

REFERENCES: Mapping[str, tuple[str, JSONDict]] = {
    "uniform": ("uniform", {}),
    "MLPs only, ends spared": ("mlp-first", {"spare_first": 3, "spare_last": 1}),
}
UNIFORM_REFERENCES: Mapping[str, tuple[str, JSONDict]] = {
    "uniform": ("uniform", {}),
    "MLPs only": ("mlp-first", {"spare_first": 0, "spare_last": 0}),
}
DEMO_LICENSE = "apache-2.0"
DEMO_CAVEAT = "The dense model is a dequantised Q4_1 file, not the original weights: compare within the table"

SAVED_NOTE = "the refit that is saved: the lower loss on windows of the search split"


@dataclass(frozen=True)
class RunResult:
    """What a run hands back.

    Attributes:
        table: report-split figures, dense first.
        found: the search.
        folder: where everything was written.
        saved: the checkpoint, or ``None`` where none was wanted.
        recovered: what training after the final calibration brought, or ``None`` where none was wanted.
        mlflow_run: MLflow's run id, or ``None`` where tracking is off.
        front: under a range of budgets its points; ``table``, ``found`` and ``saved`` are those of the main target.
    """

    table: ReportTable
    found: Found
    folder: Path
    saved: SavedModel | None
    mlflow_run: str | None
    front: Front | None = None
    recovered: Recovered | None = None

    def to_json(self) -> JSONDict:
        """Numbers and paths, ready for ``json.dumps`` (NaN aside)."""
        return {
            "table": as_dicts(self.table),
            "measured": self.table.header,
            "allocation": _allocation_json(self.found),
            "search_tokens": self.found.search_tokens,
            "final_tokens": self.found.final_tokens,
            "search_seconds": round(self.found.seconds, 1),
            "front": None if self.front is None else front_as_dict(self.front),
            "folder": str(self.folder),
            "model": None if self.saved is None else str(self.saved.path),
            "recovered_model": None if self.recovered is None else str(self.recovered.saved.path),
            "mlflow_run": self.mlflow_run,
        }

    def print(self, console: Console) -> None:
        """The table, where things are, and how to load the model."""
        if self.front is not None:
            console.print(front_terminal(self.front))
        console.print(terminal(self.table))
        lines = [f"Results and pictures: {self.folder}"]
        if self.mlflow_run is not None:
            lines.append(f"MLflow run {self.mlflow_run}: compare runs with `ffgym ui`")
        if self.saved is not None:
            line = load_line(self.saved.path, stock=self.saved.stock)
            lines += ["Load the pruned model with", f"  {line}"]
        if self.recovered is not None:
            again = load_line(self.recovered.saved.path, stock=self.recovered.saved.stock)
            lines += [*self.recovered.told, "Load it with", f"  {again}"]
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def run(config: RunConfig, *, progress: Console | None = None, resume: Path | None = None) -> RunResult:
    """Search, prune, calibrate, report and save, as the configuration says.

    Args:
        config: everything that decides the run.
        progress: where progress goes; stderr where left out.
        resume: folder of an interrupted run of this configuration to go on with, in the same MLflow run; it ends with
            the numbers that it would have ended with uninterrupted.

    Raises:
        FFGymError: what cannot be done, and what to do about it; the MLflow run is marked FAILED.
        KeyboardInterrupt: Ctrl-C; what was found so far is saved and printed, the MLflow run is marked KILLED.
    """
    say = Reporter(progress or Console(stderr=True))
    check_plugins(config)
    config = manager.with_options(config)
    agent = make_agent(config)
    folder = claim_folder(config) if resume is None else reopen_folder(resume, config)
    tracking = config.tracking
    with (
        Tracker(
            Path(tracking.root), tracking.experiment, folder.name, tracking.enabled, resume=mlflow_run(folder)
        ) as tracker,
        disk_errors(),
        leaving_no_husk(folder) if resume is None else nullcontext(),
        saying_what_is_kept(folder, say.say),
    ):
        text = to_toml(config, manager.meanings(config))
        tracker.log_config(config.model_dump(mode="json"), text)
        write_text(folder / "config.toml", text)
        note_mlflow_run(folder, tracker.run_id)
        prior = [] if config.prior.name == "none" else [(config.prior.name, config.prior.options)]
        space = open_workspace(config, [*prior, *reference_rules(config).values()], say)
        material = None
        if config.recover.method != "none":  # now, so that a corpus that will not do is known before the search
            material = gather(config, space.loaded.tokenizer, space.loaded.context_limit, space.splits)
        if config.prune.uniform and agent.searches:
            _say_how_many_shapes(space, say)
        give_prior(agent, space)
        tracker.set_tags(_tags(space, agent))
        _log_splits(tracker, space.splits)
        if space.latency is not None:
            write_text(folder / "latency.json", to_json(space.latency))
            tracker.log_params({"latency": {"digest": space.latency.digest}})
            tracker.log_artifact(folder / "latency.json")
        points = _search(space, agent, tracker, folder, say)
        main = next(found for found in points if found.target == config.main_target)
        histories: dict[str, Sequence[Episode]] = {config.agent.name: main.history}
        baseline = None
        if agent.searches and _has_random_baseline(config):
            baseline = _search_random(space, tracker, folder, say)
            histories["random"] = baseline.history
        at_main = at_target(space, config.main_target)
        references = _references(at_main, baseline, say)
        _draw(folder, space, {"found": main.best.allocation, **references}, histories)
        if main.pareto:
            _write_pareto(folder, space, main, tracker, say)
        rows = _rows(at_main, references, main, say)
        table, saved = _finish(at_main, rows, main, say, _model_folder(config, folder, config.main_target))
        front = _finish_front(space, points, table, folder, say) if config.prune.is_range else None
        _write_table(folder, table)
        recovered = None
        if material is not None and saved is not None:
            del space, at_main  # the dense model and its factors: training needs the room
            recovered = _recover(config, saved, material, tracker, say)
            table = _with_recovered(table, recovered, config)
            _write_table(folder, table)
        tracker.log_table(as_dicts(table))
        for name in ("report.md", "units_kept.png", "reward.png"):
            tracker.log_artifact(folder / name)
        if front is not None:
            _log_front(tracker, front, folder)
        return RunResult(table, main, folder, saved, tracker.run_id, front, recovered)


def check_plugins(config: RunConfig) -> None:
    """Create every plugin that the run names once, so that a wrong name or option fails before anything is loaded.

    Recovery is no plugin, and checked alike.

    Raises:
        ConfigError: a range of budgets with an agent that does not follow the target.
    """
    agent = config.agent.name
    if config.prune.is_range and not manager.get_class("agent", agent).budget_conditioned:
        raise ConfigError(
            f"prune.sparsity = {config.prune.sparsity!r} is a range of budgets, and agent {agent!r} proposes the same "
            "at every target",
            hint="Use --agent reinforce, or run one target at a time, e.g. --sparsity 0.2.",
        )
    manager.create("criterion", config.criterion.name, config.criterion.options)
    make_reward(config)
    if config.prior.name != "none":
        manager.create("heuristic", config.prior.name, config.prior.options)
    if config.recover.method != "none":
        check_method(config.recover, config.model.name)


def reference_rules(config: RunConfig) -> Mapping[str, tuple[str, JSONDict]]:
    """The rules that a run is compared with, (heuristic, options) by label; one shape for all layers spares no ends."""
    return UNIFORM_REFERENCES if config.prune.uniform else REFERENCES


def _search(space: Workspace, agent: Agent, tracker: Tracker, folder: Path, say: Reporter) -> list[Found]:
    """The search, and what it came to: at the target, or at every point of the front."""
    config = space.config
    log = folder / "episodes.jsonl"
    try:
        found = _run_search(space, agent, tracker, log, say, config.agent.name, "search", config.targets)
    except SearchInterrupted as stop:
        _write_found(folder, [stop.found], agent, space, tracker)
        raise
    _write_found(folder, found, agent, space, tracker)
    return found


def _search_random(space: Workspace, tracker: Tracker, folder: Path, say: Reporter) -> Found:
    baseline, log = manager.create("agent", "random"), folder / "episodes-random.jsonl"
    (found,) = _run_search(space, baseline, tracker, log, say, "random", "random", space.config.targets)
    return found


def _run_search(
    space: Workspace,
    agent: Agent,
    tracker: Tracker,
    log: Path,
    say: Reporter,
    label: str,
    prefix: str,
    targets: Sequence[float],
) -> list[Found]:
    config = space.config
    budget = config.search.episodes * space.env.episode_windows * space.env.window_tokens
    if log.exists() and (earlier := len(read_episodes(log))):
        say.say(f"search: {label}: {earlier} episodes of earlier sessions are taken from {log.name}")
    with say.stage(f"search: {label}", budget) as stage:

        def on_episode(episode: Episode) -> None:
            stage.advance(episode.tokens, f"tokens, reward {episode.reward:.3f}")

        def on_update(episodes: Sequence[Episode], update: Update) -> None:
            tracker.log_episodes(episodes, update.diagnostics, search=prefix)

        def on_point(found: Found) -> None:
            stage.advance(0, f"tokens, finals at {found.target:.0%} done")

        return search_front(
            space.env,
            agent,
            config.search,
            make_schedule(config, space.env),
            targets,
            seed=config.seed,
            log=log,
            on_episode=on_episode,
            on_update=on_update,
            on_point=on_point,
        )


def _say_how_many_shapes(space: Workspace, say: Reporter) -> None:
    for target in space.config.targets:
        count = len(space.env.budget.shapes(target))
        many = f"{count} shapes use up the budget, and the finals measure them all"
        one = "one shape uses up the budget, so there is nothing to choose"
        where = f" at {target:.1%}" if space.config.prune.is_range else ""
        say.say(f"uniform{where}: {many if count > 1 else one}")


def _has_random_baseline(config: RunConfig) -> bool:
    """Whether random allocations are compared with, which follow no target of their own.

    Under one shape for all layers they could find nothing that the finals do not measure anyway.
    """
    wanted = config.search.random_baseline and config.agent.name != "random"
    return wanted and not config.prune.is_range and not config.prune.uniform


def _references(space: Workspace, baseline: Found | None, say: Reporter) -> dict[str, Allocation]:
    """What the found allocation is compared with, all through the same projection and rounding."""
    rules = reference_rules(space.config)
    allocations = {label: space.project(*rule)[1] for label, rule in rules.items()}
    prior = space.config.prior
    if prior.name not in ("none", *(name for name, _ in rules.values())):
        allocations[f"{prior.name} (prior)"] = space.project(prior.name, prior.options)[1]
    if baseline is not None:
        tokens = baseline.search_tokens + baseline.final_tokens
        allocations[f"best of {len(baseline.history)} random"] = baseline.best.allocation
        say.say(f"random search took {tokens:,} tokens, finals included")
    return allocations


def _rows(
    space: Workspace, references: Mapping[str, Allocation], found: Found, say: Reporter, dense: Row | None = None
) -> list[Row]:
    """Every row of the table but the one that is saved; the dense one is measured where it is not given."""
    agent, kept = found_name(space.config), found.best.allocation.kept
    rows = [measure(space, "dense", say) if dense is None else dense]
    wanted: list[tuple[str, Sequence[int], Refit, bool]] = [
        *((f"{label} + ridge", allocation.kept, "ridge", False) for label, allocation in references.items()),
        (f"{agent}, plain", kept, "none", True),
    ]
    for label, units, refit, is_found in wanted:
        with cut_to(space, units, refit, say):
            rows.append(measure(space, label, say, is_found=is_found))
    return rows


def _finish(
    space: Workspace, rows: list[Row], found: Found, say: Reporter, model: Path
) -> tuple[ReportTable, SavedModel | None]:
    """The found allocation with each final refit; the one with the lower loss on the search split is saved."""
    config, kept = space.config, found.best.allocation.kept
    name = found_name(config)
    with cut_to(space, kept, "ridge", say):
        ridge = measure(space, f"{name} + ridge", say, is_found=True)
        ridge_loss = finals_loss(space.env, config.search.final_tokens, config.seed)
    if config.output.sequential:
        with cut_to(space, kept, "sequential", say):
            sequential = measure(space, f"{name} + sequential ridge", say, is_found=True)
            if finals_loss(space.env, config.search.final_tokens, config.seed) < ridge_loss:
                table = ReportTable((*rows, ridge, replace(sequential, note=SAVED_NOTE)), header(space))
                return table, _save(space, found, table, model)
        rows = [*rows, replace(ridge, note=SAVED_NOTE), sequential]
    else:
        rows = [*rows, ridge]
    with cut_to(space, kept, "ridge", say):
        table = ReportTable(tuple(rows), header(space))
        return table, _save(space, found, table, model)


def _finish_front(space: Workspace, points: Sequence[Found], table: ReportTable, folder: Path, say: Reporter) -> Front:
    """Measure every point of a front on the report split, the rules beside it; save the models that are wanted.

    Args:
        space: of the run over the range.
        points: what was found at every target.
        table: of the main target, which is not measured again.
        folder: where models go.
        say: where progress goes.
    """
    config, name = space.config, found_name(space.config)
    measured = []
    for found in points:
        rows = {row.label: row for row in table.rows}
        point = at_target(space, found.target)
        references = _references(point, None, say)
        if found.target != config.main_target:
            say.say(f"target {found.target:.1%}")
            if config.output.save_all:
                own = _rows(point, references, found, say, rows["dense"])
                full, _ = _finish(point, own, found, say, _model_folder(config, folder, found.target))
                rows = {row.label: row for row in full.rows}
            else:
                for label, allocation in {**references, name: found.best.allocation}.items():
                    with cut_to(point, allocation.kept, "ridge", say):
                        rows[f"{label} + ridge"] = measure(point, f"{label} + ridge", say, is_found=label == name)
        measured.append(
            FrontPoint(
                target=found.target,
                found=rows[f"{name} + ridge"],
                references={label: rows[f"{label} + ridge"] for label in references},
                allocation=found.best.allocation,
                origin=found.best.origin,
                finals_loss=found.best.loss,
            )
        )
    return Front(
        label=name,
        points=tuple(measured),
        dense=next(row for row in table.rows if row.is_dense),
        header=table.header,
        search_tokens=points[0].search_tokens,
        final_tokens=sum(found.final_tokens for found in points),
        seconds=points[-1].seconds,
    )


def _model_folder(config: RunConfig, folder: Path, target: float) -> Path:
    """``model``, or ``model-0.20`` where the model of every point is saved."""
    if not config.output.save_all:
        return folder / "model"
    return folder / f"model-{dict(zip(config.targets, point_names(config.targets), strict=True))[target]}"


def _log_front(tracker: Tracker, front: Front, folder: Path) -> None:
    """Write a front down; in MLflow the target in percent is the step."""
    write_text(folder / "front.json", json.dumps(front_as_dict(front), indent=2))
    write_text(folder / "front.md", front_markdown(front))
    front_figure(front, folder / "front.png")
    tracker.log_metrics(
        [
            (f"front/perplexity/{slug(label)}", front.row(point, label).perplexity, round(100 * point.target))
            for label in front.labels
            for point in front.points
        ]
    )
    for name in ("front.json", "front.md", "front.png"):
        tracker.log_artifact(folder / name)


def _recover(config: RunConfig, saved: SavedModel, material: Material, tracker: Tracker, say: Reporter) -> Recovered:
    try:
        return train_and_save(
            config,
            saved.path,
            output_folder(saved.path),
            tracker,
            say,
            dense=config.model.name,
            material=material,
        )
    except KeyboardInterrupt:
        say.say(f"the pruned model is in {saved.path}; go on with: ffgym recover {saved.path.parent}")
        raise


def _with_recovered(table: ReportTable, recovered: Recovered, config: RunConfig) -> ReportTable:
    """The table with one more row: the saved refit after training."""
    before = saved_row(table)
    row = replace(
        before,
        label=f"{before.label} + {config.recover.method}",
        perplexity=recovered.after.perplexity,
        loss_stderr=loss_error(recovered.after),
        note=f"trained after the final calibration, saved in {recovered.saved.path.name}/",
    )
    return ReportTable((*table.rows, row), table.header)


def saved_row(table: ReportTable) -> Row:
    """The row whose model is saved: the noted one of two final refits, or the last row where there is only one."""
    return next((row for row in table.rows if row.note == SAVED_NOTE), table.rows[-1])


def found_name(config: RunConfig) -> str:
    """What the rows of the found allocation are called: the agent, or the heuristic that it ran."""
    return f"{config.prior.name} (one-shot)" if config.agent.name == "one-shot" else config.agent.name


def measure(space: Workspace, label: str, say: Reporter, *, is_found: bool = False) -> Row:
    """One row: the model as it is cut now, on the report split."""
    prunable, windows = space.prepared.prunable, space.splits.report.windows
    with say.stage(f"report: {label}", len(windows)) as stage:
        batch = tokens_per_batch(prunable.model.device)
        result = evaluate(prunable.model, windows, tokens_per_batch=batch, on_batch=stage.advance)
    new_biases = prunable.new_bias_params(stock=space.config.prune.uniform)
    size, dense = space.sizes(prunable.kept, new_biases=new_biases), space.sizes(prunable.dense_units)
    resource = space.config.prune.resource
    losses = np.array(result.losses)
    return Row(
        label=label,
        perplexity=result.perplexity,
        loss_stderr=float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else None,
        sparsity_prunable=max(0.0, space.env.budget.allocation(prunable.kept).sparsity),
        sparsity_model=1 - size.of(resource) / dense.of(resource),
        parameters=size.parameters,
        macs_per_token=size.macs,
        kv_bytes_per_token=size.kv_bytes,
        is_found=is_found,
    )


def header(space: Workspace) -> str:
    """How the table's numbers were measured."""
    report, calibration = space.splits.report, space.splits.calibration
    windows = report.windows
    text = measurement(
        model=space.loaded.description,
        corpus=report.corpus.name,
        split="report",
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        window=windows.shape[1],
        dtype=str(space.loaded.dtype).removeprefix("torch."),
        bos=report.bos,
        calibration=_described(calibration),
        seed=space.config.seed,
        context=space.config.prune.context,
    )
    return text if space.latency is None else f"{text} Latency: {space.latency.measured}."


def _save(space: Workspace, found: Found, table: ReportTable, folder: Path) -> SavedModel | None:
    """Save the model as it is cut now, with its card, where one is wanted."""
    config, prunable = space.config, space.prepared.prunable
    if not config.output.save_model:
        return None
    is_demo = config.model.name == "demo"
    name, allocation = Path(config.model.name).name, found.best.allocation
    card = model_card(
        title=f"{name}, {allocation.sparsity:.0%} of {config.prune.resource} pruned",
        base_model=DEMO_BASE if is_demo else None,
        license=DEMO_LICENSE if is_demo else None,
        table=table,
        saved=saved_row(table),
        sublayers=prunable.sublayers,
        allocation=allocation,
        command="ffgym run --config config.toml",
        seed=config.seed,
        splits={s.role: _described(s) for s in (space.splits.calibration, space.splits.search, space.splits.report)},
        caveats=[DEMO_CAVEAT] if is_demo else [],
        stock=config.prune.uniform,
    )
    return save_pruned(
        prunable.model,
        space.loaded.tokenizer,
        folder,
        kept=prunable.kept,
        family=prunable.family,
        card=card,
        stock=config.prune.uniform,
        overwrite=True,  # of a resumed run that had saved it: a folder of anything else is never replaced
    )


def _write_found(folder: Path, points: Sequence[Found], agent: Agent, space: Workspace, tracker: Tracker) -> None:
    """Allocations and policy; ``allocation.json`` is that of the main target, or of what there is."""
    main = next((found for found in points if found.target == space.config.main_target), points[0])
    files = {"allocation.json": main}
    if len(points) > 1:
        names = point_names([found.target for found in points])
        files |= {f"allocation-{name}.json": found for name, found in zip(names, points, strict=True)}
    for file, found in files.items():
        write_text(folder / file, json.dumps(_allocation_json(found), indent=2))
        tracker.log_artifact(folder / file)
    state = called(agent, agent.state, "giving its state")
    if state:
        sublayers = space.prepared.prunable.sublayers
        text = called(agent, lambda: policy_text(space.config, sublayers, state), "giving its state")
        write_text(folder / "policy.json", text)
        tracker.log_artifact(folder / "policy.json")


def _write_pareto(folder: Path, space: Workspace, found: Found, tracker: Tracker, say: Reporter) -> None:
    """``pareto.json`` and ``pareto.png``: the finalists by their objectives, where the reward weighs several."""
    env, tokens, seed = space.env, space.config.search.final_tokens, space.config.seed
    subset, examples = finals_windows(env, tokens, seed), finals_examples(env, tokens, seed)
    dense = env.dense(subset, examples)
    goals = check_objectives(env.reward, dense, dense)
    winners = {candidate.allocation.kept for candidate in found.pareto}
    points = [
        ParetoPoint(
            candidate.allocation,
            candidate.origin,
            loss=candidate.loss,
            reward=candidate.reward,
            objectives=candidate.objectives,
            dominated=candidate.allocation.kept not in winners,
            chosen=candidate is found.best,
        )
        for candidate in found.finalists
        if candidate.objectives and candidate.loss is not None and candidate.reward is not None
    ]
    measured = len(subset) * env.window_tokens
    note = f"measured again on {measured:,} search tokens" + (f" and {len(examples)} examples" if examples else "")
    data = pareto_json(points, goals, tokens=measured, examples=len(examples))
    write_text(folder / "pareto.json", json.dumps(data, indent=2))
    pareto_figure(points, goals, folder / "pareto.png", note=note)
    for name in ("pareto.json", "pareto.png"):
        tracker.log_artifact(folder / name)
    say.say(f"Pareto set: {len(winners)} of {len(points)} allocations that were {note}, in {folder / 'pareto.json'}")


def _allocation_json(found: Found) -> JSONDict:
    best = found.best
    return {
        "kept": list(best.allocation.kept),
        "importance": [round(float(a), 6) for a in best.importance],
        "resource": best.allocation.resource,
        "sparsity": best.allocation.sparsity,
        "origin": best.origin,
        "finals_loss": best.loss,
        "finals_dense_loss": found.dense_loss,
        "episodes": len(found.history),
    }


def _draw(
    folder: Path,
    space: Workspace,
    allocations: Mapping[str, Allocation],
    histories: Mapping[str, Sequence[Episode]],
) -> None:
    units_kept_figure(space.prepared.prunable.sublayers, allocations, folder / "units_kept.png")
    reward_figure(histories, folder / "reward.png")


def _log_splits(tracker: Tracker, splits: Splits) -> None:
    for split in (splits.calibration, splits.search, splits.report):
        tracker.log_dataset(
            name=split.name,
            context=split.role,
            digest=split.digest,
            corpus=split.corpus.name,
            tokens=split.windows.numel(),
        )


def _tags(space: Workspace, agent: Agent) -> dict[str, str]:
    config = space.config
    used: dict[str, Any] = {
        f"agent.{config.agent.name}": agent,
        f"criterion.{config.criterion.name}": manager.get_class("criterion", config.criterion.name),
        f"reward.{config.reward.name}": space.env.reward,
    }
    if config.prior.name != "none":
        used[f"heuristic.{config.prior.name}"] = manager.get_class("heuristic", config.prior.name)
    plugins = {name: str(manager.package_of(plugin)) for name, plugin in used.items()}
    return environment_tags(device=str(space.loaded.device), threads=torch.get_num_threads(), plugins=plugins)


def _described(split: Split) -> str:
    windows = split.windows
    return f"{split.corpus.name}, {windows.numel():,} tokens in windows of {windows.shape[1]:,}"


def _write_table(folder: Path, table: ReportTable) -> None:
    write_text(folder / "report.md", markdown(table))
    write_text(folder / "report.json", json.dumps(as_dicts(table), indent=2))
