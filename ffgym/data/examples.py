"""Multiple-choice examples: a question as text, its answers, and the same as token ids.

Prompts are those of lm-eval, so that accuracies mean the same. What a search may be rewarded on is the split that the
zero-shot report does not show, so tasks whose data hold one split only have no prompt here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffgym.data.splits import adds_bos
from ffgym.data.task_data import reported_split, task_dataset
from ffgym.errors import ConfigError, DataError, UnknownNameError

Row = Mapping[str, Any]
# Makes the context, the answers without their leading space, and the index of the right one out of a row.
Prompt = Callable[[Row], tuple[str, list[str], int]]

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


PROMPTS: Mapping[str, Prompt] = {"arc_easy": _arc, "arc_challenge": _arc, "openbookqa": _openbookqa}
"""Of every task that a reward may name: what is reported is not its validation split."""


def check_search_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that a search cannot be rewarded on; fetches nothing."""
    for task in tasks:
        if task not in PROMPTS:
            raise UnknownNameError("multiple-choice task", task, PROMPTS)
        if list(tasks).count(task) > 1:
            raise ConfigError(f"task {task!r} is named twice", hint="Name each task once.")


def search_examples(task: str) -> list[Example]:
    """Examples that a search may be rewarded on, in the order of the data set.

    A question that the reported split asks as well is left out.
    """
    splits, prompt = task_dataset(task), PROMPTS[task]
    reported = {example.context for example in examples_of(task, splits[reported_split(task)], prompt)}
    found = examples_of(task, splits["validation"], prompt)
    return [example for example in found if example.context not in reported]


def examples_of(task: str, rows: Sequence[Row], prompt: Prompt) -> list[Example]:
    """The rows of a task's data set as examples, in their order."""
    examples = []
    for row in rows:
        context, answers, right = prompt(row)
        examples.append(Example(task, context, tuple(f" {answer}" for answer in answers), right))
    return examples


def encode(example: Example, tokenizer: Any, *, context_limit: int) -> EncodedExample:
    """Tokenise one example: answers are cut where the context's own tokens end.

    A context that is too long loses its beginning; BOS comes first where the tokenizer adds one.

    Args:
        context_limit: the longest row that the model takes, in tokens.

    Raises:
        DataError: an answer is empty, or alone as long as the model's context.
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
            f"the answers of task {example.task!r} have {min(map(len, answers))} to {max(map(len, answers))} tokens,"
            f" and they should have 1 to {context_limit - len(head) - 1}",
            hint="Leave this task out, or use a model with a longer context.",
        )
    return EncodedExample(example.task, head + context[-room:], answers, example.right)
