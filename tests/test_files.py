"""What ffgym reads again from disk: a file that is damaged gives one error with a next step, and nothing hangs."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_tables import made_up_table
from made_up_episodes import episode
from safetensors import SafetensorError
from stored_runs import write_front, write_run
from tiny_tokenizers import byte_level

from ffgym.bench.cell import CELL_RESULT
from ffgym.bench.file import read_bench
from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config, to_toml
from ffgym.costs.latency_table import read_table, to_json
from ffgym.data.cache import DIGESTS, write_folder_once
from ffgym.errors import ConfigError, DataError, FFGymError, OutputError, RecoveryError
from ffgym.files import FileFormat, disk_errors, replacing, write_text
from ffgym.models.checkpoint import weight_files
from ffgym.models.origin import FILE, Origin, recorded_dense_model
from ffgym.pipeline.folder import RESULT, RunFolder, RunRecord, read_record
from ffgym.pipeline.stored import read_front
from ffgym.pipeline.stored import read_table as read_run_table
from ffgym.plugins.architectures import MODEL_CONFIG
from ffgym.prepare.store import RECORD as PREPARED_RECORD
from ffgym.prepare.store import PreparedRecord
from ffgym.recover.checkpoint import Checkpoint
from ffgym.recover.lora import LoraCurve
from ffgym.search.log import Recorder, read_log
from ffgym.search.policy import read_policy
from ffgym.testing.models import tiny_model
from ffgym.tracking.outbox import Outbox

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PLAIN = FileFormat("thing", dict[str, Any], DataError, "Make another one.")
CONFIG = RunConfig.model_validate({"agent": {"name": "reinforce"}})
FACTS = {"train": [2.5, 2.25], "held_out": [[0, 2.5], [2, 2.25]], "chosen": 2}


class TestFormats:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", r"thing\.json is no thing, or a damaged one: Invalid JSON"),
            ("[1]", "Input should be a"),
            ('{"a": ' + "[" * 3000 + "]" * 3000 + "}", "recursion limit"),
            ('{"a": 1' + "0" * 5000 + "}", "number out of range"),
            ('{"a": "\\ud800"}', "Invalid JSON"),
        ],
    )
    def test_what_does_not_fit_names_file_and_reason(self, text: str, said: str, tmp_path: Path) -> None:
        (tmp_path / "thing.json").write_text(text)
        with pytest.raises(DataError, match=said) as raised:
            PLAIN.read(tmp_path / "thing.json")
        assert raised.value.hint == "Make another one."

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a = " + "1" * 5000, "not valid TOML"),
            ("a = 0x" + "f" * 5000, "not valid TOML"),
            ("a = " + "[" * 3000, "nested too deep"),
            ("a = 1\n" * 100_000, "larger than"),
        ],
    )
    def test_toml_has_limits(self, text: str, said: str, tmp_path: Path) -> None:
        (tmp_path / "run.toml").write_text(text)
        with pytest.raises(ConfigError, match=rf"run\.toml is no configuration, or a damaged one: .*{said}"):
            load_config(tmp_path / "run.toml")

    @pytest.mark.parametrize("value", ["1" * 5000, "0x" + "f" * 5000, "[" * 3000])
    def test_an_override_has_the_same_limits(self, value: str) -> None:
        with pytest.raises(ConfigError):
            load_config(None, [f"data.search={value}"])

    def test_a_large_file_is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / "thing.json").open("wb") as file:
            file.truncate(1 << 40)  # sparse: takes no room
        with pytest.raises(DataError, match="larger than"):
            PLAIN.read(tmp_path / "thing.json")
        with pytest.raises(DataError, match=r"line 1 .*longer than"):
            list(PLAIN.lines(tmp_path / "thing.json"))

    @pytest.mark.parametrize("place", ["/dev/zero", "pipe", "folder"])
    def test_what_is_no_regular_file_is_refused(self, place: str, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        with pytest.raises(DataError, match=r"not a regular file|is a folder"):
            PLAIN.read(tmp_path / place)
        if place != "folder":
            with pytest.raises(ConfigError, match="not a regular file"):
                read_policy(tmp_path / place, CONFIG.agent.name)


def test_what_is_written_in_the_place_of_a_folder_or_a_file_is_whole(tmp_path: Path) -> None:
    for _ in range(2):
        with replacing(tmp_path / "folder") as part:
            part.mkdir()
            (part / "content").write_text("new")
        with replacing(tmp_path / "file") as part:
            part.write_text("new")
    assert (tmp_path / "folder" / "content").read_text() == (tmp_path / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_takes_the_place_of_a_link_leaves_what_it_led_to_and_no_link(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "folder").symlink_to("target")
    with replacing(tmp_path / "folder") as part:
        part.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "target"]


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Make room on the disk, or choose another place."),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Make room on the disk, or choose another place."),
        (SafetensorError("I/O: No space left (os error 28)"), "Make room on the disk, or choose another place."),
        (SafetensorError("I/O: Read-only (os error 30)"), "You may not write there: choose another place."),
        (OSError(errno.EROFS, "Read-only file system"), "You may not write there: choose another place."),
        (PermissionError(errno.EACCES, "Permission denied"), "You may not write there: choose another place."),
        (OSError(errno.EFBIG, "File too large"), "Choose another place."),
    ],
)
def test_only_a_full_disk_has_to_be_emptied(error: Exception, hint: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write") as raised, replacing(tmp_path / "file"):
        raise error
    assert raised.value.hint == hint
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS):
        with pytest.raises(OutputError, match="cannot write results") as raised, disk_errors():
            raise error
        assert raised.value.hint == hint.replace("place", "folder with --output DIR")


def test_what_tokenizers_says_of_a_full_disk_is_an_error_with_a_next_step(tmp_path: Path, small_files: Any) -> None:
    file, said = tmp_path / "tokenizer.json", r"cannot write .*tokenizer\.json: .* \(os error "
    with pytest.raises(OutputError, match=said), small_files(100), replacing(file) as part:
        byte_level().backend_tokenizer.save(str(part))
    assert not list(tmp_path.iterdir())


def test_a_log_that_may_not_grow_is_an_error_with_a_next_step(tmp_path: Path, small_files: Any) -> None:
    log, said = tmp_path / "episodes.jsonl", r"cannot write .*episodes\.jsonl: File too large"
    with pytest.raises(OutputError, match=said), small_files(100), disk_errors(), Recorder(log) as recorder:
        recorder.record(episode(0, 0, 0.5))


def test_an_error_that_is_no_full_disk_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), disk_errors():
        tmp_path.write_text("")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "content").write_text("old")
    with pytest.raises(OutputError, match="cannot write"), replacing(tmp_path / "folder") as part:
        _fill_the_disk(part)
    assert (tmp_path / "folder" / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def _fill_the_disk(folder: Path) -> None:
    folder.mkdir()
    (folder / "content").write_text("new")
    raise OSError(28, "No space left on device")


# --- damage of every kind, to every kind of file ----------------------------------------------------------------------


def _file(name: str, content: str) -> Callable[[Path], Path]:
    """What writes this file into a folder."""

    def write(folder: Path) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    return write


def _episodes(folder: Path) -> Path:
    with Recorder(folder / "episodes.jsonl") as recorder:
        for index in range(3):
            recorder.record(episode(index, 0, 0.5, action=np.linspace(-1, 1, 6) / (index + 1)))
    return folder / "episodes.jsonl"


def _session(folder: Path) -> Path:
    RunFolder(folder).note(RunRecord("0" * 32, "float32"))
    return folder / "run.json"


def _latency(folder: Path) -> Path:
    (folder / "latency.json").write_text(to_json(made_up_table(tiny_model("llama"))))
    return folder / "latency.json"


def _part(folder: Path) -> Path:
    checkpoint = Checkpoint(folder / "c", {"rank": 8})
    checkpoint.claim()
    checkpoint.save("lora", {"a": torch.arange(4.0)}, FACTS)
    return folder / "c" / "lora.safetensors"


def _identity(folder: Path) -> Path:
    return _part(folder).with_name("identity.json")


def _model(folder: Path) -> Path:
    tiny_model("llama").config.save_pretrained(folder)
    return folder / "config.json"


def _digests(folder: Path) -> Path:
    return write_folder_once(folder / "asset", lambda content: write_text(content / "a", "a")) / "sha256.json"


def _outbox(folder: Path) -> Path:
    box = Outbox(folder, "0" * 32)
    for step in range(2):
        box.add({"write": "metrics", "points": [["loss", 2.5, step, 0]]})
    return box.path


POLICY = {
    "agent": "reinforce",
    "state": {"weights": [[0.5, -0.25]], "log_spread": -1.5},
    "sublayers": ["layer 0 mlp"],
}
PREPARED = PreparedRecord("key", {"model": "tiny"}, (0.5, 0.25), (1.0, 2.0), (False, True), (8, 8))
ALLOCATION = '{"kept": [1, 2], "sparsity": 0.25, "origin": "episode 3", "episodes": 4}'
CELL = min(EXPERIMENTS.glob("bench/results/**/*.json"))
BENCH = EXPERIMENTS / "bench" / "final-20.toml"
INDEX = '{"metadata": {}, "weight_map": {"a": "b.safetensors"}}'

KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "episodes": (_episodes, read_log),
    "policy": (_file("policy.json", json.dumps(POLICY)), lambda path: read_policy(path, CONFIG.agent.name)),
    "session": (_session, lambda path: read_record(path.parent)),
    "bench cell": (_file("cell.json", CELL.read_text()), CELL_RESULT.read),
    "latency table": (_latency, read_table),
    "checkpoint": (_part, lambda path: Checkpoint(path.parent, {}).load("lora", LoraCurve)),
    "identity": (_identity, lambda path: Checkpoint(path.parent, {"rank": 8}).claim()),
    "configuration": (_file("config.toml", to_toml(CONFIG)), load_config),
    "model": (_model, MODEL_CONFIG.read),
    "index": (_file("model.safetensors.index.json", INDEX), lambda path: weight_files(path.parent)),
    "table of a run": (
        lambda folder: write_run(folder, "one") / "losses.json",
        lambda path: read_run_table(path.parent).layout().as_dicts(),
    ),
    "front of a run": (write_front, lambda path: front.layout() if (front := read_front(path.parent)) else None),
    "result of a run": (_file("allocation.json", ALLOCATION), RESULT.read),
    "bench file": (_file("bench.toml", BENCH.read_text()), read_bench),
    "prepared model": (_file("record.json", json.dumps(asdict(PREPARED))), PREPARED_RECORD.read),
    "digests": (_digests, DIGESTS.read),
    "record of the dense model": (
        _file(FILE, json.dumps(asdict(Origin("models/mine", "main", "/models/mine", {"calibrated": ("a", "b")})))),
        lambda path: recorded_dense_model(path.parent),
    ),
    "records for MLflow": (_outbox, lambda path: Outbox(path, "").forward(lambda record: None)),
}
FOREIGN = [
    b"null",
    b'"x"',
    b"-1",
    b"1e999",
    b"NaN",
    b"[]",
    b"{}",
    b"true",
    b"1" + b"0" * 400,
    b"[" * 3000 + b"]" * 3000,
]
VALUE = re.compile(rb'-?\d+(?:\.\d+)?|"[^"\n]*"')


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut short, one bit flipped, or something else in the place of a value (or of a key)."""
    kind = draw(st.sampled_from(["cut", "flip", "value"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    bit, foreign = draw(st.integers(0, 7)), draw(st.sampled_from(FOREIGN))

    def damage(content: bytes) -> bytes:
        at = int(where * len(content))
        if kind == "cut":
            return content[:at]
        if kind == "flip":
            return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        values = list(VALUE.finditer(content))
        value = values[int(where * len(values))]
        return content[: value.start()] + foreign + content[value.end() :]

    return damage


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_an_error_or_still_valid(kind: str, tmp_path: Path) -> None:
    make, read = KINDS[kind]
    path = make(tmp_path)
    whole = path.read_bytes()
    read(path)

    @settings(max_examples=80)
    @given(damages())
    def check(damage: Callable[[bytes], bytes]) -> None:
        path.write_bytes(damage(whole))
        with suppress(FFGymError):
            read(path)

    check()


def test_losses_of_a_log_that_were_altered_are_found(tmp_path: Path) -> None:
    path = _episodes(tmp_path)
    whole = path.read_bytes()
    for line, losses in enumerate(re.finditer(rb'"loss": 1\.0', whole), start=1):
        path.write_bytes(whole[: losses.start()] + b'"loss": 1.5' + whole[losses.end() :])
        with pytest.raises(DataError, match=f"line {line} is no episode, .*changed after it was written"):
            read_log(path)
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(DataError, match="line 2 "):
        read_log(path)


@pytest.mark.parametrize("facts", [{}, {**FACTS, "train": "x"}, {**FACTS, "held_out": [[0]]}, []])
def test_a_checkpoint_with_other_facts_is_damaged(facts: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save("lora", {}, facts)
    if facts == {}:
        assert checkpoint.load("lora", LoraCurve) is not None  # all have defaults
        return
    with pytest.raises(RecoveryError, match=r"lora\.safetensors is no checkpoint, or a damaged one"):
        checkpoint.load("lora", LoraCurve)
