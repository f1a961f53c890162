"""Training after pruning, from the command to the saved model: what it writes, that it goes on, and how it fails."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from glass_runs import (
    WINDOW,
    chosen_by_auto,
    ctrl_c_in_step,
    glass_config,
    glass_home,
    glass_tables,
    go,
    other_dtype,
    stopping,
)
from mlflow_store import client, new_store, runs
from printed import printed
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ffgym
from ffgym.cli import app
from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config
from ffgym.errors import DataError, FFGymError, ModelError, OutputError, RecoveryError
from ffgym.evaluation.perplexity import evaluate
from ffgym.export.refresh import refresh
from ffgym.models.loading import load
from ffgym.models.origin import dense_model, texts_of
from ffgym.pipeline.compare import with_recovered
from ffgym.prepare.parts import load_parts
from ffgym.recover import recover
from ffgym.recover.folders import find_run_config, place_lock, unfinished_folder
from ffgym.recover.result import RecoveredModel
from ffgym.recover.text import gather

pytestmark = pytest.mark.usefixtures("only_builtins")

SHORT = {"tokens": 1024, "batch_tokens": 256, "evaluate_every": 2, "held_out_tokens": 256}
OWN = {"lora": {"checkpoint_every": 2}}  # options of a method
STEPS = 4
NO_RECORD = shutil.ignore_patterns("config.toml", "ffgym.json")
BESIDE = {"config.toml", "ffgym.json", "recovery.json", "README.md", "modeling_ffgym.py", "model.safetensors"}


def changes(method: str = "none", **recover: Any) -> dict[str, dict[str, Any]]:
    table = {**SHORT, "method": method, **OWN.get(method, {}), **recover}
    return {"search": {"random_baseline": False}, "prune": {"sparsity": 0.4}, "recover": table}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, not to be written to."""
    return go(glass_config(tmp_path_factory.mktemp("pruned"), **changes()))[0].folder


@pytest.fixture
def folder(pruned: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(pruned, tmp_path / "run")
    return tmp_path / "run"


def configured(folder: Path, method: str = "lora", **recover: Any) -> RunConfig:
    overrides = [
        f"recover.{key}={json.dumps(value)}"
        for key, value in {"method": method, **OWN.get(method, {}), **recover}.items()
    ]
    return load_config(folder / "config.toml", overrides)


def recovered(folder: Path, method: str = "lora", **options: Any) -> RecoveredModel:
    table = options.pop("recover", {})
    config = options.pop("config", None) or configured(folder, method, **table)
    return recover.recover(config, folder, **{"progress": Console(file=io.StringIO(), width=200), **options})


def with_dense(config: RunConfig, name: str | None) -> RunConfig:
    """The same configuration with another dense model, or with none that it names."""
    table = config.model.model_dump(exclude={"name"}) | ({} if name is None else {"name": name})
    return config.model_copy(update={"model": type(config.model)(**table)})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(left: Path, right: Path) -> bool:
    ours, theirs = weights(left), weights(right)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# LoRA


@pytest.fixture(scope="module")
def finished(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RecoveredModel]:
    """LoRA on that run, tracked."""
    home = tmp_path_factory.mktemp("finished")
    shutil.copytree(pruned, home / "run")
    new_store(home / "mlruns")
    config = configured(home / "run")
    tracking = config.tracking.model_copy(update={"enabled": True, "root": str(home / "mlruns")})
    return home, recovered(home / "run", config=config.model_copy(update={"tracking": tracking}))


def test_the_model_is_saved_beside_the_old_one(finished: tuple[Path, RecoveredModel]) -> None:
    home, result = finished
    place = home / "run" / "model-recovered"
    assert result.saved.path == place
    assert {path.name for path in place.iterdir()} >= BESIDE
    assert not unfinished_folder(place).exists()
    assert not same_weights(place, home / "run" / "model")
    for name in ("config.json", "modeling_ffgym.py", "tokenizer.json", "tokenizer_config.json"):
        assert (place / name).read_bytes() == (home / "run" / "model" / name).read_bytes(), "it loads as the old one"


def test_the_saved_model_is_the_one_that_was_measured(finished: tuple[Path, RecoveredModel]) -> None:
    home, result = finished
    _, splits = load_parts(configured(home / "run"))
    for row, name in zip(
        result.table.rows,
        (str(glass_home() / "glass"), str(home / "run" / "model"), str(result.saved.path)),
        strict=True,
    ):
        model = load(name, dtype="float32", device="cpu").model
        assert evaluate(model, splits.report.windows).losses == row.evaluation.losses
        assert sum(p.numel() for p in model.parameters()) == row.parameters
    assert [row.label for row in result.table.rows] == ["dense", "before", "lora"]
    _, before, after = result.table.rows
    assert after.evaluation.loss < before.evaluation.loss


def test_the_card_says_what_was_done_and_keeps_the_old_one(finished: tuple[Path, RecoveredModel]) -> None:
    card = (finished[1].saved.path / "README.md").read_text()
    for part in (
        "LoRA of rank 16 (alpha 32) on all linears",
        f"{STEPS} steps of 256 tokens at up to 0.0005, seed 0",
        "before, ",
        "Training text: ",
        "| lora |",
        "#### What was kept",
    ):
        assert part in card
    assert card.startswith("---\nlibrary_name: transformers")


def test_the_curve_is_in_mlflow_in_json_and_in_the_result(finished: tuple[Path, RecoveredModel]) -> None:
    home, result = finished
    curve = json.loads((result.saved.path / "recovery.json").read_text())
    assert len(curve["train"]) == STEPS
    assert [step for step, _ in curve["held_out"]] == [0, 2, STEPS]
    assert curve["chosen"] == STEPS
    store = client(home / "mlruns")
    train = store.get_metric_history(result.mlflow_run, "recover/train_loss")
    assert [(point.step, point.value) for point in train] == list(enumerate(curve["train"]))
    held_out = store.get_metric_history(result.mlflow_run, "recover/held_out_loss")
    assert [[point.step, point.value] for point in held_out] == curve["held_out"]
    run = store.get_run(result.mlflow_run)
    assert run.info.status == "FINISHED"
    assert run.data.params["toml.recover.rank"] == "16"
    assert run.data.tags["recovery"] == "lora"
    assert run.data.metrics["result/perplexity"] == result.after.perplexity
    assert {item.tags[0].value for item in run.inputs.dataset_inputs} == {"recovery"}
    assert "recovery.json" in {item.path for item in store.list_artifacts(result.mlflow_run)}


def test_the_result_is_printed_and_plain_data(finished: tuple[Path, RecoveredModel]) -> None:
    text = printed(finished[1])
    for part in ("before", "lora", "±", "nats against", "trust_remote_code=True", str(finished[1].mlflow_run)):
        assert part in text
    assert "| nats against before |" in finished[1].table.layout().markdown(), "a console breaks this head in two"
    assert len(repr(finished[1]).splitlines()[0]) < 300
    data = json.loads(json.dumps(finished[1].to_json()))
    assert [row["label"] for row in data["table"]] == ["dense", "before", "lora"]


def test_another_round_on_a_recovered_model_needs_no_options(finished: tuple[Path, RecoveredModel]) -> None:
    place = finished[1].saved.path
    assert find_run_config(place) == place / "config.toml"
    assert load_config(place / "config.toml").recover.method == "lora"


def test_a_stock_model_stays_one_that_needs_no_trust(tmp_path: Path) -> None:
    tables = changes()
    tables["prune"] |= {"uniform": True}
    run = go(glass_config(tmp_path, **tables))[0].folder
    result = recovered(run)
    place = result.saved.path
    assert json.loads((place / "config.json").read_text())["model_type"] == "llama"
    assert not (place / "modeling_ffgym.py").exists()
    for text in (printed(result), (place / "README.md").read_text()):
        assert "from_pretrained" in text
        assert "trust_remote_code" not in text


def test_the_training_text_is_said_with_its_size(folder: Path) -> None:
    console = Console(file=io.StringIO(), width=300)
    recovered(folder, recover={"tokens": 20_000, "batch_tokens": 10_000}, progress=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tokens outside the search and report splits" in text
    assert "20,000 to learn from, 1.2 epochs" in text  # more than there are


# distillation


def test_distillation_writes_the_same_things(folder: Path) -> None:
    result = recovered(folder, "distil-mlp", recover={"learning_rate": 1e-3})
    place = result.saved.path
    assert {path.name for path in place.iterdir()} >= BESIDE
    curve = json.loads((place / "recovery.json").read_text())
    assert [layer["layer"] for layer in curve["layers"]] == [0, 1, 2, 3]
    assert all(layer["after"] <= layer["before"] for layer in curve["layers"])
    # The glass model does not know web text: coming closer to it is no help there, and the search split says so.
    card = (place / "README.md").read_text()
    assert same_weights(place, folder / "model") == ("nothing was kept" in card)
    assert "Every MLP was trained by Adam" in card
    assert [row.label for row in result.table.rows] == ["dense", "before", "distil-mlp"]


def test_the_callers_modes_change_no_bit(finished: tuple[Path, RecoveredModel], folder: Path) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        result = recovered(folder)
    assert result.after == finished[1].after
    assert same_weights(result.saved.path, finished[1].saved.path)


# going on after Ctrl-C


@pytest.mark.parametrize(
    ("method", "in_step"), [("lora", True), ("lora", False), ("distil-mlp", False)], ids=["step", "end", "distil"]
)
def test_the_same_command_goes_on_and_ends_with_the_same_bits(
    finished: tuple[Path, RecoveredModel], folder: Path, tmp_path: Path, method: str, in_step: bool
) -> None:
    expected = finished[1] if method == "lora" else recovered(folder, method, output=tmp_path / "whole")
    whole, out = expected.saved.path, tmp_path / "parts"
    if in_step:
        console = Console(file=io.StringIO(), width=300)
        with ctrl_c_in_step(3), pytest.raises(KeyboardInterrupt):
            recovered(folder, method, output=out, progress=console)
    else:  # when all is trained and measured
        console = stopping(f"report: {method}: done", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            recovered(folder, method, output=out, progress=console)
    assert "the same command continues it" in console.file.getvalue()  # type: ignore[attr-defined]
    assert not out.exists()
    assert not [path for path in (tmp_path / "parts.unfinished").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    result = recovered(folder, method, output=out)
    assert same_weights(out, whole)
    assert result.after == expected.after
    assert (out / "recovery.json").read_bytes() == (whole / "recovery.json").read_bytes()
    assert not (tmp_path / "parts.unfinished").exists()


def test_a_place_belongs_to_one_training_at_a_time(folder: Path, tmp_path: Path) -> None:
    with place_lock(tmp_path / "out"), pytest.raises(OutputError, match=r"another training is writing to .*out"):
        recovered(folder, output=tmp_path / "out")


def test_an_interrupted_training_is_killed_in_mlflow_which_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    new_store(tmp_path / "mlruns")
    config = load_config(
        folder / "config.toml",
        ["recover.method=lora", "tracking.enabled=true", f"tracking.root={tmp_path / 'mlruns'}"],
        seed=5,
        model={"dtype": "bfloat16"},
    )
    with ctrl_c_in_step(3), pytest.raises(KeyboardInterrupt):
        recovered(folder, config=config)
    with pytest.raises(RecoveryError, match="holds an unfinished training"):
        recovered(folder, config=config.model_copy(update={"seed": 6}))
    first, refused = runs(tmp_path / "mlruns")
    assert "ffgym.resume" not in refused.data.tags, "the unfinished training is another one"
    done = CliRunner().invoke(app, shlex.split(first.data.tags["ffgym.resume"])[1:])
    assert done.exit_code == 0, done.output
    assert "going on with the training" in done.output
    first, _, second = runs(tmp_path / "mlruns")
    assert [first.info.status, second.info.status] == ["KILLED", "FINISHED"]
    # The second run has the whole curve.
    points = client(tmp_path / "mlruns").get_metric_history(second.info.run_id, "recover/train_loss")
    assert [point.step for point in points] == list(range(STEPS))


# within a run


def test_a_run_recovers_after_its_final_calibration(
    finished: tuple[Path, RecoveredModel], pruned: Path, tmp_path: Path
) -> None:
    config = glass_config(tmp_path, **changes(method="lora"))
    console = Console(file=io.StringIO(), width=200)
    result = ffgym.run(config, progress=console)
    assert result.recovered is not None
    assert same_weights(result.folder / "model", pruned / "model")
    last = result.table.rows[-1]
    assert last.label.endswith("ridge + lora")
    assert "model-recovered" in last.note
    assert last.perplexity == result.recovered.after.perplexity
    assert last.label in (result.folder / "report.md").read_text()
    assert result.to_json()["recovered_model"] == str(result.folder / "model-recovered")
    assert same_weights(result.folder / "model-recovered", finished[1].saved.path)
    assert finished[1].after == result.recovered.after
    again = ffgym.run(config, progress=console, resume=result.folder)
    assert again.found is None
    assert again.to_json()["recovered_model"] == str(result.folder / "model-recovered")
    result.print(console)
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "LoRA of rank 16" in text
    before, after = text.split("Load the trained model with")
    assert "Load the pruned model as it was before training with" in before
    assert "model-recovered'" in after


def test_a_run_that_was_interrupted_while_training_is_resumed(
    finished: tuple[Path, RecoveredModel], tmp_path: Path
) -> None:
    config = glass_config(tmp_path, **changes(method="lora"))
    console = Console(file=io.StringIO(), width=300)
    with ctrl_c_in_step(3), pytest.raises(KeyboardInterrupt):
        ffgym.run(config, progress=console)
    folder, said = tmp_path / "out", console.file.getvalue()  # type: ignore[attr-defined]
    assert said.splitlines()[-1] == f"continue where it stopped: ffgym run --resume {folder}"
    assert "ffgym recover" not in said
    assert "same command" not in said
    result = ffgym.run(config, progress=console, resume=folder)
    assert result.table.rows[-1].label.endswith("ridge + lora")
    assert "going on with the training" in console.file.getvalue()  # type: ignore[attr-defined]
    assert same_weights(folder / "model-recovered", finished[1].saved.path)


def test_a_training_goes_on_in_the_dtype_of_its_run(tmp_path: Path) -> None:
    """``auto`` follows the processor, and the next session may have another one."""
    own = {**glass_tables(tmp_path)["model"], "dtype": other_dtype()}
    config = glass_config(tmp_path, model=own, **changes(method="lora"))
    with ctrl_c_in_step(3), pytest.raises(KeyboardInterrupt):
        go(config)
    result, said = go(chosen_by_auto(config), resume=tmp_path / "out")
    assert "going on with the training" in said
    assert result.recovered is not None
    assert result.recovered.dtype == config.model.dtype
    other = with_recovered(result.table, replace(result.recovered, dtype="float64"), config, "float16").rows[-1]
    assert other.note.endswith("; measured in float64, in which it was trained")
    assert "measured in" not in result.table.rows[-1].note


def test_a_run_says_before_its_search_what_its_recovery_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        go(glass_config(tmp_path, **changes(method="lora", corpus="nowhere.txt")))
    assert not (tmp_path / "out" / "episodes.jsonl").exists()


def test_a_run_without_peft_says_so_before_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecoveryError, match="needs the package peft") as caught:
        go(glass_config(tmp_path, **changes(method="lora")))
    assert caught.value.hint == "Install it: pip install 'ffgym[recover]'", "which versions only pyproject.toml says"
    assert not (tmp_path / "out").exists()


# bad input


def fails(folder: Path, error: type[FFGymError], complaint: str, **options: Any) -> FFGymError:
    with pytest.raises(error, match=complaint) as raised:
        recovered(folder, **options)
    assert raised.value.hint
    return raised.value


def test_output_that_is_there_is_kept_unless_it_may_be_overwritten(folder: Path) -> None:
    place, console = recovered(folder).saved.path, Console(file=io.StringIO())
    assert "Name one" in str(fails(folder, ModelError, "several models: model, model-recovered").hint)
    error = fails(folder / "model", OutputError, "exists and is not empty", progress=console)
    assert "--overwrite" in str(error.hint)
    assert console.file.getvalue() == "", "nothing was loaded"  # type: ignore[attr-defined]
    before = weights(place)
    recovered(folder / "model", config=configured(folder).model_copy(update={"seed": 1}), overwrite=True)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(place).items())


@pytest.mark.usefixtures("read_only_disk")
def test_a_model_that_lies_where_nobody_may_write_is_saved_elsewhere(folder: Path) -> None:
    error = fails(folder, OutputError, "Read-only file system")
    assert error.hint == "You may not write there: choose another place with --output."


@pytest.mark.parametrize("place", ["model", ".", "model/inside"])
def test_output_in_the_models_own_folder_is_refused(folder: Path, place: str) -> None:
    fails(folder, OutputError, "share files", output=folder / place, overwrite=True)


def test_a_training_of_another_configuration_or_model_is_not_gone_on_with(folder: Path) -> None:
    with ctrl_c_in_step(3), pytest.raises(KeyboardInterrupt):
        recovered(folder)
    noted = json.loads((folder / "model-recovered.unfinished" / "identity.json").read_text())
    assert (noted["method"], noted["rank"], noted["alpha"], noted["learning_rate"]) == ("lora", 16, 32.0, 5e-4)
    assert "checkpoint_every" not in noted
    error = fails(folder, RecoveryError, r"rank = 16; this one has rank = 8", recover={"rank": 8})
    assert "--overwrite" in str(error.hint)
    fails(folder, RecoveryError, "method = 'lora'", method="distil-mlp")
    fails(folder, RecoveryError, "training text", recover={"tokens": 512})
    content = weights(folder / "model")
    content["model.norm.weight"] *= 2
    save_file(content, folder / "model" / "model.safetensors", {"format": "pt"})
    fails(folder, RecoveryError, "weights = ")
    assert recovered(folder, recover={"rank": 8}, overwrite=True).saved


def test_without_a_method_or_a_dense_model_nothing_starts(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    error = fails(folder, RecoveryError, "recover.method is none", method="none")
    assert "--method lora" in str(error.hint)
    config = with_dense(configured(folder, "distil-mlp"), None)
    (folder / "model" / "ffgym.json").unlink()
    error = fails(folder, RecoveryError, "needs the dense model", config=config)
    assert "--model" in str(error.hint)


def test_training_in_float16_is_refused(folder: Path) -> None:
    config = configured(folder)
    model = config.model.model_copy(update={"dtype": "float16"})
    fails(folder, RecoveryError, "float16", config=config.model_copy(update={"model": model}))


def test_the_dtype_is_that_of_the_saved_model_unless_said(folder: Path) -> None:
    config = configured(folder)
    auto = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "auto"})})
    assert recovered(folder, config=auto, output=folder / "as-saved").dtype == "float32"
    half = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    result = recovered(folder, config=half)
    assert {tensor.dtype for tensor in weights(result.saved.path).values()} == {torch.bfloat16}


def test_a_model_of_16_bits_that_is_trained_in_float32_is_saved_in_16(folder: Path) -> None:
    load(str(folder / "model"), device="cpu").model.to(torch.float16).save_pretrained(folder / "model")
    result = recovered(folder, config=configured(folder))
    assert "float32" in result.table.header
    assert {tensor.dtype for tensor in weights(result.saved.path).values()} == {torch.float16}
    _, splits = load_parts(configured(folder))
    saved = load(str(result.saved.path), dtype="float32", device="cpu").model
    assert evaluate(saved, splits.report.windows).losses == result.table.rows[-1].evaluation.losses


def test_a_training_whose_gain_is_rounded_away_is_not_kept(folder: Path) -> None:
    load(str(folder / "model"), device="cpu").model.to(torch.bfloat16).save_pretrained(folder / "model")
    result = recovered(folder, recover={"learning_rate": 1e-7})
    assert not result.is_kept
    assert same_weights(result.saved.path, folder / "model")


@pytest.mark.parametrize("dense", [None, "no-such-folder/at/all"])
def test_without_a_dense_model_the_table_has_two_rows(folder: Path, dense: str | None) -> None:
    config = with_dense(configured(folder), dense)
    (folder / "model" / "ffgym.json").unlink()
    result = recovered(folder, config=config)
    assert [row.label for row in result.table.rows] == ["before", "lora"]


# the command


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["recover", *arguments])


def test_the_command_does_all_of_it(folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "mine.txt"
    corpus.write_text("\n".join(f"Line {i} says that {i * 7919 % 1000} is no prime." for i in range(400)))
    out = tmp_path / "deep" / "out"
    options = ["--method", "lora", "--corpus", str(corpus), "--tokens", "1k", "--rank", "2", "--seed", "3"]
    done = call(str(folder), *options, "--output", str(out), "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["model"] == str(out)
    assert [row["label"] for row in data["table"]] == ["dense", "before", "lora"]
    used = load_config(out / "config.toml")
    assert (used.recover.corpus, used.recover.tokens, used.recover.rank, used.seed) == (str(corpus), 1000, 2, 3)
    assert "mine.txt" in done.stderr


def test_training_text_of_foreign_tokens_is_refused_when_it_is_gathered(folder: Path) -> None:
    """That is before a run's search."""
    loaded, splits = load_parts(configured(folder))
    loaded.model.resize_token_embeddings(10)
    with pytest.raises(ModelError, match=r"token \d+ of the training text: the embedding of model .* has 10 rows"):
        gather(configured(folder), loaded, splits)


def test_a_model_that_was_copied_away_from_its_run_has_what_it_needs(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "elsewhere")
    small = ("--tokens", "1k", "--set", f"recover.batch_tokens={4 * WINDOW}")
    done = call(str(tmp_path / "elsewhere"), "--method", "distil-mlp", *small)
    assert done.exit_code == 0, done.stderr
    assert "dense" in done.stdout


def test_a_model_without_its_run_needs_the_options(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "lonely" / "model", ignore=NO_RECORD)
    tables = glass_tables(tmp_path, **changes())
    (tmp_path / "data.toml").write_text(tomli_w.dumps({key: tables[key] for key in ("data", "search", "tracking")}))
    done = call(str(tmp_path / "lonely" / "model"), "--method", "distil-mlp")
    assert done.exit_code == 1
    assert "no config.toml of the run" in done.stderr
    assert "needs the dense model" in done.stderr
    done = call(
        str(tmp_path / "lonely" / "model"),
        *("--config", str(tmp_path / "data.toml"), "--method", "lora", "--model", str(glass_home() / "glass")),
        *("--tokens", "1k", "--set", f"recover.batch_tokens={4 * WINDOW}"),
    )
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "lonely" / "model-recovered" / "recovery.json").is_file()


def test_the_dense_model_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run calls it by a name that leads to it only from where the run began."""
    shutil.copytree(glass_home() / "glass", tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    went, _ = go(glass_config(tmp_path, **changes("lora"), model={"name": "models/mine"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = recovered(went.folder / "model", output="trained")
    assert [row.label for row in again.table.rows] == ["dense", "before", "lora"]
    alone = shutil.move(went.folder / "model", "alone")
    refresh(Path(alone))
    for model in (alone, went.folder / "model-recovered", again.saved.path):
        assert dense_model(Path(model), None).name == str(tmp_path / "models" / "mine")
    text = str(glass_home() / "c4.txt")
    made = {"calibrated": text, "searched": text}
    assert (texts_of(Path(alone)), texts_of(again.saved.path)) == (made, made | {"trained": text})


def test_a_dense_model_that_nobody_knows_is_not_made_up(folder: Path, tmp_path: Path) -> None:
    """Neither from a file that leaves the model out, nor from what an earlier training wrote without knowing it."""
    shutil.copytree(folder / "model", tmp_path / "lonely", ignore=NO_RECORD)
    tables = glass_tables(tmp_path, **changes())
    (tmp_path / "data.toml").write_text(tomli_w.dumps({key: tables[key] for key in ("data", "search", "tracking")}))
    small = ("--method", "lora", "--tokens", "1k", "--set", f"recover.batch_tokens={4 * WINDOW}")
    once = call(str(tmp_path / "lonely"), "--config", str(tmp_path / "data.toml"), *small)
    assert once.exit_code == 0, once.stderr
    again = call(str(tmp_path / "lonely-recovered"), *small, "--method", "distil-mlp")
    assert again.exit_code == 1
    assert "needs the dense model" in again.stderr
    named = ("--method", "distil-mlp", "--set", 'model = {name = "nowhere"}')
    said = call(str(tmp_path / "lonely-recovered"), *small, *named)
    assert "'nowhere'" in said.stderr, "a name that is given is taken, however it is written"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--method", "lorra"], "Did you mean 'lora'?"),
        (["--method", "lora", "--rank", "0"], "recover.rank = 0"),
    ],
)
def test_errors_are_a_message_a_hint_and_exit_1(pruned: Path, arguments: list[str], complaint: str) -> None:
    done = call(str(pruned), *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert complaint in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
