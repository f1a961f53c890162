"""``run(config)``: the whole pipeline on one page.

model, data -> statistics -> order -> refits -> search -> final calibration -> report -> saved model -> MLflow
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from ffgym.config import RunConfig, to_toml
from ffgym.data.splits import Split, Splits
from ffgym.envs.building import build_env, load_parts, make_budget, prepare_model, tokens_per_batch
from ffgym.envs.pruning_env import PruningEnv
from ffgym.envs.schedule import Schedule
from ffgym.errors import ConfigError, OutputError
from ffgym.evaluation.perplexity import evaluate
from ffgym.evaluation.size import SizeMeter
from ffgym.models.export import SavedModel, load_line, save_pruned
from ffgym.models.loading import LoadedModel
from ffgym.models.preparation import Prepared
from ffgym.models.sequential import calibrate_sequentially
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.plugins.contracts import check_importance
from ffgym.recovery import Material, Recovered, check_method, gather, output_folder, train_and_save
from ffgym.report.card import model_card
from ffgym.report.figures import reward_figure, units_kept_figure
from ffgym.report.progress import Reporter
from ffgym.report.recovery import loss_error
from ffgym.report.table import ReportTable, Row, as_dicts, markdown, measurement, terminal
from ffgym.search import Found, SearchInterrupted, finals_loss, search
from ffgym.tracking import Tracker, environment_tags, fetch_artifact
from ffgym.types import Allocation, Episode, JSONDict, Update

REFERENCES: Mapping[str, tuple[str, JSONDict]] = {
    "uniform": ("uniform", {}),
    "MLPs only, ends spared": ("mlp-first", {"spare_first": 3, "spare_last": 1}),
}
DEMO_LICENSE = "apache-2.0"
DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_CAVEAT = "The dense model is a dequantised Q4_1 file, not the original weights: compare within the table"

# What a run writes: --overwrite clears these and nothing else.
WRITTEN = frozenset(
    {"config.toml", "episodes.jsonl", "episodes-random.jsonl", "allocation.json", "policy.json"}
    | {"report.md", "report.json", "units_kept.png", "reward.png", "model"}
    | {"model-recovered", "model-recovered.unfinished"}
)
STAGING = (".model.part-", ".model-recovered.part-")  # what a killed process leaves of a model
NOT_WRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

# Sequential refits pull towards the nested ones this much harder than those pulled towards the dense weights: on the
# demo model, 1 and 10 times overfitted the calibration text (experiments/calibration/strength.py).
SEQUENTIAL_STRENGTH = 100.0

Refit = Literal["none", "ridge", "sequential"]
SAVED_NOTE = "the refit that is saved: the lower loss on windows of the search split"


@dataclass(frozen=True)
class Workspace:
    """What all searches of one configuration share: the model with its paths, the splits, the environment.

    Attributes:
        config: the run.
        loaded: model and tokenizer.
        splits: calibration, search, report.
        prepared: pruning paths.
        env: the stationary environment.
        sizes: size of any allocation.
    """

    config: RunConfig
    loaded: LoadedModel
    splits: Splits
    prepared: Prepared
    env: PruningEnv
    sizes: SizeMeter

    def project(self, heuristic: str, options: JSONDict) -> tuple[np.ndarray, Allocation]:
        """Importances of a heuristic, and the allocation they come to at the target."""
        importance = self.importance(heuristic, options)
        return importance, self.env.budget.project(importance, self.config.prune.sparsity)

    def prior(self, heuristic: str, options: JSONDict) -> np.ndarray:
        """Where an agent starts: the importances, shape (2L,), that say exactly what the heuristic's allocation keeps.

        Projecting them changes nothing, and unlike the heuristic's own they are not at the ends of their range, where
        exploration would be clipped.
        """
        _, allocation = self.project(heuristic, options)
        units = np.array(self.prepared.prunable.dense_units)
        result: np.ndarray = (2 * np.array(allocation.kept) / units - 1).astype(np.float32)
        return result

    def importance(self, heuristic: str, options: JSONDict) -> np.ndarray:
        """Importances of a heuristic, shape (2L,), float32."""
        return check_importance(manager.create("heuristic", heuristic, options), self.prepared.views)


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
    """

    table: ReportTable
    found: Found
    folder: Path
    saved: SavedModel | None
    mlflow_run: str | None
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
            "folder": str(self.folder),
            "model": None if self.saved is None else str(self.saved.path),
            "recovered_model": None if self.recovered is None else str(self.recovered.saved.path),
            "mlflow_run": self.mlflow_run,
        }

    def print(self, console: Console) -> None:
        """The table, where things are, and how to load the model."""
        console.print(terminal(self.table))
        lines = [f"Results and pictures: {self.folder}"]
        if self.mlflow_run is not None:
            lines.append(f"MLflow run {self.mlflow_run}: compare runs with `ffgym ui`")
        if self.saved is not None:
            lines += ["Load the pruned model with", f"  {load_line(self.saved.path)}"]
        if self.recovered is not None:
            lines += [*self.recovered.told, f"Load it with\n  {load_line(self.recovered.saved.path)}"]
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def run(config: RunConfig, *, progress: Console | None = None) -> RunResult:
    """Search, prune, calibrate, report and save, as the configuration says.

    Args:
        config: everything that decides the run.
        progress: where progress goes; stderr where left out.

    Raises:
        FFGymError: what cannot be done, and what to do about it; the MLflow run is marked FAILED.
        KeyboardInterrupt: Ctrl-C; what was found so far is saved and printed, the MLflow run is marked KILLED.
    """
    say = Reporter(progress or Console(stderr=True))
    check_plugins(config)
    agent = make_agent(config)
    folder = claim_folder(config)
    tracking = config.tracking
    with (
        Tracker(Path(tracking.root), tracking.experiment, folder.name, tracking.enabled) as tracker,
        disk_errors(),
        _leaving_no_husk(folder),
        _saying_what_is_kept(folder, say),
    ):
        tracker.log_config(config.model_dump(mode="json"), to_toml(config))
        _write(folder / "config.toml", to_toml(config))
        prior = [] if config.prior.name == "none" else [(config.prior.name, config.prior.options)]
        space = open_workspace(config, [*prior, *REFERENCES.values()], say)
        material = None
        if config.recover.method != "none":  # now, so that a corpus that will not do is known before the search
            material = gather(config, space.loaded.tokenizer, space.loaded.context_limit, space.splits)
        if prior:
            agent.prior_mean = space.prior(*prior[0])
        tracker.set_tags(_tags(space, agent))
        _log_splits(tracker, space.splits)
        found = _search(space, agent, tracker, folder, say)
        histories: dict[str, Sequence[Episode]] = {config.agent.name: found.history}
        baseline = None
        if agent.searches and config.search.random_baseline and config.agent.name != "random":
            baseline = _search_random(space, tracker, folder, say)
            histories["random"] = baseline.history
        references = _references(space, baseline, say)
        _draw(folder, space, {"found": found.best.allocation, **references}, histories)
        rows = _rows(space, references, found, say)
        table, saved = _finish(space, rows, found, folder, say)
        _write_table(folder, table)
        recovered = None
        if material is not None and saved is not None:
            del space  # the dense model and its factors: training needs the room
            recovered = _recover(config, saved, material, tracker, say)
            table = _with_recovered(table, recovered, config)
            _write_table(folder, table)
        tracker.log_table(as_dicts(table))
        for name in ("report.md", "units_kept.png", "reward.png"):
            tracker.log_artifact(folder / name)
        return RunResult(table, found, folder, saved, tracker.run_id, recovered)


def open_workspace(config: RunConfig, heuristics: Sequence[tuple[str, JSONDict]], say: Reporter) -> Workspace:
    """Load, split, prepare.

    Args:
        config: the run.
        heuristics: (name, options) of every heuristic that will be asked; what they need is kept.
        say: where progress goes.
    """
    with say.stage("load model and text", 1):
        loaded, splits = load_parts(config)
    say.say(f"{loaded.description}, {str(loaded.dtype).removeprefix('torch.')} on {loaded.device}")
    needs = frozenset[str]().union(*(manager.create("heuristic", name, options).needs for name, options in heuristics))
    budget = make_budget(config, loaded.model)
    windows = splits.calibration.windows
    with say.stage("collect statistics, order and factorise", len(windows)) as stage:
        prepared = prepare_model(config, loaded, windows, keep=needs, on_progress=stage)
    env = build_env(config, prepared, splits.search.windows, budget)
    sizes = SizeMeter(prepared.prunable, context=config.prune.context)
    return Workspace(config, loaded, splits, prepared, env, sizes)


def with_config(space: Workspace, config: RunConfig) -> Workspace:
    """The same model, splits and paths under a configuration that differs in agent, seed, search or sparsity only."""
    budget = make_budget(config, space.loaded.model)
    env = build_env(config, space.prepared, space.splits.search.windows, budget)
    return replace(space, config=config, env=env)


def make_agent(config: RunConfig) -> Agent:
    """The agent of a run, started from another run's policy where ``search.init_from`` names one."""
    agent = manager.create("agent", config.agent.name, config.agent.options)
    source = config.search.init_from
    if source is not None:
        if re.fullmatch("[0-9a-f]{32}", source) and not Path(source).exists():
            with tempfile.TemporaryDirectory() as folder:
                policy = fetch_artifact(Path(config.tracking.root), source, "policy.json", Path(folder))
                state = read_policy(policy, config)
        else:
            state = read_policy(Path(source).expanduser(), config)
        try:
            agent.load_state(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"search.init_from = {source!r}: its policy is not what agent {config.agent.name!r} writes ({error!r})",
                hint="Start from another run, or leave --init-from out.",
            ) from error
    return agent


def check_plugins(config: RunConfig) -> None:
    """Create every plugin that the run names once, so that a wrong name or option fails before anything is loaded.

    Recovery is no plugin, and checked alike.
    """
    manager.create("criterion", config.criterion.name, config.criterion.options)
    manager.create("reward", config.reward.name, config.reward.options)
    if config.prior.name != "none":
        manager.create("heuristic", config.prior.name, config.prior.options)
    if config.recover.method != "none":
        check_method(config.recover, config.model.name)


def read_policy(source: Path, config: RunConfig) -> JSONDict:
    """The state in another run's ``policy.json``.

    Args:
        source: a run's folder, or the file.
        config: the run that wants to start from it.

    Raises:
        ConfigError: nothing there, damaged, or of another agent or model shape.
    """
    path = source / "policy.json" if source.is_dir() else source
    try:
        policy = json.loads(path.read_text(encoding="utf-8"))
        owner, state = policy["agent"], policy["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"search.init_from = {str(source)!r}: no policy could be read from {path} ({error})",
            hint="Give the folder of an earlier run, e.g. one under runs/, or its MLflow run id.",
        ) from error
    if owner != config.agent.name:
        raise ConfigError(
            f"search.init_from = {str(source)!r} holds a policy of agent {owner!r}, this run is {config.agent.name!r}",
            hint=f"Use --agent {owner}, or start from a run of {config.agent.name!r}.",
        )
    return dict(state)


def make_schedule(config: RunConfig, env: PruningEnv) -> Schedule:
    """The ramps of a run."""
    table = config.schedule
    return Schedule(
        target=config.prune.sparsity,
        windows=env.episode_windows,
        start=table.sparsity_start,
        sparsity=table.sparsity,
        fidelity=table.fidelity,
        ramp_share=table.ramp_share,
    )


def claim_folder(config: RunConfig) -> Path:
    """Make the run's folder; refuse one that holds something unless it may be overwritten.

    Raises:
        OutputError: occupied, or it cannot be made or written.
    """
    out = config.output
    if out.dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = Path("runs") / f"{stamp}-{config.agent.name}-{config.criterion.name}"
    else:
        folder = Path(out.dir).expanduser()
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if not out.overwrite:
                raise OutputError(
                    f"the output folder {folder} exists and is not empty",
                    hint="Choose another one with --output DIR, or replace its contents with --overwrite.",
                )
            _clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write to the output folder {folder}: {error.strerror or error}",
            hint="Choose a folder on a disk that is writable and has room, with --output DIR.",
        ) from error
    return folder.resolve()


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote; refuse where anything else is there, e.g. the folder of somebody's project."""
    entries = sorted(folder.iterdir())
    foreign = [path.name for path in entries if path.name not in WRITTEN and not path.name.startswith(STAGING)]
    if foreign or not (folder / "config.toml").exists():
        what = f"holds {foreign[0]}, which ffgym did not write" if foreign else "was not written by ffgym"
        raise OutputError(
            f"{folder} is not empty and {what}, so --overwrite will not clear it",
            hint="Choose another folder with --output DIR.",
        )
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a full or read-only disk, wherever in a run it shows, into an error with a next step."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise OutputError(
            f"cannot write {error.filename or 'results'}: {error.strerror}",
            hint="Make room on the disk, or choose another folder with --output DIR.",
        ) from error


@contextmanager
def _leaving_no_husk(folder: Path) -> Iterator[None]:
    """Remove a folder in which a run that ended early left its configuration only: the corrected command needs it."""
    try:
        yield
    except BaseException:
        if [path.name for path in folder.iterdir()] == ["config.toml"]:
            shutil.rmtree(folder)
        raise


@contextmanager
def _saying_what_is_kept(folder: Path, say: Reporter) -> Iterator[None]:
    """After Ctrl-C, say what the run has found and where that is."""
    try:
        yield
    except KeyboardInterrupt:
        path = folder / "allocation.json"
        if path.exists():
            best = json.loads(path.read_text(encoding="utf-8"))
            say.say(
                f"interrupted after {best['episodes']} episodes of the search; best so far ({best['origin']}, sparsity "
                f"{best['sparsity']:.4f}) is in {path}"
            )
        else:
            say.say("interrupted before the first episode had ended: there is nothing to keep")
        raise


def _search(space: Workspace, agent: Agent, tracker: Tracker, folder: Path, say: Reporter) -> Found:
    try:
        found = _run_search(space, agent, tracker, folder / "episodes.jsonl", say, space.config.agent.name, "search")
    except SearchInterrupted as stop:
        _write_found(folder, stop.found, agent, space, tracker)
        raise
    _write_found(folder, found, agent, space, tracker)
    return found


def _search_random(space: Workspace, tracker: Tracker, folder: Path, say: Reporter) -> Found:
    baseline = manager.create("agent", "random")
    return _run_search(space, baseline, tracker, folder / "episodes-random.jsonl", say, "random", "random")


def _run_search(
    space: Workspace, agent: Agent, tracker: Tracker, log: Path, say: Reporter, label: str, prefix: str
) -> Found:
    config = space.config
    budget = config.search.episodes * space.env.episode_windows * space.env.window_tokens
    with say.stage(f"search: {label}", budget) as stage:

        def on_episode(episode: Episode) -> None:
            stage.advance(episode.tokens, f"tokens, reward {episode.reward:.3f}")

        def on_update(episodes: Sequence[Episode], update: Update) -> None:
            tracker.log_episodes(episodes, update.diagnostics, search=prefix)

        return search(
            space.env,
            agent,
            config.search,
            make_schedule(config, space.env),
            seed=config.seed,
            log=log,
            on_episode=on_episode,
            on_update=on_update,
        )


def _references(space: Workspace, baseline: Found | None, say: Reporter) -> dict[str, Allocation]:
    """What the found allocation is compared with, all through the same projection and rounding."""
    allocations = {label: space.project(*rule)[1] for label, rule in REFERENCES.items()}
    prior = space.config.prior
    if prior.name not in ("none", *(name for name, _ in REFERENCES.values())):
        allocations[f"{prior.name} (prior)"] = space.project(prior.name, prior.options)[1]
    if baseline is not None:
        tokens = baseline.search_tokens + baseline.final_tokens
        allocations[f"best of {len(baseline.history)} random"] = baseline.best.allocation
        say.say(f"random search took {tokens:,} tokens, finals included")
    return allocations


def _rows(space: Workspace, references: Mapping[str, Allocation], found: Found, say: Reporter) -> list[Row]:
    """Every row of the table but the one that is saved."""
    agent, kept = found_name(space.config), found.best.allocation.kept
    rows = [measure(space, "dense", say)]
    wanted: list[tuple[str, Sequence[int], Refit, bool]] = [
        *((f"{label} + ridge", allocation.kept, "ridge", False) for label, allocation in references.items()),
        (f"{agent}, plain", kept, "none", True),
    ]
    for label, units, refit, is_found in wanted:
        with cut_to(space, units, refit, say):
            rows.append(measure(space, label, say, is_found=is_found))
    return rows


def _finish(
    space: Workspace, rows: list[Row], found: Found, folder: Path, say: Reporter
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
                return table, _save(space, found, table, folder)
        rows = [*rows, replace(ridge, note=SAVED_NOTE), sequential]
    else:
        rows = [*rows, ridge]
    with cut_to(space, kept, "ridge", say):
        table = ReportTable(tuple(rows), header(space))
        return table, _save(space, found, table, folder)


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


@contextmanager
def cut_to(space: Workspace, kept: Sequence[int], refit: Refit, say: Reporter) -> Iterator[None]:
    """The model cut to ``kept`` units per sublayer, and put back afterwards."""
    prepared = space.prepared
    try:
        if refit == "sequential":
            with say.stage("sequential calibration", len(prepared.prunable.halves) // 2) as stage:
                calibrate_sequentially(
                    prepared.prunable,
                    kept,
                    space.splits.calibration.windows,
                    [SEQUENTIAL_STRENGTH * ridge for ridge in prepared.ridges],
                    tokens_per_batch=tokens_per_batch(prepared.prunable.model.device),
                    on_progress=stage,
                )
        else:
            prepared.prunable.cut(kept, calibrated=refit == "ridge")
        yield
    finally:
        prepared.prunable.restore()


def measure(space: Workspace, label: str, say: Reporter, *, is_found: bool = False) -> Row:
    """One row: the model as it is cut now, on the report split."""
    prunable, windows = space.prepared.prunable, space.splits.report.windows
    with say.stage(f"report: {label}", len(windows)) as stage:
        batch = tokens_per_batch(prunable.model.device)
        result = evaluate(prunable.model, windows, tokens_per_batch=batch, on_batch=stage.advance)
    size, dense = space.sizes(prunable.kept), space.sizes(prunable.dense_units)
    resource = space.config.prune.resource
    losses = np.array(result.losses)
    return Row(
        label=label,
        perplexity=result.perplexity,
        loss_stderr=float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else None,
        sparsity_prunable=max(0.0, space.env.budget.allocation(prunable.kept).sparsity),
        sparsity_model=1 - size.of(resource) / dense.of(resource),
        parameters=sum(parameter.numel() for parameter in prunable.model.parameters()),
        macs_per_token=size.macs,
        kv_bytes_per_token=size.kv_bytes,
        is_found=is_found,
    )


def header(space: Workspace) -> str:
    """How the table's numbers were measured."""
    report, calibration = space.splits.report, space.splits.calibration
    windows = report.windows
    return measurement(
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
    )
    return save_pruned(
        prunable.model,
        space.loaded.tokenizer,
        folder / "model",
        kept=prunable.kept,
        family=prunable.family,
        card=card,
    )


def _write_found(folder: Path, found: Found, agent: Agent, space: Workspace, tracker: Tracker) -> None:
    _write(folder / "allocation.json", json.dumps(_allocation_json(found), indent=2))
    tracker.log_artifact(folder / "allocation.json")
    state = agent.state()
    if state:
        policy = {
            "agent": space.config.agent.name,
            "sparsity": space.config.prune.sparsity,
            "sublayers": [s.name for s in space.prepared.prunable.sublayers],
            "state": state,
        }
        _write(folder / "policy.json", json.dumps(policy, default=_plain))
        tracker.log_artifact(folder / "policy.json")


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
    _write(folder / "report.md", markdown(table))
    _write(folder / "report.json", json.dumps(as_dicts(table), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}",
            hint="Make room on the disk, or choose another folder with --output DIR.",
        ) from error
