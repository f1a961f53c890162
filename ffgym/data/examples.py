"""Multiple-choice examples: a question as text, its answers, and the same as token ids.

Prompts are those of lm-eval, so that accuracies mean the same. What a search may be rewarded on is the split that the
zero-shot report does not show; tasks whose data hold one split only are there to be reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffgym.data.splits import adds_bos
from ffgym.data.task_data import TASKS, reported_split, task_dataset
from ffgym.errors import ConfigError, DataError, UnknownNameError

Row = Mapping[str, Any]

EXAMPLE_TOKENS = 45  # about what a question and its answers take, in arc_easy and with a large vocabulary


@dataclass(frozen=True)
class Example:
    """One question."""

    task: str
    context: str  # what stands before an answer
    answers: tuple[str, ...]  # the choices as they follow the context, leading space included
    right: int  # index of the right one


@dataclass(frozen=True)
class EncodedExample:
    """One question as token ids."""

    task: str
    context: tuple[int, ...]  # token ids before an answer, at least one
    answers: tuple[tuple[int, ...], ...]  # token ids of each answer, at least one
    right: int

    @property
    def tokens(self) -> int:
        """Tokens that are evaluated for it: the context once, and every answer."""
        return len(self.context) + sum(map(len, self.answers))


def _choices(row: Row, question: str) -> tuple[str, list[str], int]:
    choices = row["choices"]
    return question, list(choices["text"]), list(choices["label"]).index(row["answerKey"].strip())


def _arc(row: Row) -> tuple[str, list[str], int]:
    return _choices(row, f"Question: {row['question']}\nAnswer:")


def _openbookqa(row: Row) -> tuple[str, list[str], int]:
    return _choices(row, row["question_stem"])


def _piqa(row: Row) -> tuple[str, list[str], int]:
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]


def _sciq(row: Row) -> tuple[str, list[str], int]:
    answers = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", answers, 3


def _hellaswag(row: Row) -> tuple[str, list[str], int]:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _without_artefacts(context), [_without_artefacts(ending) for ending in row["endings"]], int(row["label"])


def _without_artefacts(text: str) -> str:
    """WikiHow's headings and brackets, as lm-eval cleans HellaSwag of them."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


PROMPTS: Mapping[str, Callable[[Row], tuple[str, list[str], int]]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "sciq": _sciq,
    "hellaswag": _hellaswag,
}
"""(context, answers without their leading space, index of the right one) of a row of the task's data set."""


def searchable_tasks() -> list[str]:
    """Every task that a reward may name: what is reported is not its validation split. Fetches nothing."""
    return [task for task in PROMPTS if "validation" in TASKS[task] and reported_split(task) != "validation"]


def check_search_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that a search cannot be rewarded on; fetches nothing.

    Raises:
        UnknownNameError: no such task; names the near match and the list.
        ConfigError: named twice, or all data of the task are what is reported.
    """
    for task in tasks:
        if task not in PROMPTS:
            raise UnknownNameError("multiple-choice task", task, searchable_tasks())
        if task not in searchable_tasks():
            raise ConfigError(
                f"a search cannot be rewarded on task {task!r}: all data that ffgym has of it are what is reported",
                hint=f"Tasks that a reward may name: {', '.join(searchable_tasks())}.",
            )
        if list(tasks).count(task) > 1:
            raise ConfigError(f"task {task!r} is named twice", hint="Name each task once.")


def search_examples(task: str) -> list[Example]:
    """Examples that a search may be rewarded on, in the order of the data set.

    A question that the reported split asks as well is left out.
    """
    splits = task_dataset(task)
    reported = {example.context for example in _examples(task, splits[reported_split(task)])}
    return [example for example in _examples(task, splits["validation"]) if example.context not in reported]


def reported_examples(task: str) -> list[Example]:
    """Examples that figures are reported on, in the order of the data set; nothing selects on them."""
    if task not in PROMPTS:
        raise UnknownNameError("multiple-choice task", task, PROMPTS)
    return _examples(task, task_dataset(task)[reported_split(task)])


def _examples(task: str, rows: Sequence[Row]) -> list[Example]:
    examples = []
    for row in rows:
        context, answers, right = PROMPTS[task](row)
        examples.append(Example(task, context, tuple(f" {answer}" for answer in answers), right))
    return examples


def encode(example: Example, tokenizer: Any, *, context_limit: int) -> EncodedExample:
    """Tokenise one example: answers are cut where the context's own tokens end.

    A context that is too long loses its beginning; BOS comes first where the tokenizer adds one.

    Args:
        context_limit: the longest row that the model takes, in tokens.

    Raises:
        DataError: an answer alone is longer than the model's context.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    # A space at the end of the context belongs to the answer's first token.
    text = example.context.rstrip()
    context = ids(text)
    answers = tuple(ids(text + example.context[len(text) :] + answer)[len(context) :] for answer in example.answers)
    head = (tokenizer.bos_token_id,) if adds_bos(tokenizer) or not context else ()
    room = context_limit - len(head) - max(map(len, answers))
    if room < 1 or not all(answers):
        raise DataError(
            f"an answer of task {example.task!r} has {max(map(len, answers))} tokens, the model takes {context_limit}",
            hint="Leave this task out, or use a model with a longer context.",
        )
    return EncodedExample(example.task, head + context[-room:], answers, example.right)
