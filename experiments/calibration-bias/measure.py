"""Does ridge calibration in the reward bias the search toward what a linear refit can repair?

    python experiments/calibration-bias/measure.py experiments/calibration-bias/demo.toml

Allocations (found with ridge in the reward, found without calibration, rules) are each recovered in four ways, which
all start at plain removal and see the same calibration windows:

    none, ridge         linear in the consumers, or nothing at all
    distil-mlp, lora    not linear: gradient descent through the activations, over several seeds

and measured on the report split. If ridge in the reward favours what ridge repairs, the lead of the allocation found
with it must shrink where the recovery is another one: the third table says by how much, paired over windows.

One JSON file a cell; what is there is not computed again. ``--report`` computes nothing. Weights that training leaves
are chosen on windows of the search split; the report split decides nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from rich.console import Console

from ffgym.config.refusals import config_error
from ffgym.config.tables import RecoverTable, RunConfig
from ffgym.config.toml import digest, read_toml
from ffgym.errors import ConfigError, DataError, FFGymError
from ffgym.evaluation.perplexity import evaluate
from ffgym.export.checkpoint import save_pruned
from ffgym.files import FileFormat, Strict
from ffgym.models.loading import load
from ffgym.pipeline import task
from ffgym.recover.lora import Lora
from ffgym.recover.method import TrainingSetup
from ffgym.recover.recover import check_method, learning_rate
from ffgym.report.figures import new_figure, save_figure, tidy
from ffgym.report.progress import Reporter

LINEAR = ("none", "ridge")
TRAINED = ("distil-mlp", "lora")
RECOVERIES = (*LINEAR, *TRAINED)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Experiment(Strict):
    """The TOML file.

    Attributes:
        title: of the table.
        results: folder of the cells, relative to the file.
        seeds: of the recoveries that are trained.
        allocations: label -> JSON file with ``kept`` or ``final.kept``, relative to the file, or a heuristic's name.
        run: tables of ``RunConfig``.
        dated: when earlier code computed the results: they are shown, and nothing is computed.
        lora, distil_mlp: how the two are trained; keys of ``[recover]``.
    """

    title: str
    results: str
    seeds: list[int] = Field(min_length=2)
    allocations: dict[str, str] = Field(min_length=2)
    run: dict[str, Any] = Field(default_factory=dict)
    dated: str = ""
    lora: RecoverTable
    distil_mlp: RecoverTable = Field(alias="distil-mlp")

    @property
    def trained(self) -> dict[str, RecoverTable]:
        """The tables of the recoveries that are trained."""
        return {table.method: table for table in (self.lora, self.distil_mlp)}

    @field_validator("lora", "distil_mlp", mode="before")
    @classmethod
    def _names_its_method(cls, table: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return {**table, "method": str(info.field_name).replace("_", "-")}


@dataclass(frozen=True)
class Cell:
    """One allocation after one recovery."""

    allocation: str
    recovery: str
    seed: int
    kept: tuple[int, ...]
    digest: str
    path: Path


class CellResult(Strict):
    """What a result file holds; losses in nats per token, one a window of the report split."""

    allocation: str
    recovery: str
    seed: int
    digest: str
    kept: list[int]
    sparsity: float
    losses: list[float]
    dense_losses: list[float]
    tokens_per_window: int
    dtype: str
    threads: int
    seconds: float


RESULT = FileFormat("result", CellResult, DataError, "Delete it to compute it again.")
ALLOCATION = FileFormat(
    "allocation",
    dict[str, Any],
    DataError,
    "Give allocation.json of a run, or a result file of ffgym bench (run search.toml first).",
)


def read_experiment(file: Path) -> tuple[Experiment, RunConfig]:
    """The file, and the run that it describes."""
    try:
        spec = Experiment.model_validate(read_toml(file))
        return spec, RunConfig.model_validate({**spec.run, "tracking": {"enabled": False}})
    except ValidationError as error:
        raise config_error(error, Experiment) from None


def read_kept(path: Path) -> tuple[int, ...]:
    """Units per sublayer from ``allocation.json`` of a run, or from a cell of a bench."""
    content = ALLOCATION.read(path)
    return tuple(content.get("final", content)["kept"])


def make_cells(spec: Experiment, config: RunConfig, folder: Path, kept: dict[str, tuple[int, ...]]) -> list[Cell]:
    """Every allocation with every recovery: those without training first, then seed by seed."""
    cells = []
    for seed_index, seed in enumerate(spec.seeds):
        for recovery in RECOVERIES:
            if recovery in LINEAR and seed_index > 0:
                continue
            table = spec.trained.get(recovery)
            # Results that are there know LoRA's options under either method.
            options = None if table is None else {**Lora.Config().model_dump(), **table.model_dump()}
            for label, units in kept.items():
                facts = [digest(config), recovery, seed, units, options]
                identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
                name = f"{label} -- {recovery}" + (f" -- seed{seed}" if recovery in TRAINED else "")
                cells.append(Cell(label, recovery, seed, units, identity, folder / f"{name}.json"))
    return cells


def read_cell(cell: Cell) -> CellResult | None:
    """Its result, or ``None`` where there is none yet."""
    if not cell.path.exists():
        return None
    result = RESULT.read(cell.path)
    if result.digest != cell.digest:
        raise ConfigError(
            f"{cell.path} holds the result of another configuration", hint="Delete it, or set another results folder."
        )
    return result


class Bed:
    """The model and text that all cells share, and pruned copies of the model as users would load them."""

    def __init__(self, spec: Experiment, config: RunConfig, scratch: Path, reporter: Reporter) -> None:
        rules = [name for name in spec.allocations.values() if not name.endswith(".json")]
        self.space = task.open_task(config, [(name, {}) for name in rules], reporter)
        self.spec, self.reporter, self._scratch = spec, reporter, scratch
        self._dense: list[float] = []

    def losses(self, model: Any) -> list[float]:
        """Of every report window."""
        windows = self.space.splits.report.windows
        return list(evaluate(model, windows, tokens_per_batch=self.space.env.tokens_per_batch).losses)

    def dense_losses(self) -> list[float]:
        if not self._dense:
            with self.reporter.stage("report split: dense", 1):
                self._dense = self.losses(self.space.prepared.prunable.model)
        return self._dense

    def recovered_losses(self, cell: Cell) -> list[float]:
        if cell.recovery in LINEAR:
            with task.cut_to(self.space, cell.kept, calibrated=cell.recovery == "ridge"):
                return self.losses(self.space.prepared.prunable.model)
        model = self._plainly_pruned(cell)
        self._train(model, self.spec.trained[cell.recovery], cell.seed)
        return self.losses(model)

    def _plainly_pruned(self, cell: Cell) -> Any:
        folder = self._scratch / hashlib.sha256(str(cell.kept).encode()).hexdigest()[:16]
        prunable = self.space.prepared.prunable
        if not folder.exists():
            with task.cut_to(self.space, cell.kept, calibrated=False):
                tokenizer = self.space.loaded.tokenizer
                save_pruned(prunable, tokenizer, folder)
        dtype = self.space.loaded.dtype_name
        return load(str(folder), dtype=dtype, device=str(self.space.loaded.device)).model

    def _train(self, model: Any, table: RecoverTable, seed: int) -> None:
        splits, method = self.space.splits, check_method(table, self.space.loaded.name)
        held_out = splits.search.windows[-max(1, table.held_out_tokens // splits.search.windows.shape[1]) :]
        method.train(
            TrainingSetup(
                model=model,
                dense=self.space.prepared.prunable.model,
                windows=splits.calibration.windows,
                held_out=held_out,
                held_out_loss=lambda: evaluate(model, held_out).loss,
                tokens=table.tokens,
                batch_tokens=table.batch_tokens,
                learning_rate=learning_rate(table, method),
                evaluate_every=table.evaluate_every,
                seed=seed,
                tokens_per_pass=self.space.env.tokens_per_batch,
                progress=lambda steps: self.reporter.stage(table.method, steps),
                log=lambda _: None,
            )
        )


def compute(cells: Sequence[Cell], bed: Bed) -> None:
    """Every cell that is missing, one file each."""
    begun = time.monotonic()
    for done, cell in enumerate(cells):
        left = f", about {(time.monotonic() - begun) / done * (len(cells) - done) / 60:.0f} min left" if done else ""
        bed.reporter.print(
            f"cell {done + 1} of {len(cells)}: {cell.allocation}, {cell.recovery}, seed {cell.seed}{left}"
        )
        dense, start = bed.dense_losses(), time.monotonic()
        losses = bed.recovered_losses(cell)
        result = CellResult(
            allocation=cell.allocation,
            recovery=cell.recovery,
            seed=cell.seed,
            digest=cell.digest,
            kept=list(cell.kept),
            sparsity=bed.space.env.budget.allocation(cell.kept).sparsity,
            losses=losses,
            dense_losses=dense,
            tokens_per_window=bed.space.splits.report.windows.shape[1] - 1,
            dtype=bed.space.loaded.dtype_name,
            threads=torch.get_num_threads(),
            seconds=round(time.monotonic() - start, 1),
        )
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        cell.path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")


# --- what came out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A difference of losses, nats per token.

    Attributes:
        mean: over windows and seeds.
        windows: standard error over windows, of the differences on the same window, after averaging over seeds.
        seeds: standard error over seeds, where training drew at random; else ``None``.
    """

    mean: float
    windows: float
    seeds: float | None

    @property
    def error(self) -> float:
        """Both together: independent errors add in squares."""
        return math.hypot(self.windows, self.seeds or 0.0)

    def __str__(self) -> str:
        seeds = "" if self.seeds is None else f" (seeds ± {self.seeds:.4f})"
        return f"{self.mean:+.4f} ± {self.windows:.4f}{seeds}"


def estimate(differences: np.ndarray) -> Estimate:
    """From differences of shape (seeds, windows)."""
    seeds, windows = differences.shape
    per_window, per_seed = differences.mean(axis=0), differences.mean(axis=1)
    return Estimate(
        mean=float(differences.mean()),
        windows=float(per_window.std(ddof=1) / math.sqrt(windows)) if windows > 1 else math.nan,
        seeds=float(per_seed.std(ddof=1) / math.sqrt(seeds)) if seeds > 1 else None,
    )


class Losses:
    """Losses by allocation and recovery, shape (seeds, windows) each; one seed where nothing is drawn."""

    def __init__(self, results: Sequence[CellResult]) -> None:
        self.allocations = list(dict.fromkeys(result.allocation for result in results))
        self.recoveries = [name for name in RECOVERIES if any(result.recovery == name for result in results)]
        self._of: dict[tuple[str, str], list[list[float]]] = {}
        for result in sorted(results, key=lambda result: result.seed):
            self._of.setdefault((result.allocation, result.recovery), []).append(result.losses)
        self.dense = np.array([results[0].dense_losses])

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._of

    def of(self, allocation: str, recovery: str) -> np.ndarray:
        return np.array(self._of[allocation, recovery])

    def above_dense(self, allocation: str, recovery: str) -> Estimate:
        return estimate(self.of(allocation, recovery) - self.dense)

    def lead(self, allocation: str, recovery: str) -> Estimate:
        """How much better the first allocation is than this one; above zero where it is better."""
        return estimate(self._lead(allocation, recovery))

    def shrinkage(self, allocation: str, recovery: str) -> Estimate:
        """That lead after another recovery, less what it is after ridge; below zero where it shrinks."""
        return estimate(self._lead(allocation, recovery) - self._lead(allocation, "ridge"))

    def _lead(self, allocation: str, recovery: str) -> np.ndarray:
        ours, theirs = self.of(self.allocations[0], recovery), self.of(allocation, recovery)
        seeds = min(len(ours), len(theirs))
        difference: np.ndarray = theirs[:seeds] - ours[:seeds]
        return difference


def markdown(spec: Experiment, results: Sequence[CellResult]) -> str:
    """The three tables and what they say."""
    losses, first = Losses(results), results[0]
    reference, *others = losses.allocations
    tokens = first.tokens_per_window * len(first.losses)
    sparsities = {result.allocation: result.sparsity for result in results}
    lines = [
        f"# {spec.title}",
        "",
        (f"Computed {spec.dated} by an earlier version. " if spec.dated else "")
        + f"Report split, {tokens:,} tokens, {first.dtype}; dense perplexity {math.exp(losses.dense.mean()):.2f}. "
        "Every recovery starts at plain removal and sees the calibration split. ± one standard error over report "
        "windows, of differences on the same window; in brackets over training seeds.",
        "",
        "Sparsity: " + ", ".join(f"{label} {sparsity:.2%}" for label, sparsity in sparsities.items()) + ".",
        "",
        "## Loss above dense (nats per token)",
        "",
        *_grid(losses, losses.allocations, losses.recoveries, losses.above_dense),
        "",
        f"## Lead of '{reference}': above zero where it is the better one",
        "",
        *_grid(losses, others, losses.recoveries, losses.lead),
        "",
        "## That lead, less what it is after ridge: below zero where it shrinks",
        "",
        *_grid(losses, others, [name for name in losses.recoveries if name != "ridge"], losses.shrinkage),
        "",
        *(f"* {sentence}" for sentence in verdicts(losses)),
    ]
    return "\n".join(lines) + "\n"


def _grid(losses: Losses, allocations: Sequence[str], recoveries: Sequence[str], value: Any) -> list[str]:
    lines = [f"| recovery | {' | '.join(allocations)} |", "|---|" + "---:|" * len(allocations)]
    for recovery in recoveries:
        needed = {"ridge", recovery} if value == losses.shrinkage else {recovery}
        cells = [
            str(value(label, recovery))
            if all((name, wanted) in losses for wanted in needed for name in (label, losses.allocations[0]))
            else "—"
            for label in allocations
        ]
        lines.append(f"| {recovery} | {' | '.join(cells)} |")
    return lines


def verdicts(losses: Losses) -> list[str]:
    """One sentence for every trained recovery and every rival; two standard errors count as clear."""
    reference, *others = losses.allocations
    sentences = []
    for label in others:
        for recovery in TRAINED:
            if not all((a, r) in losses for a in (reference, label) for r in ("ridge", recovery)):
                continue
            lead, moved = losses.lead(label, recovery), losses.shrinkage(label, recovery)
            clear = abs(moved.mean) > 2 * moved.error
            change = ("shrinks" if moved.mean < 0 else "grows") if clear else "does not change clearly"
            better = (
                ("is the better one" if lead.mean > 0 else "is the worse one")
                if (abs(lead.mean) > 2 * lead.error)
                else "cannot be told from it"
            )
            sentences.append(
                f"Against '{label}', from ridge to {recovery}: the lead of '{reference}' {change} ({moved}); after "
                f"{recovery} it {better} ({lead})."
            )
    return sentences


def draw(losses: Losses, title: str, path: Path) -> None:
    """Loss above dense by recovery, a colour an allocation, with the error of its difference from the first."""
    figure = new_figure(8.5, 4.8)
    axes: Any = figure.subplots()
    for number, label in enumerate(losses.allocations):
        names = [name for name in losses.recoveries if (label, name) in losses]
        places = [losses.recoveries.index(name) + 0.15 * (number - (len(losses.allocations) - 1) / 2) for name in names]
        means = [losses.above_dense(label, name).mean for name in names]
        errors = [
            losses.lead(label, name).error if number and (losses.allocations[0], name) in losses else 0.0
            for name in names
        ]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(places, means, errors, fmt="o", capsize=3, color=colour, label=label)
    axes.set_xticks(range(len(losses.recoveries)), losses.recoveries)
    axes.set_xlabel("what the pruned model was given")
    axes.set_ylabel("report loss above dense (nats per token)")
    axes.set_title(title, loc="left", fontsize=11)
    tidy(axes)
    figure.legend(
        loc="outside lower left",
        ncols=len(losses.allocations),
        frameon=False,
        title=f"bars: error of the difference from '{losses.allocations[0]}'",
        fontsize=8,
        alignment="left",
    )
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute what is missing, then write table and figure beside the TOML file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="experiment file (TOML)")
    parser.add_argument("--report", action="store_true", help="compute nothing, show what is there")
    given = parser.parse_args(arguments)
    try:
        sys.stdout.write(measure(given.file, only_report=given.report))
    except FFGymError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(file: Path, *, only_report: bool = False, reporter: Reporter | None = None) -> str:
    """The whole experiment; the Markdown that was written."""
    reporter = reporter or Reporter(Console(stderr=True))
    spec, config = read_experiment(file)
    folder = file.parent / spec.results
    kept = {label: read_kept(file.parent / name) for label, name in spec.allocations.items() if name.endswith(".json")}
    if not only_report and not spec.dated:
        for table in spec.trained.values():
            check_method(table, config.model.name)
        with tempfile.TemporaryDirectory() as scratch:
            bed = Bed(spec, config, Path(scratch), reporter)
            for label, name in spec.allocations.items():
                if label not in kept:
                    kept[label] = bed.space.project(name, {}).kept
            cells = make_cells(spec, config, folder, {label: kept[label] for label in spec.allocations})
            compute([cell for cell in cells if read_cell(cell) is None], bed)
    found = [RESULT.read(path) for path in sorted(folder.glob("*.json"))]
    found = [result for result in found if result.seed in spec.seeds]
    results = [result for label in spec.allocations for result in found if result.allocation == label]
    if not results:
        raise DataError(f"no results in {folder} yet", hint="Run without --report.")
    text = markdown(spec, results)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(Losses(results), spec.title, file.with_suffix(".png"))
    return text


if __name__ == "__main__":
    sys.exit(main())
