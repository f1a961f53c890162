"""``recover(config, folder)``: train a saved model after pruning, and save it again.

model, splits -> training text that no split holds -> adapters or distillation -> report -> saved model -> MLflow
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ffgym.config.tables import RecoverTable, RunConfig
from ffgym.config.toml import to_toml
from ffgym.data.splits import Splits, windows_digest
from ffgym.errors import FFGymError, ModelError, OutputError, RecoveryError
from ffgym.evaluation.perplexity import evaluate
from ffgym.export.checkpoint import SavedModel, is_stock, load_line, refuse_occupied, save_again
from ffgym.interrupts import held_back_interrupts
from ffgym.models.checkpoint import MODEL_CONFIG
from ffgym.models.families import dense_or_pruned_family_of
from ffgym.models.loading import LoadedModel, load
from ffgym.models.origin import CARD, model_folder
from ffgym.models.placement import DTYPES
from ffgym.prepare.parts import cut_splits, tokens_per_batch
from ffgym.recover.checkpoint import Checkpoint, weights_digest
from ffgym.recover.distill import DistillationSettings, LayerFit, distil_mlps
from ffgym.recover.lora import LoraCurve, LoraSettings, require_peft, train_lora
from ffgym.recover.table import (
    Measured,
    RecoveryTable,
    as_dicts,
    distillation_figure,
    lora_figure,
    recovered_card,
    terminal,
)
from ffgym.recover.text import TrainingText, training_text
from ffgym.report.progress import Reporter
from ffgym.report.table import bos_text
from ffgym.tracking.tracker import Tracker, environment_tags
from ffgym.types import Evaluation, JSONDict

LEARNING_RATES = {"lora": 5e-4, "distil-mlp": 3e-4}
CURVE, PICTURE = "recovery.json", "recovery.png"
# What of [recover] decides the numbers, by method.
DECIDES = ("tokens", "batch_tokens", "evaluate_every")
DECIDES_LORA = ("rank", "alpha", "dropout")  # not gradient_checkpointing, which computes the same again


@dataclass(frozen=True)
class Material:
    """All text of a recovery.

    Attributes:
        splits: the run's; the report split is measured at the end.
        text: what is trained on.
        held_out: the last windows of the search split, which decide what weights to keep, shape (windows, length).
    """

    splits: Splits
    text: TrainingText
    held_out: torch.Tensor


@dataclass(frozen=True)
class Recovered:
    """What training brought.

    Attributes:
        saved: the checkpoint.
        table: before and after on the report split.
        after: the last row's losses.
        told: sentences that say what was done.
    """

    saved: SavedModel
    table: RecoveryTable
    after: Evaluation
    told: tuple[str, ...]


@dataclass(frozen=True)
class RecoveryResult:
    """What ``recover`` hands back.

    Attributes:
        recovered: the model and its figures.
        mlflow_run: MLflow's run id, or ``None`` where tracking is off.
    """

    recovered: Recovered
    mlflow_run: str | None

    def to_json(self) -> JSONDict:
        """Numbers and paths, ready for ``json.dumps``."""
        return {
            "table": as_dicts(self.recovered.table),
            "measured": self.recovered.table.header,
            "told": list(self.recovered.told),
            "model": str(self.recovered.saved.path),
            "mlflow_run": self.mlflow_run,
        }

    def print(self, console: Console) -> None:
        """The table, where things are, and how to load the model."""
        console.print(terminal(self.recovered.table))
        saved = self.recovered.saved
        folder = saved.path
        lines = [*self.recovered.told, f"Model, {CURVE} and {PICTURE}: {folder}"]
        if self.mlflow_run is not None:
            lines.append(f"MLflow run {self.mlflow_run}: compare runs with `ffgym ui`")
        for line in [*lines, "Load the model with", f"  {load_line(folder, stock=saved.stock)}"]:
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def recover(
    config: RunConfig,
    folder: str | Path,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    dense: str | None = None,
    progress: Console | None = None,
) -> RecoveryResult:
    """Train the model of a folder as ``config.recover`` says, and save it to another one.

    Args:
        config: of the run that pruned the model, whose ``[data]`` says what the splits are, with ``[recover]`` set.
        folder: the model's folder, or that of the run which saved it.
        output: folder of the new model; beside the old one, with ``-recovered`` behind its name, where left out.
        overwrite: replace a model that is there, and an unfinished training with other settings.
        dense: name of the model that was pruned; ``None`` where it is not known. ``distil-mlp`` needs it.
        progress: where progress goes; stderr where left out.

    Raises:
        FFGymError: what cannot be done, and what to do about it; the MLflow run is marked FAILED.
        KeyboardInterrupt: Ctrl-C; the same call goes on where this one was.
    """
    say = Reporter(progress or Console(stderr=True))
    check_method(config.recover, dense)
    source = model_folder(Path(folder)).resolve()
    place = output_folder(source) if output is None else Path(output).expanduser().resolve()
    check_output(source, place, overwrite)
    tracking = config.tracking
    with Tracker(tracking.folder, tracking.experiment, place.name, tracking.enabled) as tracker:
        tracker.log_config(config.model_dump(mode="json"), to_toml(config))
        recovered = train_and_save(config, source, place, tracker, say, overwrite=overwrite, dense=dense)
        tracker.log_table(as_dicts(recovered.table))
        return RecoveryResult(recovered, tracker.run_id)


def check_method(table: RecoverTable, dense: str | None) -> None:
    """Refuse, before anything is loaded, what the method cannot do without.

    Raises:
        RecoveryError: no method, no PEFT for LoRA, no dense model for distillation.
    """
    if table.method == "none":
        raise RecoveryError("recover.method is none", hint="Choose one: --method lora or --method distil-mlp.")
    if table.method == "lora":
        require_peft()
    if table.method == "distil-mlp" and dense is None:
        raise RecoveryError(
            "distil-mlp needs the dense model, and nothing beside the model says which that is",
            hint="Name it with --model, e.g. --model demo.",
        )


def find_run_config(folder: Path) -> Path | None:
    """``config.toml`` of the run that saved the model of a folder, where it lies in its usual place."""
    source = model_folder(folder).resolve()
    return next((path for path in (source / "config.toml", source.parent / "config.toml") if path.is_file()), None)


def output_folder(source: Path) -> Path:
    """Where a recovered model goes where nobody says where."""
    return source.with_name(f"{source.name}-recovered")


def unfinished_folder(place: Path) -> Path:
    """Where the checkpoints of a training lie until its model is saved."""
    return place.with_name(f"{place.name}.unfinished")


def check_output(source: Path, place: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written to, before anything is trained."""
    if place == source or place in source.parents or source in place.parents:
        raise OutputError(
            f"the output folder {place} and the model's own folder {source} would share files",
            hint="Choose another folder with --output DIR.",
        )
    refuse_occupied(place, overwrite)


def gather(config: RunConfig, loaded: LoadedModel, splits: Splits | None = None) -> Material:
    """Cut the splits, and find text to train on that none of them reports or chooses on.

    Args:
        config: the run, with ``[recover]`` set.
        loaded: the model that is trained, or the dense one that it is made from: their tokens are the same.
        splits: of the run where they are there already.

    Raises:
        DataError: a corpus that is missing, too short, or holds text of the report split.
        ModelError: a tokenizer that is not the model's.
        RecoveryError: windows that are longer than the model's context.
    """
    table = config.recover
    window = training_window(config)
    if window > loaded.context_limit:
        raise RecoveryError(
            f"recover.window = {window} is longer than the model's context of {loaded.context_limit} tokens",
            hint=f"Set recover.window to at most {loaded.context_limit}.",
        )
    splits = splits or cut_splits(config, loaded)
    text = training_text(
        table.corpus,
        splits,
        loaded.tokenizer,
        window=window,
        tokens=table.tokens,
        at_least=table.batch_tokens // window * window,
    )
    loaded.check_ids(text.windows, "the training text")
    search = splits.search.windows
    return Material(splits, text, search[-max(1, table.held_out_tokens // search.shape[1]) :])


def training_window(config: RunConfig) -> int:
    """Tokens in one training window."""
    return config.data.window if config.recover.window == "auto" else int(config.recover.window)


def train_and_save(
    config: RunConfig,
    source: Path,
    place: Path,
    tracker: Tracker,
    say: Reporter,
    *,
    overwrite: bool = False,
    dense: str | None = None,
    material: Material | None = None,
) -> Recovered:
    """Load, train, measure, save; what ``recover`` and a run with ``--recover`` share.

    Args:
        config: with ``[recover]`` set.
        source: folder of the model.
        place: folder of the new one.
        tracker: gets the curve, the tags and the picture.
        say: where progress goes.
        overwrite: replace what is in the way.
        dense: name of the dense model, for distillation and for the table.
        material: the text, where it has been gathered already.
    """
    with say.stage("load model and text", 1):
        loaded = _load(source, config)
        material = material or gather(config, loaded)
    say.say(text_line(config, material))
    checkpoint = Checkpoint(unfinished_folder(place), _identity(config, source, loaded, material, dense))
    checkpoint.claim(overwrite=overwrite)
    _log_start(config, loaded, material, tracker)
    job = _Job(config, source, loaded, material, checkpoint, tracker, say)
    if checkpoint.exists:
        say.say(f"going on with the training in {checkpoint.folder}")
    try:
        curve, told = job.lora() if config.recover.method == "lora" else job.distil(str(dense))
        return job.finish(place, curve, told, dense, overwrite)
    except KeyboardInterrupt:
        if checkpoint.exists:
            say.say(f"interrupted; what was learned is in {checkpoint.folder}, and the same command goes on from there")
        raise


def text_line(config: RunConfig, material: Material) -> str:
    """What is trained on, how much of it there is, and how often it is seen."""
    text, tokens = material.text, config.recover.tokens
    available = text.windows.numel()
    epochs = tokens / available
    left_out = f", {text.left_out} windows left out that repeat other splits" if text.left_out else ""
    return (
        f"training text: {text.corpus.name} ({text.corpus.split}), {available:,} tokens outside the search and report "
        f"splits{left_out}; {tokens:,} to learn from, {f'{epochs:.2g}' if epochs < 10 else f'{epochs:,.0f}'} epochs"
    )


def _load(source: Path, config: RunConfig, name: str | None = None) -> LoadedModel:
    """The model of the folder, or another one in the same dtype: that of the folder, unless the configuration says."""
    model = config.model
    dtype = _stored_dtype(source) if model.dtype == "auto" else model.dtype
    revision = None if name is None else model.revision
    loaded = load(name or str(source), revision=revision, dtype=dtype, device=model.device)
    if loaded.dtype == torch.float16:
        raise RecoveryError(
            f"model {loaded.name!r} would be trained in float16, whose small gradients vanish",
            hint="Train in another dtype: --set model.dtype=bfloat16 or --set model.dtype=float32.",
        )
    return loaded


def _stored_dtype(source: Path) -> str:
    """The dtype that a folder's config states, by the name that ``load`` takes."""
    stated = MODEL_CONFIG.read(source / "config.json")
    dtype = str(stated.get("dtype") or stated.get("torch_dtype")).removeprefix("torch.")
    return dtype if dtype in DTYPES else "auto"


def _identity(config: RunConfig, source: Path, loaded: LoadedModel, material: Material, dense: str | None) -> JSONDict:
    """Everything that decides the numbers of a training."""
    table = config.recover
    names = (*DECIDES, *(DECIDES_LORA if table.method == "lora" else ()))
    return {
        "method": table.method,
        **{name: getattr(table, name) for name in names},
        "learning_rate": _learning_rate(table),
        "seed": _seed(config),
        "window": training_window(config),
        "dtype": loaded.dtype_name,
        "weights": weights_digest(source),
        "training text": material.text.digest,
        "held-out text": windows_digest(material.held_out),
        **({"dense model": dense, "revision": config.model.revision} if table.method == "distil-mlp" else {}),
    }


def _learning_rate(table: RecoverTable) -> float:
    return LEARNING_RATES[table.method] if table.learning_rate == "auto" else float(table.learning_rate)


def lora_settings(table: RecoverTable, window: int, seed: int) -> LoraSettings:
    """What ``[recover]`` says about adapters, in steps and windows of ``window`` tokens."""
    batch = max(1, table.batch_tokens // window)
    return LoraSettings(
        rank=table.rank,
        alpha=table.alpha,
        dropout=table.dropout,
        learning_rate=_learning_rate(table),
        steps=-(-table.tokens // (batch * window)),
        batch_windows=batch,
        seed=seed,
        evaluate_every=table.evaluate_every,
        checkpoint_every=table.checkpoint_every,
        gradient_checkpointing=table.gradient_checkpointing,
    )


def distillation_settings(table: RecoverTable, seed: int) -> DistillationSettings:
    """What ``[recover]`` says about distillation, in steps."""
    return DistillationSettings(
        learning_rate=_learning_rate(table),
        steps=-(-table.tokens // table.batch_tokens),
        batch_tokens=table.batch_tokens,
        seed=seed,
        evaluate_every=table.evaluate_every,
    )


def _seed(config: RunConfig) -> int:
    return config.seed if config.recover.seed == "auto" else int(config.recover.seed)


def _log_start(config: RunConfig, loaded: LoadedModel, material: Material, tracker: Tracker) -> None:
    threads = torch.get_num_threads()
    tags = environment_tags(device=str(loaded.device), dtype=loaded.dtype_name, threads=threads, plugins={})
    tracker.set_tags({**tags, "recovery": config.recover.method})
    text = material.text
    tracker.log_dataset(
        name=f"{text.corpus.name}/recovery",
        context="recovery",
        digest=text.digest,
        corpus=text.corpus.name,
        tokens=text.windows.numel(),
    )


@dataclass
class _Job:
    """One recovery between loading and saving."""

    config: RunConfig
    source: Path
    loaded: LoadedModel
    material: Material
    checkpoint: Checkpoint
    tracker: Tracker
    say: Reporter

    def lora(self) -> tuple[JSONDict, tuple[str, ...]]:
        """Train and merge adapters; the curve, and what to tell."""
        table, windows = self.config.recover, self.material.text.windows
        settings = lora_settings(table, windows.shape[1], _seed(self.config))
        logged = [0, 0]
        with self.say.stage("recover: lora", settings.steps) as stage:

            def on_step(curve: LoraCurve) -> None:
                stage.advance(len(curve.train) - stage.done, _lora_note(curve))
                points = [("recover/train_loss", loss, step) for step, loss in enumerate(curve.train)][logged[0] :]
                points += [("recover/held_out_loss", loss, step) for step, loss in curve.held_out][logged[1] :]
                logged[:] = len(curve.train), len(curve.held_out)
                self.tracker.log_metrics(points)

            curve = train_lora(
                self.loaded.model,
                dense_or_pruned_family_of(self.loaded.model),
                windows,
                settings,
                held_out_loss=self.held_out_loss,
                checkpoint=self.checkpoint,
                on_step=on_step,
            )
        lora_figure(curve.train, curve.held_out, curve.chosen, self.checkpoint.folder / PICTURE)
        losses = dict(curve.held_out)
        told = (
            f"LoRA of rank {settings.rank} (alpha {settings.alpha:g}) on all linears of attention and MLP, merged: "
            f"{settings.steps} steps of {settings.batch_windows * windows.shape[1]:,} tokens at up to "
            f"{settings.learning_rate:g}, seed {settings.seed}.",
            _told(losses[0], losses[curve.chosen], f"the adapters of step {curve.chosen} were merged"),
        )
        return {"method": "lora", **curve.to_json()}, told

    def distil(self, dense: str) -> tuple[JSONDict, tuple[str, ...]]:
        """Train every MLP towards the dense one; the errors by layer, and what to tell."""
        table, text = self.config.recover, self.material.text
        settings = distillation_settings(table, _seed(self.config))
        with self.say.stage("load the dense model", 1):
            teacher = _load(self.source, self.config, dense)
        model = self.loaded.model
        family = dense_or_pruned_family_of(model)
        before = self.held_out_loss()
        layers = len(family.layers(model))
        with self.say.stage("recover: distil-mlp", layers * settings.steps) as stage:

            def on_step(layer: int, step: int, error: float) -> None:
                stage.advance(layer * settings.steps + step - stage.done, f"layer {layer}, error {error:.4f}")

            def on_layer(fit: LayerFit) -> None:
                stage.advance((fit.layer + 1) * settings.steps - stage.done)
                points = {"before": fit.before, "after": fit.after}
                self.tracker.log_metrics([(f"recover/error_{key}", value, fit.layer) for key, value in points.items()])

            fits = distil_mlps(
                model,
                teacher.model,
                family,
                text.windows,
                self.material.held_out,
                settings,
                tokens_per_batch=tokens_per_batch(self.loaded.device),
                checkpoint=self.checkpoint,
                on_step=on_step,
                on_layer=on_layer,
            )
        after = self.held_out_loss()
        self.tracker.log_metrics([("recover/held_out_loss", loss, step) for step, loss in enumerate((before, after))])
        distillation_figure(
            {fit.layer: fit.before for fit in fits},
            {fit.layer: fit.after for fit in fits},
            self.checkpoint.folder / PICTURE,
        )
        del teacher
        if not after < before:
            self.loaded = _load(self.source, self.config)
        told = (
            f"Every MLP was trained by Adam towards the output of the dense one ({dense}), layer by layer on the "
            f"pruned model's own states: {settings.steps} steps of {settings.batch_tokens:,} tokens each at up to "
            f"{settings.learning_rate:g}, seed {settings.seed}.",
            _told(before, min(after, before), "the trained weights were kept"),
        )
        layers_json = [fit.to_json() for fit in fits]
        return {"method": "distil-mlp", "held_out": [before, after], "layers": layers_json}, told

    def held_out_loss(self) -> float:
        """Loss of the model as it is now on the held-out windows, nats per token."""
        return self._evaluate(self.loaded, self.material.held_out).loss

    def finish(
        self, place: Path, curve: JSONDict, told: Sequence[str], dense: str | None, overwrite: bool
    ) -> Recovered:
        """Measure on the report split, save, and delete the checkpoints."""
        method, text = self.config.recover.method, self.material.text
        told = (*told, f"Training text: {text.corpus.name} ({text.corpus.split}).")
        rows = [
            *self._dense_row(dense),
            self._measured("before", _load(self.source, self.config)),
            self._measured(method, self.loaded),
        ]
        table = RecoveryTable(tuple(rows), self._header())
        content = json.dumps({**curve, "report": as_dicts(table)}, indent=1)
        files = [
            self.checkpoint.write(CURVE, content),
            self.checkpoint.write("config.toml", _record(self.config, dense)),
            self.checkpoint.folder / PICTURE,
        ]
        card = self.source / "README.md"
        with held_back_interrupts():  # between the two the same command would go on with what is done already
            saved = save_again(
                self.loaded.model,
                self.loaded.tokenizer,
                place,
                card=recovered_card(
                    title=f"{place.name}: pruned, then {method}",
                    before=CARD.text(card) if card.is_file() else None,
                    told=told,
                    table=table,
                    command=f"ffgym recover {self.source.name} --config config.toml",
                    stock=is_stock(self.loaded.model),
                ),
                files=files,
                overwrite=overwrite,
            )
            self.checkpoint.remove()
        for name in (CURVE, PICTURE):
            self.tracker.log_artifact(saved.path / name)
        return Recovered(saved, table, rows[-1].evaluation, tuple(told))

    def _dense_row(self, dense: str | None) -> list[Measured]:
        """The dense model's row; none where it is not known or cannot be had: no reason to lose a training."""
        if dense is None:
            return []
        try:
            loaded = _load(self.source, self.config, dense)
            if loaded.model.config.vocab_size != self.loaded.model.config.vocab_size:
                raise ModelError(f"model {dense!r} has another vocabulary")
        except FFGymError as error:
            self.say.say(f"the dense model is left out of the table: {error.message}")
            return []
        return [self._measured("dense", loaded)]

    def _measured(self, label: str, loaded: LoadedModel) -> Measured:
        windows = self.material.splits.report.windows
        with self.say.stage(f"report: {label}", len(windows)) as stage:
            result = self._evaluate(loaded, windows, stage.advance)
        return Measured(label, result, sum(p.numel() for p in loaded.model.parameters()))

    def _evaluate(self, loaded: LoadedModel, windows: torch.Tensor, on_batch: Any = None) -> Evaluation:
        batch = tokens_per_batch(loaded.device)
        return evaluate(loaded.model, windows, tokens_per_batch=batch, on_batch=on_batch)

    def _header(self) -> str:
        report = self.material.splits.report
        return (
            f"Perplexity on {report.corpus.name}, report split: {report.predicted_tokens:,} tokens "
            f"in windows of {report.windows.shape[1]:,}, {self.loaded.dtype_name}, "
            f"{bos_text(report.bos)}."
        )


def _record(config: RunConfig, dense: str | None) -> str:
    """The configuration as TOML; it names a dense model only where one is known."""
    if dense is not None:
        return to_toml(config.model_copy(update={"model": config.model.model_copy(update={"name": dense})}))
    return re.sub(r"(?m)^(\[model\].*\n)name = .*\n", r"\1", to_toml(config))


def _lora_note(curve: LoraCurve) -> str:
    train = f"loss {curve.train[-1]:.3f}, " if curve.train else ""
    return f"{train}held-out {curve.held_out[-1][1]:.3f}" if curve.held_out else train


def _told(before: float, after: float, kept: str) -> str:
    if after < before:
        return f"Loss on held-out windows of the search split: {before:.4f} before, {after:.4f} after; {kept}."
    return f"Training did not lower the loss on held-out windows of the search split, {before:.4f}: nothing was kept."
