"""`ffgym measure --engine`: how a pruned model and the dense one are served. The engine is a fake one, with a pace."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import venv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_engine
import psutil
import pytest
from fake_engine import noted
from glass_runs import glass_home
from processes import has_ended, interrupted, until
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.costs.timing import Spread
from ffgym.errors import ConfigError, ModelError
from ffgym.measure.serving import Served, ServingMeasurement, measure_serving
from ffgym.measure.speed import Workload
from ffgym.models.loading import load
from ffgym.plan import machine

ROLES = ["dense", "dense, as pruned", "pruned"]


@pytest.fixture
def pruned(run: Path) -> Path:
    return run / "model"


def serve_quickly(folder: Path, **changes: Any) -> ServingMeasurement:
    quick: dict[str, Any] = {"requests": (2,), "prompt_lengths": (16,), "output_tokens": 4, "repetitions": 1}
    quick |= {"engine": "vllm", "dense": str(glass_home() / "glass")}
    return measure_serving(folder, **(quick | changes))


def assert_no_process_is_left(log: Path) -> None:
    until(lambda: all(has_ended(pid) for line in noted(log, "started") for pid in line["pids"]))


def test_models_are_served_in_turn_and_compared_within_a_repetition(pruned: Path, log: Path) -> None:
    found = serve_quickly(pruned, repetitions=2, prompt_lengths=(8, 16))
    assert [(each.model, each.workload.batch, each.workload.length) for each in found.served] == [
        (role, 2, length) for length in (8, 16) for role in ROLES
    ]
    assert [each.backend_ratio is not None for each in found.served] == [False, False, True] * 2
    assert found.served[0].ratio.median == 1
    assert found.together
    assert not any("The same model" in note for note in found.tables()[1].notes)
    asked = noted(log, "asked")
    warm, measured = asked[:12], asked[12:]
    assert len(warm) + len(measured) == 3 * 2 * 2 * 3  # servers, lengths, requests, and twice after the warm-up
    folder = {"pruned": str(pruned)}
    turns = [folder.get(role, str(glass_home() / "glass")) for _ in range(2 * 2) for role in ROLES for _ in range(2)]
    assert [line["asked"] for line in measured] == turns
    transformers = [line["arguments"][-8:-6] == ["--model-impl", "transformers"] for line in measured]
    assert transformers == [role == "dense, as pruned" for _ in range(2 * 2) for role in ROLES for _ in range(2)]
    assert_no_process_is_left(log)


def test_prompts_differ_among_requests_and_are_the_same_for_all_models(pruned: Path, log: Path) -> None:
    serve_quickly(pruned)
    asked = [line["prompt"] for line in noted(log, "asked")]
    groups = [set(asked[index : index + 2]) for index in range(0, len(asked), 2)]
    assert all(len(group) == 2 for group in groups)
    assert groups[0] == groups[1] == groups[2]  # warm-up
    assert groups[3] == groups[4] == groups[5]
    assert not groups[0] & groups[3]
    tokenizer = load(str(pruned)).tokenizer
    assert {len(tokenizer(prompt).input_ids) for prompt in asked} == {16}


def test_tokens_are_counted_and_timed(pruned: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TOKENS", "3")  # it ends before what was asked for
    found = serve_quickly(pruned, output_tokens=8)
    assert found.answer_tokens == (3, 3)
    paced = fake_engine.FIRST_SECONDS + 2 * fake_engine.NEXT_SECONDS
    for each in found.served:
        assert 0 < each.tokens_per_second.median <= 2 * 3 / paced
        assert each.first_seconds.median >= fake_engine.FIRST_SECONDS
        # the first may be read late
        assert each.first_seconds.median + 2 * each.following_seconds.median >= paced
    assert all(line["ignore_eos"] for line in noted(log, "asked"))


def little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))


def in_a_container(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That leaves 1 GiB of the machine's memory."""
    for name, content in {"cgroup": "0::/", "memory.max": str(2 << 30), "memory.current": str(1 << 30)}.items():
        (folder / name).write_text(content)
    monkeypatch.setattr(machine, "CGROUPS", folder)


def on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GPU", "Abacus")


@pytest.mark.parametrize("circumstance", [little_memory, in_a_container, on_a_gpu])
def test_servers_that_do_not_fit_together_are_started_for_each_turn(
    pruned: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, circumstance: Any
) -> None:
    circumstance(tmp_path, monkeypatch)
    found = serve_quickly(pruned, repetitions=2, requests=(1,))
    assert not found.together
    assert (found.device == "Abacus") == (circumstance is on_a_gpu), "of the engine, whatever torch sees here"
    started = [line["pids"][0] for line in noted(log, "started")]
    assert len(started) == 2 * 3
    asked = noted(log, "asked")
    assert len(asked) == 2 * len(started)  # each warms up
    assert_no_process_is_left(log)


def test_a_stock_model_needs_no_other_backend(log: Path) -> None:
    found = serve_quickly(glass_home() / "glass", requests=(1,))
    assert any("The same model twice" in note for note in found.tables()[1].notes)
    assert [each.model for each in found.served] == ["dense", "pruned"]
    assert "--trust-remote-code" not in noted(log, "asked")[-1]["arguments"]


@pytest.mark.slow
def test_ctrl_c_amid_answers_ends_the_command_and_its_servers(pruned: Path, log: Path) -> None:
    command = [sys.executable, "-m", "ffgym", "measure", str(pruned), "--dense", str(glass_home() / "glass")]
    command += ["--engine", "vllm", "--prompt-lengths", "16", "--output-tokens", "50", "--repetitions", "1000"]
    done = interrupted(command, signal.SIGTERM, lambda: noted(log, "asked"))
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert_no_process_is_left(log)


def test_what_servers_take_to_start_says_nothing_of_how_long_they_serve(
    pruned: Path, log: Path, slow_start: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", slow_start)
    serve_quickly(pruned, repetitions=2)
    said = slow_start.getvalue()
    assert re.findall("(.*) · starting: (.*) · .* elapsed\n", said) == [
        ("serve, in turn: 0/6 bursts", role) for role in ROLES
    ], "of the first one, too"
    assert re.findall("1/6 bursts · serving: dense · .* left\n", said)
    assert all(re.fullmatch(r"\d+:\d\d", left) for left in re.findall("· ([^·]*) left\n", said)), "not hours or days"


@pytest.mark.parametrize(
    ("low", "repetitions", "ends"),
    [(0.9, 4, None), (0.7, 4, "quartiles"), (0.9, 3, None), (0.7, 3, "range")],
)
def test_a_busy_machine_is_said_where_one_ratio_differs_among_repetitions(
    low: float, repetitions: int, ends: str | None
) -> None:
    one = Spread(1.0, 1.0, 1.0)
    loads = [Workload(count, 16) for count in (1, 2, 4)]
    served = [Served(model, load, one, one, one, one, one) for load in loads for model in ("dense", "pruned")]
    served[3] = replace(served[3], backend_ratio=Spread(1.0, low, 1.0))
    facts: dict[str, Any] = {"device": "x", "processors": 1, "threads": 1, "dtype": "float32"}
    found = ServingMeasurement(
        "vllm", "a", "b", tuple(served), (4, 4), repetitions=repetitions, together=True, arguments=(), **facts
    )
    notes = " ".join(found.tables()[1].notes)
    assert f"{'range' if repetitions < 4 else 'quartiles'} in brackets" in notes
    busy = f"The ratio of 'pruned' at 2 x 16 differs by 30% ({ends}): the machine was busy."
    assert (busy in notes) == ("busy" in notes) == (ends is not None)


# what is refused


TRACEBACK = (
    """\
(Core pid=7) ERROR 11-29 [core.py:8] Traceback (most recent call last):
(Core pid=7) ERROR 11-29 [core.py:8]   raise ValueError(f"{what}: no room")
(Core pid=7) ERROR 11-29 [core.py:8] pydantic_core.ValidationError: 1 validation error for Model
(Core pid=7) ERROR 11-29 [core.py:8]   Value error, heads: no room [type=value_error]
Traceback (most recent call last):
"""
    + 20 * "  File 'x.py', line 1, in <module>\n"
)
NO_ROOM = [
    "pydantic_core.ValidationError: 1 validation error for Model",
    "Value error, heads: no room [type=value_error]",
]
SEE_ABOVE = "RuntimeError: See root cause above."


@pytest.mark.parametrize(
    ("printed", "shown"),
    [("cannot load: no room", ["cannot load: no room"]), (TRACEBACK + SEE_ABOVE, [*NO_ROOM, SEE_ABOVE])],
)
def test_a_server_that_dies_shows_its_errors_and_leaves_its_log(
    pruned: Path, log: Path, monkeypatch: pytest.MonkeyPatch, printed: str, shown: list[str]
) -> None:
    monkeypatch.setenv("FAKE_DIES", printed)
    with pytest.raises(ModelError, match="'dense' ended with exit status 1 before it answered") as caught:
        serve_quickly(pruned)
    assert [line.strip() for line in caught.value.message.splitlines()[1:]] == shown
    command, _, rest = Path(str(caught.value.hint).split(": ")[1]).read_text().partition("\n")
    assert "HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 " in command
    assert f"--model {glass_home() / 'glass'}" in command
    assert rest == printed
    environment = command.partition(os.environ["FFGYM_VLLM_PYTHON"])[0]
    subprocess.run([*shlex.split(environment), "true"], check=True)  # a shell can start it again
    assert_no_process_is_left(log)


def test_a_server_that_does_not_answer_in_time_is_ended(
    pruned: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HANGS", "1")
    now = time.monotonic
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: 900 * now())
        with pytest.raises(ModelError, match="did not answer within 15 minutes"):  # which are a second
            serve_quickly(pruned)
    assert_no_process_is_left(log)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("FAKE_REFUSES", "1", "it was refused"), ("FAKE_TOKENS", "0", "there were no tokens, or they were not counted")],
)
def test_answers_that_are_none_are_errors(
    pruned: Path, log: Path, tmp_path: Path, variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ModelError, match=f"did not answer a request: {said}"):
        serve_quickly(pruned)
    assert_no_process_is_left(log)
    assert len(list(tmp_path.glob("ffgym-*.log"))) == 1, "not one a request"


def test_a_server_that_is_killed_amid_answers_is_said_to_have_ended(
    pruned: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_KILLED", "1")
    with pytest.raises(ModelError, match="'dense' ended with signal 9 while it answered"):
        serve_quickly(pruned)
    assert_no_process_is_left(log)


def refused(folder: Path, engine: str = "vllm") -> ModelError:
    with pytest.raises(ModelError) as caught:
        serve_quickly(folder, engine=engine)
    return caught.value


def test_engines_that_are_not_installed_name_what_to_install(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path, symlinks=True)
    python = str(tmp_path / "bin/python")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", python)
    for variable in (python, ""):  # a job script may leave it empty
        monkeypatch.setenv("FFGYM_VLLM_PYTHON", variable)
        error = refused(pruned)
        assert error.message == f"vLLM is not installed for {python}"
        assert "FFGYM_VLLM_PYTHON=" in str(error.hint)
    error = refused(pruned, "llama-cpp")
    assert "is not installed" in error.message
    assert "llama-server on the PATH" in str(error.hint)


def test_a_variable_that_names_no_program_is_named(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (sys.prefix, "/no/such/python"):
        monkeypatch.setenv("FFGYM_VLLM_PYTHON", given)
        error = refused(pruned)
        assert error.message == f"FFGYM_VLLM_PYTHON names {given}, which is no program"
        assert "FFGYM_VLLM_PYTHON=vllm/bin/python." in str(error.hint)


def test_a_folder_without_a_tokenizer_is_refused_before_an_engine_is_asked(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFGYM_VLLM_PYTHON", "/no/such/python")
    without = tmp_path / "model"
    shutil.copytree(pruned, without, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "holds no tokenizer" in refused(without).message


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("echo ImportError: libcudart.so.13: cannot open; exit 1", "ImportError: libcudart.so.13: cannot open"),
        ("kill -9 $$", "it ended with status -9"),
    ],
)
def test_a_vllm_that_does_not_work_is_not_called_absent(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, reason: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{ending}\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("FFGYM_VLLM_PYTHON", str(python))
    assert refused(pruned).message == f"vLLM cannot be used with {python}: {reason}"


def test_a_python_is_asked_for_vllm_as_its_servers_run(
    pruned: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise ImportError('of another Python')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert serve_quickly(pruned).engine == "vllm-fake 9.9"


def test_a_foreign_or_missing_class_file_is_not_run(pruned: Path, log: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pruned, folder)
    with (folder / "modeling_ffgym.py").open("a", encoding="utf-8") as file:
        file.write("print('hello')\n")
    for _ in range(2):
        with pytest.raises(ModelError, match="is missing, or not the one that this ffgym writes") as caught:
            serve_quickly(folder)
        assert "--refresh" in str(caught.value.hint)
        (folder / "modeling_ffgym.py").unlink(missing_ok=True)
    assert not noted(log, "started")


def test_a_model_of_another_family_is_refused(pruned: Path, log: Path, tmp_path: Path) -> None:
    dense = shutil.copytree(glass_home() / "glass", tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text()) | {"model_type": "qwen2"}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="family is qwen2 in the dense model and llama in the pruned one"):
        serve_quickly(pruned, dense=str(dense))
    assert not noted(log, "started")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--tensor-parallel-size 2", "layer 3 of the model 'pruned' has 127 MLP channels, which 2 GPUs"),
        ("-tp 2 --tensor_parallel_size=4", "layer 1 of the model 'pruned' has 2 query heads, which 4 GPUs"),
    ],
)
def test_layers_that_gpus_cannot_share_are_refused(pruned: Path, log: Path, given: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        serve_quickly(pruned, arguments=given.split())
    assert not noted(log, "started")


def test_key_value_heads_that_gpus_cannot_share_are_refused(pruned: Path, log: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned, tmp_path / "shared")
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"]["1"] |= {"num_attention_heads": 6, "num_key_value_heads": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="layer 1 of the model 'pruned' has 3 key/value heads, which 2 GPUs"):
        serve_quickly(folder, arguments=["-tp", "2"])
    assert not noted(log, "started")


def test_a_vllm_that_knows_one_size_for_all_layers_is_refused(
    pruned: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VERSION", "0.27.1")
    with pytest.raises(ModelError, match=r"vllm-fake 0\.27\.1 knows one size for all layers"):
        serve_quickly(pruned)
    assert not noted(log, "started")


def test_bad_arguments_are_named(pruned: Path, log: Path) -> None:
    with pytest.raises(ConfigError, match="--prompt-lengths 512 and --output-tokens 4 are more than the 120 tokens"):
        serve_quickly(pruned, prompt_lengths=(512,))
    with pytest.raises(ConfigError, match="engines serve no 'int8'"):
        serve_quickly(pruned, dtype="int8")
    with pytest.raises(ModelError, match="is not in the hub's cache"):
        serve_quickly(pruned, dense="org/not-downloaded")
    assert not noted(log, "started")


# the command


def ask(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["measure", *arguments])


def test_the_table_fits_a_terminal_and_json_is_pure(pruned: Path, log: Path, tmp_path: Path) -> None:
    given = [str(pruned), "--dense", str(glass_home() / "glass"), "--engine", "vllm", "--batch-sizes", "1"]
    given += ["--prompt-lengths", "16", "--output-tokens", "4", "--repetitions", "1", "--engine-args", "--a 'b c'"]
    done = ask(*given, "--output", str(tmp_path / "table.md"))
    assert done.exit_code == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "dense, as pruned" in done.stdout
    said = " ".join(done.stdout.split())
    assert "More arguments of the engine: --a b c." in said
    assert "One repetition with servers that take turns, so noise cannot be seen." in said
    assert "| 1 x 16 | pruned |" in (tmp_path / "table.md").read_text()
    assert "b c" in noted(log, "asked")[-1]["arguments"]
    data = json.loads(ask(*given, "--json", "--output", str(tmp_path / "table.json")).stdout)
    assert json.loads((tmp_path / "table.json").read_text()) == data
    assert " ".join(" ".join(data["notes"]).split()) in said
    assert (data["engine"], data["answer_tokens"]) == ("vllm-fake 9.9", [4, 4])
    assert [each["model"] for each in data["served"]] == ROLES


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--output-tokens", "8"], "goes with --engine"),
        (["--engine-args", "--x"], "goes with --engine"),
        (["--engine", "vllm", "--device", "cpu"], "chooses its device itself"),
        (["--engine", "vllm", "--engine-args", "'"], "No closing quotation"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(pruned: Path, given: list[str], said: str) -> None:
    done = ask(str(pruned), *given)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
