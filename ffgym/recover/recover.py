"""``recover(config, folder)``: train a saved model after pruning, and save it again.

model, splits -> training text that no split holds -> the method's training -> report -> saved model -> MLflow
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ffgym.config.tables import RecoverTable, RunConfig
from ffgym.config.toml import to_toml
from ffgym.data.splits import windows_digest
from ffgym.errors import FFGymError, PluginError, RecoveryError
from ffgym.evaluation.perplexity import evaluate
from ffgym.export.checkpoint import is_stock, save_model
from ffgym.interrupts import held_back_interrupts
from ffgym.models.checkpoint import model_folder, weights_on_disk
from ffgym.models.families import family_of_pair
from ffgym.models.loading import LoadedModel, load
from ffgym.models.modes import own_modes
from ffgym.models.origin import DenseModel, origin_from, recorded_dense_model, texts_of
from ffgym.models.placement import choose_device, choose_dtype, tokens_per_batch
from ffgym.plugins import manager
from ffgym.plugins.contracts import call_plugin
from ffgym.prepare import configured
from ffgym.recover.checkpoint import Checkpoint, files_digest
from ffgym.recover.folders import check_recovery_output, output_folder, place_lock, unfinished_folder
from ffgym.recover.method import Recovery, TrainingOutcome, TrainingSetup
from ffgym.recover.result import CURVE, RecoveredModel
from ffgym.recover.table import CARD, Measured, RecoveryTable, recovered_card
from ffgym.recover.text import RecoveryTexts, gather
from ffgym.report.layout import strict
from ffgym.report.progress import Reporter
from ffgym.report.table import bos_text
from ffgym.tracking.store import FOLDER_TAG
from ffgym.tracking.tracker import Tracker, environment_tags
from ffgym.types import Evaluation, JSONDict, OnStep, do_nothing

DIGITS = 12  # of a digest, enough to tell two texts apart
DECIDES = ("method", "tokens", "batch_tokens", "evaluate_every")  # keys of [recover] that decide a training's numbers


@own_modes()
def recover(
    config: RunConfig,
    folder: str | Path,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Console | None = None,
) -> RecoveredModel:
    """Train the model of a folder as ``config.recover`` says, and save it to another one.

    Args:
        config: of the run that pruned the model, whose ``[data]`` says what the splits are, with ``[recover]`` set. Its
            ``model.name`` is the dense model; where it is left out, the record beside the model says which that is.
        folder: the model's folder, or that of the run which saved it.
        output: folder of the new model; beside the old one, with ``-recovered`` behind its name, where left out.
        overwrite: replace a model that is there, and an unfinished training with other settings.

    Raises:
        FFGymError: what cannot be done, and what to do about it; the MLflow run is marked FAILED.
        KeyboardInterrupt: Ctrl-C; the same call goes on where this one was.
    """
    source = model_folder(Path(folder)).resolve()
    config, dense = _with_dense(config, source)
    check_method(config.recover, dense)
    config = configured.with_options(config, ["recover"])
    place = output_folder(source) if output is None else Path(output).expanduser().resolve()
    check_recovery_output(source, place, overwrite)
    reporter, tracking = Reporter(progress), config.tracking
    record, written = unfinished_folder(place) / "config.toml", _record(config, dense)
    with Tracker(
        tracking.folder,
        tracking.experiment,
        place.name,
        tracking.enabled,
        unsent=place.parent,
        command="ffgym recover",
        again=shlex.join(["ffgym", "recover", str(source), "--config", str(record), "--output", str(place)]),
        can_go_on=lambda: record.is_file() and record.read_text(encoding="utf-8") == written,  # not another training's
        notify=reporter.print,
    ) as tracker:
        tracker.set_tags({FOLDER_TAG: str(place)})
        tracker.log_config(config.model_dump(mode="json"), _as_toml(config))
        try:
            recovered = train_and_save(config, source, place, tracker, reporter, overwrite=overwrite, dense=dense)
        except KeyboardInterrupt:
            if (unfinished := unfinished_folder(place)).exists():
                reporter.print(f"the training so far is in {unfinished}, and the same command continues it")
            raise
        tracker.log_result(recovered.tracked)
        tracker.describe(recovered.description)
        tracker.log_model(recovered.saved.path)
        return replace(recovered, mlflow_run=tracker.run_id)


def _with_dense(config: RunConfig, source: Path) -> tuple[RunConfig, str | None]:
    """Name the dense model that a saved one was made from in the configuration; ``None`` where nothing says which."""
    given = config.model.name if "name" in config.model.model_fields_set else None
    record: DenseModel | None = None
    with suppress(FFGymError) if given is not None else nullcontext():  # it is not needed
        record = recorded_dense_model(source)
    if record is None or given not in (None, record.called):
        return config, given
    model = config.model.model_copy(update={"name": record.name, "revision": record.revision})
    return config.model_copy(update={"model": model}), record.name


def check_method(table: RecoverTable, dense: str | None) -> Recovery:
    """Make the method, and refuse, before anything is loaded, what it cannot do without.

    Raises:
        ConfigError: an option that the method refuses.
        RecoveryError: no method, something that is not installed, no dense model for a method that needs it.
        UnknownNameError: nobody provides the method.
    """
    if table.method == "none":
        options = " or ".join(f"--method {name}" for name in manager.names("recovery"))
        raise RecoveryError("recover.method is none", hint=f"Choose one: {options}.")
    method: Recovery = manager.create("recovery", table.method, table.options)
    method.check_installed()
    if method.needs_dense and dense is None:
        raise RecoveryError(
            f"{method.name} needs the dense model, and nothing beside the model says which that is",
            hint="Name it with --model, e.g. --model demo.",
        )
    return method


def train_and_save(
    config: RunConfig,
    source: Path,
    place: Path,
    tracker: Tracker,
    reporter: Reporter,
    *,
    overwrite: bool = False,
    dense: str | None = None,
    texts: RecoveryTexts | None = None,
) -> RecoveredModel:
    """Load, train, measure, save; what ``recover`` and a run with ``--recover`` share.

    Args:
        config: with ``[recover]`` set, the method's options spelled out.
        dense: name of the dense model, for methods that need it and for the table.
        texts: the text, where it has been gathered already.
    """
    method = check_method(config.recover, dense)
    with place_lock(place):
        with reporter.stage("load model and text", 1):
            loaded = _load(source, config)
            texts = texts or gather(config, loaded)
        reporter.print(texts.describe(config.recover.tokens))
        checkpoint = Checkpoint(unfinished_folder(place), _identity(config, method, source, loaded, texts, dense))
        checkpoint.claim(overwrite=overwrite)
        checkpoint.write("config.toml", _record(config, dense))  # the command that goes on reads it
        recovery = _Recovery(config, method, source, dense, loaded, texts, checkpoint, tracker, reporter)
        recovery.log_start()
        if checkpoint.exists:
            reporter.print(f"going on with the training in {checkpoint.folder}")
        rows = recovery.measure_untrained()  # first, so that nothing but saving stands behind hours of training
        outcome, gain, is_kept = recovery.train()
        return recovery.save(outcome, gain, is_kept, recovery.compare(rows), place, overwrite)


def _load(source: Path, config: RunConfig, name: str | None = None) -> LoadedModel:
    """The model of the folder, or another one in the same dtype."""
    model = config.model
    dtype = model.dtype if model.dtype != "auto" else _training_dtype(source, choose_device(model.device))
    revision = None if name is None else model.revision
    loaded = load(name or str(source), revision=revision, dtype=dtype, device=model.device)
    if loaded.dtype == torch.float16:
        raise RecoveryError(
            f"model {loaded.name!r} would be trained in float16, whose small gradients vanish",
            hint="Train in another dtype: --set model.dtype=bfloat16 or --set model.dtype=float32.",
        )
    return loaded


def _training_dtype(source: Path, device: torch.device) -> str:
    """bfloat16 for a model that is saved in it, on a device that is fast at it; else float32."""
    is_bfloat16 = weights_on_disk(source)[1] == "bfloat16" and choose_dtype(device) == torch.bfloat16
    return "bfloat16" if is_bfloat16 else "float32"


def _identity(
    config: RunConfig, method: Recovery, source: Path, loaded: LoadedModel, texts: RecoveryTexts, dense: str | None
) -> JSONDict:
    """Everything that decides the numbers of a training."""
    facts = {
        **{key: getattr(config.recover, key) for key in DECIDES},
        "learning_rate": learning_rate(config.recover, method),
        "seed": config.seed,
        "window": config.data.window,
        "dtype": loaded.dtype_name,
        "weights": files_digest(source)[:DIGITS],
        "training text": texts.training.digest[:DIGITS],
        "held-out text": windows_digest(texts.held_out)[:DIGITS],
    }
    if method.needs_dense:
        facts |= {"dense model": dense, "revision": config.model.revision}
    if method.edition != 1:
        facts["edition"] = method.edition
    options = method.config.model_dump(mode="json", exclude=set(method.free_options))
    return facts | {name if name not in facts else f"recover.{name}": value for name, value in options.items()}


def learning_rate(table: RecoverTable, method: Recovery) -> float:
    """The highest of the schedule: what the table says, or the method's own."""
    return method.learning_rate if table.learning_rate == "auto" else float(table.learning_rate)


@dataclass
class _Recovery:
    """One recovery, from the loaded model to the saved one."""

    config: RunConfig
    method: Recovery
    source: Path
    dense: str | None
    loaded: LoadedModel
    texts: RecoveryTexts
    checkpoint: Checkpoint
    tracker: Tracker
    reporter: Reporter

    def log_start(self) -> None:
        """Tell MLflow what is trained, how, and on what text."""
        name, text, loaded = self.method.name, self.texts.training, self.loaded
        plugins = {f"recovery.{name}": str(manager.package_of(self.method))}
        tags = environment_tags(
            device=str(loaded.device), dtype=loaded.dtype_name, threads=torch.get_num_threads(), plugins=plugins
        )
        self.tracker.set_tags({**tags, "recovery": name})
        dataset, tokens = f"{text.name}/recovery", text.windows.numel()
        self.tracker.log_dataset(name=dataset, context="recovery", digest=text.digest, corpus=text.name, tokens=tokens)

    def train(self) -> tuple[TrainingOutcome, str, bool]:
        """Let the method train the model; where that lowered no loss, take the model as it was.

        Returns:
            what the method handed back, a sentence on the losses before and after, and whether anything was kept.
        """
        setup, who = self._setup(), manager.described(self.method)
        before, given = setup.held_out_loss(), _parameters(setup.model)
        outcome = call_plugin(self.method, partial(self.method.train, setup), "training the model")
        if not isinstance(outcome, TrainingOutcome):
            raise PluginError(f"{who}: train returned {type(outcome).__name__}, not a TrainingOutcome")
        for name in ("summary", "kept"):
            if not isinstance(value := getattr(outcome, name), str):
                raise PluginError(f"{who}: {name} of its outcome is {value!r}, not text")
        returned = _parameters(setup.model)
        if changed := [name for name in given if returned.get(name) != given[name]]:
            name = changed[0]
            raise PluginError(
                f"{who}: after training, parameter {name} is {returned.get(name, 'gone')}, not {given[name]}",
                hint="Hand the model back as it was given: convert it back, and take out what was put in.",
            )
        for parameter in setup.model.parameters():  # what is measured is what will be saved
            parameter.data.copy_(parameter.data.to(self.loaded.saved_dtype or self.loaded.dtype))
        after, where = setup.held_out_loss(), "held-out windows of the search split"
        setup.log([("held_out_before", before, 0), ("held_out_after", after, 0)])
        if after < before:
            return outcome, f"Loss on {where}: {before:.4f} before, {after:.4f} after; {outcome.kept}.", True
        self.loaded = _load(self.source, self.config)
        return outcome, f"Training did not lower the loss on {where}, {before:.4f}: nothing was kept.", False

    def _setup(self) -> TrainingSetup:
        table, loaded, dense = self.config.recover, self.loaded, None
        if self.method.needs_dense:
            with self.reporter.stage("load the dense model", 1):
                dense = _load(self.source, self.config, self.dense).model
        return TrainingSetup(
            model=loaded.model,
            dense=dense,
            windows=self.texts.training.windows,
            held_out=self.texts.held_out,
            held_out_loss=lambda: _evaluate(loaded, self.texts.held_out).loss,
            tokens=table.tokens,
            batch_tokens=table.batch_tokens,
            learning_rate=learning_rate(table, self.method),
            evaluate_every=table.evaluate_every,
            seed=self.config.seed,
            tokens_per_pass=tokens_per_batch(loaded.device),
            progress=lambda steps: self.reporter.stage(f"recover: {self.method.name}", steps),
            log=lambda points: self.tracker.log_metrics(
                [(f"recover/{name}", value, step) for name, value, step in points]
            ),
            checkpoint=self.checkpoint,
        )

    def measure_untrained(self) -> list[Measured]:
        """The dense model where it is known, and the model before training, on the report split."""
        return [*self._dense_row(), self._measured("before", self.loaded)]

    def compare(self, untrained: Sequence[Measured]) -> RecoveryTable:
        """Measure the trained model beside the others."""
        report = self.texts.splits.report
        rows = [*untrained, self._measured(self.method.name, self.loaded)]
        header = (
            f"Perplexity on {report.text}, report split: {report.predicted_tokens:,} tokens "
            f"in windows of {report.windows.shape[1]:,}, {self.loaded.dtype_name}, {bos_text(report.bos)}."
        )
        return RecoveryTable(tuple(rows), header)

    def _dense_row(self) -> list[Measured]:
        """The dense model's row; none where it is not known or cannot be had."""
        if self.dense is None:
            return []
        try:
            loaded = _load(self.source, self.config, self.dense)
            family_of_pair(self.loaded.model, loaded.model, hint="")
        except FFGymError as error:
            self.reporter.print(f"the dense model is left out of the table: {error.message}")
            return []
        return [self._measured("dense", loaded)]

    def _measured(self, label: str, loaded: LoadedModel) -> Measured:
        windows = self.texts.splits.report.windows
        with self.reporter.stage(f"report: {label}", len(windows), "windows") as stage:
            result = _evaluate(loaded, windows, stage)
        return Measured(label, result, sum(p.numel() for p in loaded.model.parameters()))

    def save(
        self, outcome: TrainingOutcome, gain: str, is_kept: bool, table: RecoveryTable, place: Path, overwrite: bool
    ) -> RecoveredModel:
        """Save the model with all that is known of it, and delete the checkpoints."""
        text, method = self.texts.training, self.method.name
        summary = (outcome.summary, gain, f"Training text: {text.source}.")
        files = self._write_results(outcome, table)
        texts = dict(texts_of(self.source))
        if is_kept:
            texts["trained"] = self.config.recover.corpus or self.config.data.calibration
        old_card = self.source / "README.md"
        card = recovered_card(
            title=f"{place.name}: pruned, then {method}" if is_kept else f"{place.name}: pruned",
            is_kept=is_kept,
            before=CARD.text(old_card) if old_card.is_file() else None,
            summary=summary,
            table=table,
            command=f"ffgym recover {shlex.quote(self.source.name)} --config config.toml",
            stock=is_stock(self.loaded.model),
            towers=self.loaded.towers is not None,
        )
        with held_back_interrupts():  # interrupted in between, the same command would train again
            saved = save_model(
                self.loaded.model,
                self.loaded.tokenizer,
                place,
                card=card,
                files=files,
                overwrite=overwrite,
                towers=self.loaded.towers,
                dtype=self.loaded.saved_dtype,
                origin=origin_from(self.dense, self.config.model.revision, texts),
            )
            self.checkpoint.remove()
        self.tracker.log_artifact(saved.path / CURVE)
        return RecoveredModel(saved, table, table.rows[-1].evaluation, summary, is_kept, self.loaded.dtype_name)

    def _write_results(self, outcome: TrainingOutcome, table: RecoveryTable) -> Sequence[Path]:
        """The curve, beside the checkpoints and the configuration; of a curve that is no JSON, what else there is."""
        rows = table.layout().as_dicts()

        def content(curve: JSONDict) -> str:
            return json.dumps(strict({"method": self.method.name, **curve, "report": rows}), indent=1)

        try:
            text = call_plugin(self.method, lambda: content(outcome.curve), "handing back its curve")
        except PluginError as error:
            self.reporter.print(f"{CURVE} is without the curve: {error.message}")
            text = content({})
        return [self.checkpoint.folder / "config.toml", self.checkpoint.write(CURVE, text)]


def _parameters(model: Any) -> dict[str, str]:
    """Of each parameter, e.g. ``"float32 on cuda:0"``."""
    return {name: f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for name, p in model.named_parameters()}


def _evaluate(loaded: LoadedModel, windows: torch.Tensor, on_progress: OnStep = do_nothing) -> Evaluation:
    return evaluate(loaded.model, windows, tokens_per_batch=tokens_per_batch(loaded.device), on_progress=on_progress)


def _as_toml(config: RunConfig) -> str:
    return to_toml(config, configured.meanings(config, ["recover"]))


def _record(config: RunConfig, dense: str | None) -> str:
    """The configuration as TOML; it names a dense model only where one is known."""
    if dense is not None:
        return _as_toml(config.model_copy(update={"model": config.model.model_copy(update={"name": dense})}))
    return re.sub(r"(?m)^(\[model\].*\n)name = .*\n", r"\1", _as_toml(config))
