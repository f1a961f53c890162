"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ffgym
from ffgym.cli.app import app, main
from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config
from ffgym.pipeline.start import settle
from ffgym.plugins import discovery, kinds, manager
from ffgym.report.progress import Reporter

pytestmark = pytest.mark.usefixtures("only_builtins")

HEAVY = (
    "torch",
    "transformers",
    "mlflow",
    "gymnasium",
    "stable_baselines3",
    "datasets",
    "matplotlib",
    "sklearn",
    "lm_eval",
    "peft",
)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


class Result:
    """Stands in for what the runner returns."""

    def to_json(self) -> dict[str, Any]:
        return {"perplexity": 34.0, "infinite": float("inf"), "rows": [{"nan": float("nan")}]}

    def print(self, console: Any) -> None:
        console.print("the table: 34.00 ± 0.10")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """A runner that records its configuration, and prints as libraries do."""
    seen: list[RunConfig] = []

    def run(config: RunConfig, progress: Any, resumed: Path | None) -> Result:
        seen.append(config)
        print("a library talks")
        Reporter(progress).print("progress")
        return Result()

    replace_module(monkeypatch, "ffgym.pipeline.pipeline", run_stages=run)
    return seen


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., Any]) -> None:
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    monkeypatch.setattr(importlib.import_module(parent), child, module, raising=False)


# start-up


QUICK = (
    "--version",
    "--help",
    "run --help",
    "eval --help",
    "measure --help",
    "export --help",
    "recover --help",
    "ls criteria",
    "ls agents",
    "ls families",
    "plugins",
    "config --agent uniform",
)
REFUSED = ("plan model", "run --model model", "prepare --model ./model")
REFUSED_RUNS = {
    "run --output full": "output folder full exists and is not empty",
    "run --agent reinforse": "Did you mean 'reinforce'?",
    "run --criterion wandaa": "Did you mean 'wanda'?",
    "run --resume full": "there is no run in full",
}
STARTED = f"""
import sys

def heavy(after):
    found = [name for name in {HEAVY!r} if name in sys.modules]
    assert not found, f"{{after}} imports {{found}}"

import ffgym
ffgym.RunConfig
heavy("import ffgym")
from ffgym.cli import app
for command in {QUICK!r}:
    try:
        app(command.split(), standalone_mode=False)
    except SystemExit as left:
        assert not left.code
    heavy(command)
for command in {(*REFUSED, *REFUSED_RUNS)!r}:
    try:
        app(command.split(), standalone_mode=False)
    except SystemExit as left:
        assert left.code == 1
    heavy(command)
"""


def test_quick_commands_and_what_is_refused_at_once_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "full" / "of").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "starcoder2"}')
    root = {**os.environ, "PYTHONPATH": str(Path(ffgym.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, env=root, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("architecture 'starcoder2' is not supported") == len(REFUSED)
    assert [said for said in REFUSED_RUNS.values() if said not in done.stderr] == []


def test_version_is_the_projects() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text("utf-8"))["project"]["version"] == ffgym.__version__


def test_every_public_name_is_there() -> None:
    for name in ffgym.__all__:
        assert getattr(ffgym, name) is not None
    assert {*ffgym.__all__} <= {*dir(ffgym)}, "completion offers them"
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        ffgym.nothing_of_that_name  # noqa: B018


def test_type_checkers_know_the_public_names_and_no_others() -> None:
    source = ast.parse(Path(ffgym.__file__).read_text("utf-8"))
    imports = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    known = {alias.name: node.module for node in imports for alias in node.names}
    assert {*ffgym.__all__} <= {*known}
    assert {name: known[name] for name in ffgym._LATE} == ffgym._LATE
    functions = [node.name for node in source.body if isinstance(node, ast.FunctionDef)]
    assert "__getattr__" not in functions, "each misspelt name would be one that it may answer to"


# help and usage


def test_every_command_has_help() -> None:
    listed = call("--help").stdout
    commands = "run recover config eval export measure latency ls plugins runs sync ui"
    for command in commands.split():
        assert call(command, "--help").exit_code == 0
        assert command in listed


def test_help_keeps_the_names_of_tables() -> None:
    said = " ".join(re.sub("[│╭╰─╮╯]", " ", call("run", "--help").stdout).split())
    assert "only options of [output], [tracking] and [workers] may differ" in said


def test_help_shows_defaults_and_choices() -> None:
    text = call("run", "--help").stdout
    for part in ("reinforce", "wanda", "mlp-first", "0.2", "ffgym ls rewards", "48", "TABLE.KEY=VALUE"):
        assert part in text


@pytest.mark.parametrize(
    "arguments",
    [["walk"], ["run", "--sparsty", "0.2"], ["run", "--episodes", "lots"], ["ls", "models"], ["bench"]],
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


# run


def test_run_without_options_is_the_demo(runner: list[RunConfig]) -> None:
    done = call("run")
    assert done.exit_code == 0
    assert runner == [settle(RunConfig())]
    assert done.stdout == "the table: 34.00 ± 0.10\n"
    assert "progress" in done.stderr
    assert "a library talks" in done.stderr


def test_every_option_reaches_its_key_in_what_config_prints_and_run_reads(tmp_path: Path) -> None:
    file, printed = tmp_path / "run.toml", tmp_path / "printed.toml"
    file.write_text("[data]\nwindow = 512\n", "utf-8")
    arguments = (
        "--agent random --criterion magnitude --reward perplexity --prior uniform --model a/b --sparsity 0.3 "
        "--calibration affine --resource kv --align 8 --uniform --init-from runs/x --episodes 40 --seed 5 --output out "
        f"--overwrite --set prune.min_units=2 --set search.finalists=3 --config {file}"
    ).split()
    done = call("config", *arguments)
    assert done.exit_code == 0, done.stderr
    printed.write_text(done.stdout, "utf-8")
    wanted = load_config(
        None,
        ["data.window=512", "prune.min_units=2", "search.finalists=3"],
        seed=5,
        model={"name": "a/b"},
        prune={"sparsity": 0.3, "calibration": "affine", "resource": "kv", "align": 8, "uniform": True},
        criterion={"name": "magnitude"},
        reward={"name": "perplexity"},
        agent={"name": "random"},
        prior={"name": "uniform"},
        search={"episodes": 40, "init_from": "runs/x"},
        output={"dir": "out", "overwrite": True},
    )
    assert load_config(printed) == settle(wanted)
    assert "smooth = 0.95  # share of the exploration's variance" in call("config").stdout, "options of plugins too"


def test_json_leaves_stdout_pure(runner: list[RunConfig]) -> None:
    done = call("run", "--json")
    assert json.loads(done.stdout) == {"perplexity": 34.0, "infinite": None, "rows": [{"nan": None}]}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sparsity", "1.2"], "prune.sparsity = 1.2"),
        (["--sparsity", "20%"], "prune.sparsity = '20%': should be a valid number, or two"),
        (["--set", "sparsity=0.2"], "Did you mean 'prune.sparsity'?"),
        (["--config", "nowhere.toml"], "configuration 'nowhere.toml' cannot be read"),
    ],
)
def test_bad_configuration_is_a_message_and_exit_1(arguments: list[str], complaint: str) -> None:
    done = call("run", *arguments)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert complaint in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_choice_is_a_usage_error_with_the_right_ones() -> None:
    done = call("eval", "model", "--data", "foo")
    assert done.exit_code == 2
    assert "Invalid value for '--data': 'foo' is not one of 'auto', 'hub', 'wheel'." in done.stderr


def test_a_list_without_its_quotes_says_what_the_shell_needs() -> None:
    done = call("config", "--reward", "multi-objective", "--set", "reward.tasks=[arc_easy]")
    assert done.exit_code == 1
    assert "reward.tasks = '[arc_easy]': should be a list\n" in done.stderr
    assert "quote the list: --set 'reward.tasks=[...]'." in done.stderr


def test_an_unknown_calibration_is_refused_with_the_nearest() -> None:
    done = call("config", "--calibration", "rigde")
    assert done.exit_code == 1
    assert "unknown calibration 'rigde'\nhint: Did you mean 'ridge'? Known: affine, none, ridge." in done.stderr
    done = call("config", "--calibration", "law.txt")
    assert "hint: The text for it is another key: --set data.calibration=law.txt. Known: affine" in done.stderr


@pytest.mark.parametrize("command", ["run", "config"])
def test_an_agent_that_follows_slopes_and_one_shape_for_all_layers_are_refused_at_once(command: str) -> None:
    done = call(command, "--agent", "pathwise", "--uniform")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "agent 'pathwise' follows slopes" in done.stderr
    assert "Leave --uniform out" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_said_without_a_traceback(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise error

    replace_module(monkeypatch, "ffgym.pipeline.pipeline", run_stages=full)
    done = call("run")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: memory is too small")
    assert str(error).split("\n")[0] in done.stderr
    assert "More lines" not in done.stderr
    assert "model.dtype=bfloat16" in done.stderr


@pytest.mark.parametrize(
    ("path", "said"),
    [("~nobody-of-that-name/x", "begins with ~ and the name of a user"), ("x" * 300, "name too long")],
    ids=["user", "long"],
)
@pytest.mark.parametrize(
    "command", [["measure"], ["export", "--gguf", "x.gguf"], ["run", "--resume"], ["config", "--config"]]
)
def test_a_path_that_the_system_refuses_is_said_without_a_traceback(path: str, said: str, command: list[str]) -> None:
    done = call(*command, path)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "hint: " in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_under_stdout_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        with pytest.raises(SystemExit, match="1"):
            app(["ls", "agents"])
        monkeypatch.undo()
    assert capsys.readouterr().err.startswith("error: cannot write results: No space left on device")


def test_what_a_terminal_cannot_show_is_replaced(runner: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    stdout = io.TextIOWrapper(shown, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["ffgym", "run"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="0"):
        main()
    signal.signal(signal.SIGINT, before)  # main leaves it to the system, because its process ends here
    stdout.flush()
    assert shown.getvalue() == b"the table: 34.00 ? 0.10\n"


def test_pictures_need_no_backend_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "nowhere")  # as Jupyter does for all that a cell starts, with a name of its own
    monkeypatch.setattr(sys, "argv", ["ffgym", "--version"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="0"):
        main()
    signal.signal(signal.SIGINT, before)
    subprocess.run([sys.executable, "-c", "import matplotlib.style"], check=True)


def test_a_refresh_writes_nowhere_else(tmp_path: Path) -> None:
    done = call("export", str(tmp_path), "--refresh", "--output", "elsewhere")
    assert done.exit_code == 2
    assert "--refresh changes DIR itself" in " ".join(done.stderr.replace("│", " ").split())


def test_another_runtime_error_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("shapes do not match")

    replace_module(monkeypatch, "ffgym.pipeline.pipeline", run_stages=broken)
    assert isinstance(call("run").exception, RuntimeError)


# config, ls, plugins, ui


@pytest.mark.parametrize(("plural", "kind"), [(row.plural, kind) for kind, row in kinds.KINDS.items()])
def test_ls_lists_names_and_descriptions(plural: str, kind: kinds.PluginKind) -> None:
    text = call("ls", plural).stdout
    rows = json.loads(call("ls", plural, "--json").stdout)
    assert {row["name"]: row["description"] for row in rows} == manager.names(kind)
    assert all(row["name"] in text and row["description"] in text for row in rows)
    assert ("a list of corpora is a mixture" in text) == (kind == "corpus")


def test_ls_alone_lists_all_kinds() -> None:
    names = {row.plural: list(manager.names(kind)) for kind, row in kinds.KINDS.items()}
    assert json.loads(call("ls", "--json").stdout) == names
    assert [line.split()[0] for line in call("ls").stdout.splitlines()] == list(names)


def test_plugins_shows_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(discovery.ENVIRONMENT_VARIABLE, "nobody")
    text = call("plugins").stdout
    assert "built-in" in text
    assert "nobody FAILED: not installed, but FFGYM_LOAD_PLUGINS asks for it" in text
    rows = json.loads(call("plugins", "--json").stdout)
    assert [row["name"] for row in rows] == ["built-in", "nobody"]
    assert rows[0]["package"] == "ffgym"
    assert "wanda" in rows[0]["provides"]["criterion"]
    listed = call("ls", "agents")
    assert "plugins that could not be loaded: nobody" in listed.stderr
    assert "nobody" not in listed.stdout


def test_a_plugin_whose_name_is_taken_did_not_fail_anywhere(install: Callable[..., None]) -> None:
    """It was loaded, so that no traceback shows more than the failure itself."""
    install(
        "acme-wanda",
        "import ffgym\nclass Wanda(ffgym.Criterion):\n    name = 'wanda'\n    def score(self, weight, stats):\n"
        "        return weight\n@ffgym.hookimpl\ndef ffgym_criteria():\n    return [Wanda]\n",
    )
    text = call("plugins").stdout
    table, _, note = " ".join(text.split()).rpartition("acme-wanda-entry NAME TAKEN: ")
    assert "acme-wanda-entry acme-wanda 1.0 criterion wanda NAME TAKEN" in table
    assert "criterion 'wanda' is a built-in, which is used" in note
    assert "--traceback" not in text
    listed = call("ls", "criteria").stderr
    assert "not used, because another plugin has the same name: acme-wanda-entry" in listed
    assert "could not be loaded" not in listed


def test_ui_opens_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, ...]] = []

    def open_ui(*place: Any, notify: Any, browser: bool) -> None:
        opened.append((*place, browser))

    replace_module(monkeypatch, "ffgym.tracking.ui", open_ui=open_ui)
    assert call("ui").exit_code == 0
    assert call("ui", "--root", "there", "--port", "6001", "--experiment", "mine", "--no-browser").exit_code == 0
    assert opened == [(Path("mlruns"), "ffgym", 5000, True), (Path("there"), "mine", 6001, False)]
