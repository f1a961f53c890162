import json
import math

from printed import printed

from ffgym.measure.task_definitions import PAPER_TASKS, LoadedTask, TaskSet
from ffgym.measure.task_table import TaskTable, as_dict
from ffgym.measure.tasks import Figure, ModelScores, TaskResult


def result(task: str, acc: float = 0.5, norm: float | None = None, **facts: int) -> TaskResult:
    metrics = [Figure("acc", acc, 0.0123)]
    if norm is not None:
        metrics.append(Figure("acc_norm", norm, 0.0234))
    return TaskResult(task, "1.0", "validation", 1838, 1838, tuple(metrics), **facts)


def task_set(*names: str, own_split: str = "validation") -> TaskSet:
    loaded = tuple(LoadedTask(name, "validation", own_split, None) for name in names)
    return TaskSet(loaded, "wheel", "copies of something", "0.4.13")


def scores(name: str, *results: TaskResult) -> ModelScores:
    return ModelScores(name, f"{name} from somewhere", "float32", "cpu", results)


def rendered(table: TaskTable, width: int = 80) -> str:
    return printed(table.layout(), width=width)


TWO = TaskTable(
    (scores("dense", result("piqa", 0.7, 0.71), result("boolq", 0.6)), scores("pruned", result("piqa", 0.65, 0.66))),
    task_set("piqa", "boolq"),
    None,
)


def test_tasks_go_down_and_models_across_with_standard_errors():
    lines = rendered(TWO).splitlines()
    (piqa,) = (line for line in lines if "piqa" in line)
    assert piqa.split() == ["piqa", "acc", "validation", "1,838", "0.7000", "±", "0.0123", "0.6500", "±", "0.0123"]
    (norm,) = (line for line in lines if "acc_norm" in line)
    assert norm.split() == ["acc_norm", "0.7100", "±", "0.0234", "0.6600", "±", "0.0234"]


def test_a_task_that_a_model_has_not_finished_shows_a_dash():
    (boolq,) = (line for line in rendered(TWO).splitlines() if "boolq" in line)
    assert boolq.split()[-1] == "-"


def test_the_perplexity_of_a_destroyed_model_is_a_power_of_ten():
    table = TaskTable((scores("destroyed", result("piqa", 130_331_837.013)),), task_set("piqa"), None)
    assert "1.30e+08" in rendered(table)


def test_tasks_and_metrics_stay_readable_beside_three_models():
    names = ("models/dense", "runs/x/model", "runs/x/model-recovered")
    table = TaskTable(
        tuple(scores(name, *(result(task, 0.5, 0.5) for task in PAPER_TASKS)) for name in names),
        task_set(*PAPER_TASKS),
        None,
    )
    lines = rendered(table, 80).splitlines()
    assert max(map(len, lines)) <= 80
    firsts = [line.split()[:2] for line in lines]
    assert all([task, "acc"] in firsts for task in PAPER_TASKS)
    assert sum(line.split().count("±") for line in lines if "0.5000" in line) == 3 * 16


def test_the_notes_say_how_it_was_measured():
    text = " ".join(rendered(TWO).split())
    assert "Zero-shot, lm-eval 0.4.13 with its own task definitions" in text
    assert "Data: copies of something." in text
    assert "dense: dense from somewhere, float32 on cpu." in text
    assert "first" not in text
    assert "Interrupted" not in text


def test_the_notes_say_what_limits_the_figures():
    broken = scores("broken", result("sciq", truncated=3, not_finite=1234))
    table = TaskTable((broken,), task_set("sciq", own_split="test"), 100, complete=False)
    text = " ".join(rendered(table).split())
    assert "Only the first 100 examples of each task" in text
    assert "Interrupted" in text
    assert "sciq: measured on validation, while lm-eval's own figure is of test" in text
    assert "broken, sciq: 1,234 log-likelihoods are not finite" in text
    assert "broken, sciq: 3 requests were longer than the model's context" in text


def test_the_means_stand_below_where_all_seven_are_there():
    seven = [result(task, 0.5, 0.7 if task != "boolq" else None) for task in PAPER_TASKS]
    table = TaskTable((scores("dense", *seven), scores("pruned", *seven[:3])), task_set(*PAPER_TASKS), None)
    text = table.layout().markdown()
    mean, norm = (line for line in text.splitlines() if "mean of the paper's seven" in line)
    assert mean.split("|")[2].strip() == "acc"
    assert mean.split("|")[5].strip() == "0.5000 ± 0.0046"
    assert norm.split("|")[2].strip() == "acc\\_norm, else acc"
    assert norm.split("|")[5].strip() == f"{(0.5 + 6 * 0.7) / 7:.4f} ± {math.hypot(0.0123, *[0.0234] * 6) / 7:.4f}"
    assert mean.split("|")[6].strip() == "-"
    assert "mean of" not in TWO.layout().markdown()


def test_data_is_what_json_takes():
    broken = scores("broken", result("piqa", math.nan))
    data = as_dict(TaskTable((broken,), task_set("piqa"), 5))
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["lm_eval"], data["num_fewshot"], data["data"], data["limit"]) == ("0.4.13", 0, "wheel", 5)
    (model,) = data["models"]
    piqa = model["tasks"]["piqa"]
    assert piqa["metrics"]["acc"] == {"value": None, "stderr": 0.0123}
    assert (piqa["split"], piqa["lm_eval_split"], piqa["examples"], piqa["version"]) == (
        "validation",
        "validation",
        1838,
        "1.0",
    )
