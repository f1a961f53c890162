"""A recovery method that another package brings: one class and its hook, and everything finds it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from glass_runs import glass_config, glass_tables
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from ffgym.cli.app import app

METHOD = '''
import shutil

import ffgym
from pydantic import Field


class Shrink(ffgym.Recovery):
    """Shrinks every weight of the output layer a little, and says that this helped."""

    name = "shrink"
    learning_rate = 0.25
    free_options = frozenset({"colour"})

    class Config(ffgym.PluginConfig):
        steps: int = Field(default=2, ge=1, description="how often to shrink, at least 1")
        colour: str = Field(default="red", description="decides no number")
        deletes: str = Field(default="", description="a folder that is gone once training begins")

    def train(self, setup):
        if self.config.deletes:
            shutil.rmtree(self.config.deletes)
        part = setup.checkpoint.load("shrink", dict)
        earlier = part.facts["done"] if part else 0
        rates = [setup.learning_rate] * self.config.steps
        with setup.progress(len(rates)) as stage:
            for step, rate in enumerate(rates):
                setup.model.get_output_embeddings().weight.mul_(1 - rate)
                setup.log([("rate", rate, step)])
                stage.advance(1, f"held-out {setup.held_out_loss():.2f}")
                setup.checkpoint.save("shrink", {}, {"done": step + 1})
                if self.config.colour == "stop" and step == 0:
                    raise KeyboardInterrupt
        return ffgym.TrainingOutcome(
            summary=f"Shrunk {len(rates)} times, {len(setup.windows)} windows, after {earlier} earlier.",
            kept="all of it was kept",
            curve={"rates": rates, "gain": float("nan")},
        )
'''
HOOK = """

@ffgym.hookimpl
def ffgym_recoveries():
    return [Shrink]
"""
TEXT = {"tokens": 256, "batch_tokens": 256, "held_out_tokens": 256}


@pytest.fixture
def shrink(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    install("acme-shrink", METHOD + HOOK)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ffgym import run

    tables = {"search": {"random_baseline": False}, "prune": {"sparsity": 0.4}, "recover": TEXT}
    return run(glass_config(tmp_path_factory.mktemp("pruned"), **tables), progress=Console(quiet=True)).folder


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_that_trains(folder: Path) -> Any:
    tables = glass_tables(folder, search={"random_baseline": False}, recover=TEXT)
    overrides = [f"{table}.{key}={json.dumps(value)}" for table, keys in tables.items() for key, value in keys.items()]
    done = call("run", "--recover", "shrink", *(part for override in overrides for part in ("--set", override)))
    assert done.exit_code == 0, done.output
    return done


def head(folder: Path) -> torch.Tensor:
    weights = load_file(folder / "model.safetensors")
    return weights.get("lm_head.weight", weights["model.embed_tokens.weight"])


@pytest.mark.usefixtures("shrink")
def test_what_happens_to_the_dense_model_during_training_costs_nothing(pruned: Path, tmp_path: Path) -> None:
    dense = shutil.copytree(glass_tables(tmp_path)["model"]["name"], tmp_path / "dense")
    options = ("--model", dense, "--set", f"recover.deletes={dense}", "--output", tmp_path / "out", "--json")
    done = call("recover", pruned, "--method", "shrink", *options)
    assert done.exit_code == 0, done.output
    assert not dense.exists()
    assert [row["label"] for row in json.loads(done.stdout)["table"]] == ["dense", "before", "shrink"]


@pytest.mark.usefixtures("shrink")
def test_the_command_trains_by_it(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("recover", pruned, "--method", "shrink", "--set", "recover.steps=3", "--output", out, "--json")
    assert done.exit_code == 0, done.output
    assert torch.equal(head(out), head(pruned / "model") * 0.75**3)
    found = json.loads(done.stdout)
    assert [row["label"] for row in found["table"]] == ["dense", "before", "shrink"]
    assert found["table"][1]["loss"] != found["table"][2]["loss"]
    assert found["summary"][0].startswith("Shrunk 3 times")
    assert re.search(r": 5\.\d{4} before, 5\.\d{4} after; all of it was kept\.$", found["summary"][1]), "as measured"
    curve = json.loads((out / "recovery.json").read_text())
    assert (curve["method"], curve["rates"], curve["gain"]) == ("shrink", [0.25] * 3, None)
    written = (out / "config.toml").read_text()
    assert "steps = 3  # how often to shrink, at least 1" in written
    again = call("recover", pruned, "--config", out / "config.toml", "--output", tmp_path / "again", "--json")
    assert again.exit_code == 0, again.output
    assert torch.equal(head(tmp_path / "again"), head(out))


@pytest.mark.usefixtures("shrink")
def test_a_run_trains_by_it(tmp_path: Path) -> None:
    done = run_that_trains(tmp_path)
    trained, before = tmp_path / "out" / "model-recovered", tmp_path / "out" / "model"
    assert torch.equal(head(trained), head(before) * 0.75**2)
    assert "+ shrink" in (tmp_path / "out" / "report.md").read_text()
    assert "Shrunk 2 times" in done.stdout
    # The stored configuration spells its options out, and a later recovery by another method leaves them behind.
    assert "colour = " in (tmp_path / "out" / "config.toml").read_text()
    small = call("recover", before, "--method", "lora", "--output", tmp_path / "lora")
    assert small.exit_code == 0
    assert "merged: 1 step of 256 tokens at up to" in small.stdout


def test_what_did_not_help_is_undone_whatever_the_method_says(
    install: Callable[..., None], pruned: Path, tmp_path: Path
) -> None:
    install("acme-grow", METHOD.replace("mul_(1 - rate)", "mul_(3)") + HOOK)
    done = call("recover", pruned, "--method", "shrink", "--output", tmp_path / "alone")
    assert done.exit_code == 0, done.output
    assert re.search(r"Training did not lower the loss .*, 5\.\d{4}: nothing was kept", done.stdout)
    assert torch.equal(head(tmp_path / "alone"), head(pruned / "model"))
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "\n# alone: pruned\n" in card
    assert "Training it after pruning was tried and undone: these are the weights from before." in card
    done = run_that_trains(tmp_path)
    assert "nothing was kept" in done.stdout
    assert "Load the trained model" not in done.stdout
    assert "as it was before training" not in done.stdout
    *_, before, after = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (before["is_saved"], after["is_saved"]) == (True, False)
    assert after["note"].endswith("was undone: the weights of reinforce + ridge")
    page = Path(call("report", tmp_path / "out").stdout.strip()).read_text()
    assert page.count("AutoModelForCausalLM.from_pretrained") == 1


@pytest.mark.usefixtures("shrink")
def test_an_interrupted_training_goes_on_unless_what_decides_it_has_changed(pruned: Path, tmp_path: Path) -> None:
    command = ("recover", pruned, "--method", "shrink", "--output", tmp_path / "out")
    assert call(*command, "--set", "recover.colour=stop").exit_code == 130
    other = call(*command, "--set", "recover.steps=5")
    assert other.exit_code == 1
    assert "unfinished training with steps = 2; this one has steps = 5" in other.stderr
    done = call(*command, "--set", "recover.colour=blue")
    assert done.exit_code == 0, done.output
    assert "after 1 earlier" in done.stdout


@pytest.mark.usefixtures("shrink")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["recover.step=3"], "unknown key 'step' in [recover]\nhint: Did you mean 'steps'? Known in [recover]: steps"),
        (["recover.tokns=3"], "Did you mean 'tokens'?"),
    ],
)
def test_its_options_are_validated(pruned: Path, options: list[str], complaint: str) -> None:
    for command in (["recover", pruned, "--method", "shrink"], ["config", "--recover", "shrink"]):
        done = call(*command, *(part for option in options for part in ("--set", option)))
        assert done.exit_code == 1
        assert complaint in done.stderr


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("return ffgym.TrainingOutcome(", "return dict("), "train returned dict, not a TrainingOutcome"),
        (('kept="all of it was kept"', "kept=5"), "kept of its outcome is 5, not text"),
        (
            ("        return ffgym", "        setup.model.double()\n        return ffgym"),
            "after training, parameter model.embed_tokens.weight is float64 on cpu, not float32 on cpu",
        ),
        (
            ("        return ffgym", "        del setup.model.model.norm.weight\n        return ffgym"),
            "after training, parameter model.norm.weight is gone, not float32 on cpu",
        ),
        (("rates = [setup", "rates = 1 / 0 * [setup"), "failed while training the model: ZeroDivisionError"),
    ],
)
def test_a_method_that_breaks_is_named(
    install: Callable[..., None], pruned: Path, tmp_path: Path, change: tuple[str, str], complaint: str
) -> None:
    install("acme-broken", METHOD.replace(*change) + HOOK)
    done = call("recover", pruned, "--method", "shrink", "--output", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert "recovery 'shrink' (package acme-broken 1.0)" in done.stderr
    assert complaint in done.stderr


@pytest.mark.parametrize("change", [("curve={", "curve=None and {"), ('"gain": float("nan")', '"gain": object()')])
def test_a_curve_that_cannot_be_kept_loses_no_training(
    install: Callable[..., None], pruned: Path, tmp_path: Path, change: tuple[str, str]
) -> None:
    install("acme-broken", METHOD.replace(*change) + HOOK)
    out = tmp_path / "out"
    done = call("recover", pruned, "--method", "shrink", "--output", out)
    assert done.exit_code == 0, done.output
    assert "recovery 'shrink' (package acme-broken 1.0) failed while handing back its curve: " in done.stderr
    assert torch.equal(head(out), head(pruned / "model") * 0.75**2)
    assert not (tmp_path / "out.unfinished").exists()
    curve = json.loads((out / "recovery.json").read_text())
    assert (curve["method"], curve.get("rates"), len(curve["report"])) == ("shrink", None, 3)


INTERRUPTS = """
        import os, signal
        interrupt = lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
        setup.model.register_state_dict_pre_hook(interrupt)
        return ffgym.TrainingOutcome("""


def test_ctrl_c_while_saving_loses_no_training(install: Callable[..., None], pruned: Path, tmp_path: Path) -> None:
    """A second one waits as well."""
    install("acme-shrink", METHOD.replace("\n        return ffgym.TrainingOutcome(", INTERRUPTS) + HOOK)
    out = tmp_path / "out"
    done = call("recover", pruned, "--method", "shrink", "--output", out)
    assert done.exit_code == 130, done.output
    assert "the same command continues it" not in done.stderr
    assert torch.equal(head(out), head(pruned / "model") * 0.75**2)
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize(
    ("needs", "complaint"),
    [
        ('requires = {"no_such_module": "pip install it"}', "hint: Install it: pip install it"),
        ("needs_dense = True", "shrink needs the dense model"),
    ],
)
def test_what_it_needs_is_asked_for_before_anything_is_loaded(
    install: Callable[..., None], tmp_path: Path, needs: str, complaint: str
) -> None:
    install("acme-needy", METHOD.replace("learning_rate = 0.25", needs) + HOOK)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    done = call("recover", tmp_path / "model", "--method", "shrink")
    assert done.exit_code == 1
    assert complaint in done.stderr
