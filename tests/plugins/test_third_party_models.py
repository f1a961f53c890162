"""Another package's family and export format: found, used, saved and read again without a change to ffgym."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_family import FAMILY
from processes import fresh
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ffgym
from ffgym.cli import app
from ffgym.errors import ModelError, PluginError
from ffgym.export.checkpoint import save_pruned
from ffgym.export.format import export
from ffgym.models.cut import PrunableModel
from ffgym.models.families import family_of, family_of_type
from ffgym.models.loading import load
from ffgym.pipeline.make_env import make_pruning_env
from ffgym.plugins import manager
from ffgym.prepare.parts import load_parts
from ffgym.testing.conformance import FamilyConformance
from ffgym.testing.models import tiny_model

Install = Callable[..., None]

FORMAT = """
import ffgym

class Sizes(ffgym.ExportFormat):
    '''A text file of names.'''

    name = "names"

    class Config(ffgym.PluginConfig):
        separator: str = ","

    def write(self, folder, target, *, overwrite, progress):
        progress(1, 1)
        target.write_text(self.config.separator.join(sorted(path.name for path in folder.iterdir())))
        return {answer}

@ffgym.hookimpl
def ffgym_exports():
    return [Sizes]
"""
EXPORTED = "ffgym.Exported(target, target.stat().st_size, parameters=0, architecture='text', dtype='none')"
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(7))
EMPTIED = (1, 17, 0, 48, 2, 0)
# In a process that has neither ffgym nor the family's package.
CHECK = """
import sys
sys.modules["ffgym"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    expected = load_file(f"{folder}/expected")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder
print(len(sys.argv) - 1)
"""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.fixture
def starcoder(install: Install) -> None:
    install("acme-family", FAMILY.format(name="starcoder2"))


@pytest.mark.usefixtures("starcoder")
class TestFamily:
    def test_is_listed_and_recognised(self) -> None:
        assert manager.names("family")["starcoder2"] == "Grouped-query attention and an MLP of two linears."
        family = family_of(tiny_model("starcoder2"))
        assert isinstance(family, ffgym.Family)
        assert [s.units for s in family.sublayers(tiny_model("starcoder2"))] == [2, 48] * 3

    def test_is_saved_and_loads_again_with_ffgym_and_without(self, tmp_path: Path, word_tokenizer: Any) -> None:
        for name, kept in (("uneven", EMPTIED), ("stock", (1, 17) * 3)):
            prunable, folder = PrunableModel(tiny_model("starcoder2")), tmp_path / "models" / name
            prunable.cut(kept)
            save_pruned(prunable, word_tokenizer, folder, stock=name == "stock")
            loaded, expected = load(str(folder), dtype="float32", device="cpu").model, logits(prunable.model)
            assert torch.equal(logits(loaded), expected)
            loaded.save_pretrained(f"{folder}-again")
            for place in (folder, Path(f"{folder}-again")):
                save_file({"ids": IDS, "logits": expected}, place / "expected")
        assert fresh(CHECK, *(tmp_path / "models").iterdir(), hub=tmp_path / "hub") == 4

    def test_runs(self, tiny_run: dict[str, Any], tmp_path: Path, word_tokenizer: Any) -> None:
        tiny_model("starcoder2").save_pretrained(tmp_path / "model")
        word_tokenizer.save_pretrained(tmp_path / "model")
        ffgym.run(
            ffgym.RunConfig.model_validate(
                {
                    **tiny_run,
                    "model": {**tiny_run["model"], "name": str(tmp_path / "model")},
                    "search": {**tiny_run["search"], "episodes": 8},
                    "output": {"dir": str(tmp_path / "run")},
                    "tracking": {"enabled": False},
                }
            )
        )
        saved = load(str(tmp_path / "run" / "model"), dtype="float32", device="cpu")
        assert saved.model.config.model_type == "ffgym_starcoder2"

    def test_is_checked_and_leaves_the_model_as_it_was(
        self, tiny_run: dict[str, Any], tmp_path: Path, word_tokenizer: Any
    ) -> None:
        tiny_model("starcoder2").save_pretrained(tmp_path / "model")
        word_tokenizer.save_pretrained(tmp_path / "model")
        table = {**tiny_run["model"], "name": str(tmp_path / "model")}
        loaded, _ = load_parts(ffgym.RunConfig.model_validate({**tiny_run, "model": table}))
        expected = tiny_model("starcoder2").state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in loaded.model.state_dict().items())

    def test_an_architecture_of_llama_cpp_that_is_none_is_named(self, tmp_path: Path, word_tokenizer: Any) -> None:
        tiny_model("starcoder2").save_pretrained(tmp_path / "m")
        word_tokenizer.save_pretrained(tmp_path / "m")
        with pytest.raises(ffgym.FFGymError, match="'starcoder'"):
            export(tmp_path / "m", tmp_path / "m.gguf", name="gguf")


SHORT = """
import ffgym

class Short(ffgym.Family):
    name = {name!r}
    {names}

@ffgym.hookimpl
def ffgym_families():
    return [Short]
"""
UNFIT = {
    "hyperclovax": (  # multiplies by what Granite divides by
        'tiny = {"logits_scaling": 2.0}',
        "a HyperCLOVAXForCausalLM changes the output of its head",
        "cannot prune this architecture",
    ),
    "persimmon": (  # its fused linear holds the query, key and value of one head after those of another
        """query = key = value = "self_attn.query_key_value"
    attention_consumer, kv_heads = "self_attn.dense", None
    mlp_producers, mlp_consumer = ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h" """,
        "computes something else once its units are sorted",
        "head by head",
    ),
    "stablelm": ("", "with one unit less in every sublayer does not run: shape", "head_count_attributes"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_family_that_does_not_fit_its_architecture_is_refused_before_anything_is_searched(
    install: Install, tiny_run: dict[str, Any], tmp_path: Path, word_tokenizer: Any, name: str
) -> None:
    """Before, the first two gave wrong numbers without a word, and the third a traceback."""
    names, said, hint = UNFIT[name]
    install("acme-family", SHORT.format(name=name, names=names))
    tiny_model(name).save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    tables = {**tiny_run, "model": {**tiny_run["model"], "name": str(tmp_path / "model")}}
    with pytest.raises(PluginError, match=rf"family '{name}' \(package acme-family 1\.0\): .*{said}") as caught:
        make_pruning_env(tables)
    assert hint in str(caught.value.hint)


def test_the_conformance_test_says_what_a_run_says(install: Install) -> None:
    install("acme-family", SHORT.format(name="stablelm", names=""))
    suite = type("Suite", (FamilyConformance,), {"family": "stablelm"})()
    with pytest.raises(PluginError, match="with one unit less in every sublayer does not run"):
        suite.test_runs_with_a_unit_less()


def test_a_fused_linear_that_is_named_once_is_to_be_named_twice() -> None:
    class Once(ffgym.Family):
        name = "glm4"
        mlp_producers = ("mlp.gate_up_proj",)

    with pytest.raises(ModelError, match="names a producer with 96 outputs") as caught:
        Once().sublayers(tiny_model("glm4"))
    assert "mlp_producers = ('mlp.gate_up_proj', 'mlp.gate_up_proj')" in str(caught.value.hint)


PATH = """
import ffgym

class Path(ffgym.ConsumerPath):
    pass

@ffgym.hookimpl
def ffgym_calibrations():
    return []
"""
LISTED = """
import contextlib, io, json, os, sys
sys.path.insert(0, sys.argv[1])
from ffgym.plugins import discovery, manager
discovery.SLOW_SECONDS = 0.01
has_torch = []
with contextlib.redirect_stderr(io.StringIO()) as said:
    for package in sys.argv[2:]:
        os.environ[discovery.ENVIRONMENT_VARIABLE] = f"{package}-entry"
        manager.names("criterion")
        has_torch.append("torch" in sys.modules)
print(json.dumps([has_torch, said.getvalue()]))
"""


def test_base_classes_import_nothing_heavy_or_nobody_is_blamed(install: Install, tmp_path: Path) -> None:
    """That of an export format needs neither torch nor transformers; those of a path and of a family do."""
    packages = {"acme-format": FORMAT.format(answer="None"), "acme-path": PATH}
    packages["acme-family"] = FAMILY.format(name="starcoder2")
    for package, source in packages.items():
        install(package, source)
    has_torch, said = fresh(LISTED, tmp_path, *packages, hub=tmp_path)
    assert has_torch == [False, True, True]
    assert "acme-path" not in said
    assert "acme-family" not in said


def test_a_family_that_transformers_does_not_know_stops_nobody_else(install: Install, tmp_path: Path) -> None:
    install("acme-family", FAMILY.format(name="no-such-architecture"))
    with pytest.raises(PluginError, match=r"'no-such-architecture' \(package acme-family 1\.0\)"):
        family_of_type("no-such-architecture").saved_classes()
    prunable = PrunableModel(tiny_model("llama"))
    prunable.cut(EMPTIED)
    save_pruned(prunable, None, tmp_path / "m")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(prunable.model))


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["export", *arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_export_format_is_chosen_by_name(install: Install, model: Path, tmp_path: Path) -> None:
    install("acme-format", FORMAT.format(answer=EXPORTED))
    target = tmp_path / "names.txt"
    done = call(str(model), "--format", "names", "--output", str(target), "--set", "separator=|", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["path"] == str(target)
    assert "config.json|generation_config.json" in target.read_text()
    assert "names" in CliRunner().invoke(app, ["ls", "exports"]).stdout


def test_what_comes_before_the_first_tensor_says_nothing_of_how_long_the_others_take(
    install: Install, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    slow = """import time
        for seconds, done in ((40.0, 0), (56.0, 1)):
            time.monotonic = lambda: seconds
            progress(done, 4)"""
    install("acme-format", FORMAT.replace("progress(1, 1)", slow).format(answer=EXPORTED))
    done = call(str(model), "--format", "names", "--output", str(tmp_path / "names.txt"))
    assert done.stderr.splitlines() == [
        "write names.txt: 0/4 · 0:00 elapsed",
        "write names.txt: 1/4 · 0:16 elapsed · 0:48 left",
        "write names.txt: done in 0:56, 0:40 of it to start",
    ]


def test_a_format_that_leaves_what_is_there_alone_says_how_to_replace_it(
    install: Install, model: Path, tmp_path: Path
) -> None:
    write = 'target.open("wb" if overwrite else "xb").close()'
    install("acme-format", FORMAT.replace("progress(1, 1)", write).format(answer=EXPORTED))
    (tmp_path / "names.txt").touch()
    command = (str(model), "--format", "names", "--output", str(tmp_path / "names.txt"))
    done = call(*command)
    assert done.exit_code == 1
    assert "exists already" in done.stderr
    assert "--overwrite" in done.stderr
    assert call(*command, "--overwrite").exit_code == 0


def test_what_a_format_does_not_know_or_breaks_is_an_error(install: Install, model: Path, tmp_path: Path) -> None:
    install("acme-format", FORMAT.format(answer="None"))
    where = ("--output", str(tmp_path / "x"))
    for arguments, said in (
        (("--format", "names", *where), "write returned NoneType, not an Exported"),
        (("--format", "names", *where, "--dtype", "f16"), "unknown key 'dtype' in [export]"),
        (("--format", "ggfu", *where), "Did you mean 'gguf'?"),
    ):
        done = call(str(model), *arguments)
        assert (done.exit_code, done.stdout) == (1, "")
        assert said in done.stderr
    assert call(str(model), *where, "--gguf", "x.gguf").exit_code == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("ffgym.Exported(str(target), 5, 0, 'a', 'b')", "whose path is '"),
        ("ffgym.Exported(target, '5 bytes', 0, 'a', 'b')", "whose bytes is '5 bytes', not a whole number from 0"),
        ("ffgym.Exported(target, target.stat().st_size, -3, 'a', 'b')", "whose parameters is -3, not a whole number"),
        ("ffgym.Exported(target, target.stat().st_size, 3, None, 'b')", "whose architecture is None, not text"),
        ("ffgym.Exported(target, 5, 0, 'a', 'b', notes='Differs.')", "whose notes is 'Differs.', not a tuple"),
        ("ffgym.Exported(target, 5, 0, 'a', 'b', notes=[1])", "whose notes is [1], not a tuple of sentences"),
        ("ffgym.Exported(target, 1, 0, 'a', 'b')", "of 1 bytes, and names.txt has "),
        ("ffgym.Exported(target.parent / 'model', 10**9, 0, 'a', 'b')", "of 1000000000 bytes, and model has "),
        ("(target.unlink(), ffgym.Exported(target, 5, 0, 'a', 'b'))[1]", "of names.txt, which is not there"),
    ],
)
def test_what_a_format_says_it_has_written_is_looked_at(
    install: Install, model: Path, tmp_path: Path, answer: str, said: str
) -> None:
    install("acme-format", FORMAT.format(answer=answer))
    with pytest.raises(PluginError) as caught:
        export(model, tmp_path / "names.txt", name="names")
    message = caught.value.message.replace(f"{tmp_path}/", "")
    assert message.startswith("export 'names' (package acme-format 1.0): write returned an Exported ")
    assert said in message


def test_a_file_that_a_format_wants_for_itself_is_not_the_users_mistake(
    install: Install, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for name, wanted, place, said in (
        ("words", "open('/no/words.json')", "new", r"failed while .*FileNotFoundError.*acme_words\.py, line 13"),
        ("scratch", "folder.mkdir()", "file", r"failed while .*FileExistsError.*acme_scratch\.py, line 13"),
        ("shards", "open(folder / 'shard.bin')", "new", "could not be written as .*shard.bin"),
        ("below", "target.touch()", "file/new", "could not be written as .*Not a directory"),
    ):
        source = FORMAT.replace("progress(1, 1)", wanted).replace('"names"', f'"{name}"').format(answer="None")
        install(f"acme-{name}", source)
        with pytest.raises(PluginError, match=said):
            export(model, tmp_path / place, name=name, overwrite=True)


def test_a_failure_shows_its_whole_traceback_on_demand(
    install: Install, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme-format", FORMAT.format(answer="ffgym.load_config(None, [5])"))
    command = (str(model), "--format", "names", "--output", str(tmp_path / "names.txt"))
    done = call(*command)
    assert "failed while writing" in done.stderr
    assert "config/toml.py" not in done.stderr
    assert "with FFGYM_TRACEBACK=1 in the environment" in done.stderr
    monkeypatch.setenv("FFGYM_TRACEBACK", "1")
    traceback, _, message = call(*command).stderr.partition("error: export 'names' (package acme-format 1.0) failed")
    assert "config/toml.py" in traceback, "where ffgym, which the plugin called, did not know what to do"
    assert message
