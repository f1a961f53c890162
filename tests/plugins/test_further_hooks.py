"""Another package's calibration, corpus and metric: found by name, used, held to their contracts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.data.corpora import load_text
from ffgym.errors import DataError, FFGymError, PluginError
from ffgym.measure.metrics import Loss
from ffgym.measure.task_definitions import load_tasks
from ffgym.measure.task_table import TaskTable, as_dict
from ffgym.measure.tasks import evaluate_models
from ffgym.pipeline.make_env import make_pruning_env
from ffgym.plugins import manager
from ffgym.report.progress import Reporter

Install = Callable[..., None]

SHIFT = """
import ffgym

class Shifted(ffgym.ConsumerPath):
    def __init__(self, consumer):
        self.weight, self.mean = consumer.weight.float(), consumer.mean.float()
        self.bias = 0 if consumer.bias is None else consumer.bias.float()

    def weight_at(self, channels):
        return self.weight[:, :channels]

    def bias_at(self, channels):
        return self.bias + self.weight[:, channels:] @ self.mean[channels:]

class Shift(ffgym.Calibration):
    "Moves the bias by what the removed channels give on average (FLAP)."
    name = "shift"
    affine = True

    def path(self, consumer):
        return {path}

@ffgym.hookimpl
def ffgym_calibrations():
    return [Shift]
"""
PROVERBS = """
import ffgym

class Proverbs(ffgym.CorpusSource):
    "Proverbs, one a document."
    name = "proverbs"

    def read(self, part, role):
        return f"{{part or 'all'}} for {{role}}", {documents}

@ffgym.hookimpl
def ffgym_corpora():
    return [Proverbs]
"""


def test_a_calibration_is_what_the_reward_sees(install: Install, tiny_run: dict[str, Any]) -> None:
    install("acme-shift", SHIFT.format(path="Shifted(consumer)"))
    env = make_pruning_env(tiny_run, prune={"calibration": "shift", "ridge": 0.01})
    half = env.prunable.halves[1]
    weight, _ = half.dense_consumer
    half.cut(24)
    assert torch.equal(half.consumer.weight, weight[:, :24])
    assert half.consumer.bias is not None
    half.restore()
    env.reset(seed=0, options={"slopes": True})
    _, reward, _, _, info = env.step(np.zeros(6, np.float32))
    assert reward > 0
    assert np.isfinite(info["slopes"]).all()


def test_a_calibration_that_fails_in_an_episode_is_named(install: Install, tiny_run: dict[str, Any]) -> None:
    fails_at_8 = "return self.weight[:, : channels // (channels != 8)]"
    source = SHIFT.replace("return self.weight[:, :channels]", fails_at_8)
    install("acme-shift", source.format(path="Shifted(consumer)"))
    env = make_pruning_env(tiny_run, prune={"calibration": "shift", "ridge": 0.01})
    with pytest.raises(PluginError, match=r"calibration 'shift' .* refitting layer 0 mlp: .*acme_shift\.py, line 10"):
        env.prunable.halves[1].cut(8)


def test_slopes_of_a_path_that_does_not_say_them_are_differences() -> None:
    """The same numbers as the closed form of plain removal."""
    from ffgym.pruning.calibration import ConsumerPath, PlainPath

    class Prefix(ConsumerPath):
        def weight_at(self, channels: int) -> torch.Tensor:
            return weight[:, :channels]

        def bias_at(self, channels: int) -> torch.Tensor | None:
            return None

    weight, gradient = (torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close(Prefix().slopes(gradient, None, 1, 5), PlainPath(weight).slopes(gradient, None, 1, 5))


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("None", "path returned NoneType, not a ffgym.ConsumerPath"),
        ("1 / 0", r"failed while refitting layer 0 attention: ZeroDivisionError: .*acme_shift\.py, line 21\)"),
        (
            "type('Wide', (Shifted,), {'weight_at': lambda self, k: self.weight})(consumer)",
            r"weight_at\(.*\) has shape",
        ),
        (
            "type('Nan', (Shifted,), {'bias_at': lambda self, k: self.weight[:, 0] / 0})(consumer)",
            "holds NaN or infinity",
        ),
        ("type('Lost', (Shifted,), {'weight_at': lambda self, k: None})(consumer)", "is NoneType, not a tensor"),
        (
            "type('Whole', (Shifted,), {'weight_at': lambda self, k: self.weight[:, :k].int()})(consumer)",
            r"weight_at\(.*\) has dtype torch\.int32, not one of floating-point numbers",
        ),
        (
            "type('Complex', (Shifted,), {'bias_at': lambda self, k: self.weight[:, 0] * 1j})(consumer)",
            r"bias_at\(.*\) has dtype torch\.complex64, not one of floating-point numbers",
        ),
    ],
)
def test_a_broken_calibration_is_named(install: Install, tiny_run: dict[str, Any], path: str, complaint: str) -> None:
    install("acme-shift", SHIFT.replace("{path}", path))
    with pytest.raises(PluginError, match=complaint) as caught:
        make_pruning_env(tiny_run, prune={"calibration": "shift", "ridge": 0.01})
    assert "calibration 'shift' (package acme-shift 1.0)" in str(caught.value)


def test_a_bias_comes_and_goes_only_where_the_calibration_says_so(
    install: Install, tiny_run: dict[str, Any], tmp_path: Path, word_tokenizer: Any
) -> None:
    from ffgym.testing.models import tiny_model

    install("acme-shift", SHIFT.replace("affine = True", "").format(path="Shifted(consumer)"))
    with pytest.raises(PluginError, match=r"bias_at\(32\) is a bias, and the consumer has none") as caught:
        make_pruning_env(tiny_run, prune={"calibration": "shift", "ridge": 0.01})
    assert "affine = True" in str(caught.value.hint)
    install(
        "acme-lost",
        SHIFT.replace("self.bias +", "None and").replace('"shift"', '"lost"').format(path="Shifted(consumer)"),
    )
    tiny_model("opt").save_pretrained(tmp_path / "opt")
    word_tokenizer.save_pretrained(tmp_path / "opt")
    tables = {**tiny_run, "model": {**tiny_run["model"], "name": str(tmp_path / "opt")}}
    with pytest.raises(PluginError, match=r"bias_at\(32\) is None, and the consumer has a bias"):
        make_pruning_env(tables, prune={"calibration": "lost", "ridge": 0.01})


def test_a_calibration_whose_refits_nobody_keeps_is_named_where_a_model_is_streamed(
    install: Install, tiny_run: dict[str, Any]
) -> None:
    install("acme-shift", SHIFT.format(path="Shifted(consumer)"))
    sets = [part for setting in ("model.placement=stream", "data.window=64") for part in ("--set", setting)]
    done = CliRunner().invoke(app, ["plan", tiny_run["model"]["name"], "--calibration", "shift", *sets])
    assert done.exit_code == 1
    assert "the cache keeps no refits of calibration 'shift'" in done.stderr
    assert "--calibration ridge" in done.stderr


def test_a_corpus_is_read_by_its_name_and_part(install: Install) -> None:
    install("acme-proverbs", PROVERBS.format(documents="['Haste makes waste.', 'Less is more.']"))
    corpus = load_text("proverbs:english", role="report")
    assert (corpus.name, corpus.split) == ("proverbs:english", "english for report")
    assert corpus.documents == ("Haste makes waste.", "Less is more.")
    assert load_text("proverbs", role="search").split == "all for search"
    assert manager.names("corpus")["proverbs"] == "Proverbs, one a document."


def test_a_broken_corpus_is_named(install: Install) -> None:
    install("acme-proverbs", PROVERBS.format(documents="(1 / 0 for _ in range(3))"))
    with pytest.raises(PluginError, match=r"corpus 'proverbs' \(package acme-proverbs 1\.0\) failed while reading"):
        load_text("proverbs", role="search")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("['Haste.', 'Less.']", r"read returned \['Haste.', 'Less.'\], not what was read and its documents"),
        ("'all', 'One long text.'", r"read returned \('all', 'One long text.'\), not what"),
        ("'all', b'One long text.'", r"read returned \('all', b'One long text.'\), not what"),
        ("5, ['Haste.']", r"read returned \(5, \['Haste.'\]\), not what"),
        ("'all', ['Haste.'], 3", r"read returned \('all', .*, 3\), not what"),
        ("None", "read returned None, not what"),
        ("'all', ['Haste.', b'Less.']", "document 2 is bytes, not a str"),
    ],
)
def test_a_corpus_that_returns_something_else_is_named(install: Install, answer: str, complaint: str) -> None:
    source = PROVERBS.format(documents="[]").replace("""return f"{part or 'all'} for {role}", []""", f"return {answer}")
    install("acme-proverbs", source)
    with pytest.raises(PluginError, match=rf"corpus 'proverbs' \(package acme-proverbs 1\.0\): {complaint}"):
        load_text("proverbs", role="search")


def test_a_corpus_or_a_metric_whose_plugin_is_broken_is_not_only_looked_for_elsewhere(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    install("acme-broken", "1 / 0")
    with pytest.raises(DataError, match=r"could not be loaded and might provide it: acme-broken 1\.0 \(ZeroDivision"):
        load_text("proverbs", role="search")
    with pytest.raises(FFGymError, match=r"The plugin of this name could not be loaded: ZeroDivisionError"):
        load_tasks(["acme-broken-entry"])


LENGTH = """
import ffgym

class Length(ffgym.Metric):
    "How many tokens a model writes before it ends."
    name = "length"
    text = "nothing"

    def scores(self, model, tokenizer, *, limit, on_progress):
        assert not model.training
        on_progress(3, 3)
        return {scores}

@ffgym.hookimpl
def ffgym_metrics():
    return [Length]
"""


def evaluated(model: str, *tasks: str, limit: int | None = None) -> dict[str, Any]:
    loaded = load_tasks(list(tasks))
    *_, scores = evaluate_models([model], loaded, limit=limit, device="cpu", reporter=Reporter(Console(quiet=True)))
    return as_dict(TaskTable(tuple(scores), loaded, None))


def test_a_metric_is_measured_by_eval(install: Install, tiny_run: dict[str, Any]) -> None:
    install("acme-length", LENGTH.format(scores="[1.0, 2.0, 6.0][:limit]"))
    found = evaluated(tiny_run["model"]["name"], "length")
    (model,) = found["models"]
    assert model["tasks"]["length"]["examples"] == 3
    figure = model["tasks"]["length"]["metrics"]["mean"]
    assert figure["value"] == 3.0
    assert figure["stderr"] == pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5)
    assert found["lm_eval"] is None, "nobody asked for its tasks"


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        ("[]", "returned no number"),
        ("['a']", "not numbers"),
        ("['0.5', '1']", r"returned \['0\.5', '1'\], not numbers"),
        ("model.lm_head.weight", r"returned Parameter of shape \(\d+, \d+\), not numbers"),
        ("None", "not numbers"),
        ("1 / 0", "ZeroDivisionError"),
        ("(1 / 0 for _ in range(3))", "failed while scoring a model: ZeroDivisionError"),
        ("[1.0] * 9", "returned 9 numbers, more than limit = 3"),
        ("[0.5, float('nan')]", "returned nan for example 2, and the model's logits are finite"),
    ],
)
def test_a_broken_metric_is_named(install: Install, tiny_run: dict[str, Any], scores: str, complaint: str) -> None:
    install("acme-length", LENGTH.format(scores=scores))
    with pytest.raises(PluginError, match=rf"metric 'length' \(package acme-length 1\.0\).*{complaint}"):
        evaluated(tiny_run["model"]["name"], "length", limit=3)


def test_scores_of_a_broken_model_need_not_be_finite(
    install: Install, tiny_run: dict[str, Any], tmp_path: Path, word_tokenizer: Any
) -> None:
    from ffgym.testing.models import tiny_model

    model = tiny_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    model.save_pretrained(tmp_path / "broken")
    word_tokenizer.save_pretrained(tmp_path / "broken")
    install("acme-length", LENGTH.format(scores="[0.5, float('nan')]"))
    (model,) = evaluated(str(tmp_path / "broken"), "length")["models"]
    assert model["tasks"]["length"]["not_finite"] == 1


def test_the_built_in_loss_is_that_of_the_text(tiny_run: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ffgym.evaluation.perplexity import evaluate

    class OfFile(Loss):
        text = tiny_run["data"]["report"]

    folder, seen = tiny_run["model"]["name"], list[tuple[int, int]]()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scores = OfFile().scores(model, tokenizer, limit=3, on_progress=lambda *done: seen.append(done))
    words = Path(OfFile.text).read_text().split()
    window = model.config.max_position_embeddings
    ids = torch.tensor(tokenizer(" ".join(words[: 3 * window]))["input_ids"]).view(3, window)
    assert scores == evaluate(model, ids).losses
    assert seen[-1] == (3, 3)
