"""The documentation says everything that can be named, its links resolve, and its examples run.

The reference in docs/configuration.md is written from the code. After a change of a key, a default or a description:

    python tests/test_docs.py
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from mlflow_store import new_store
from pydantic import BaseModel
from rich.console import Console

import ffgym
from ffgym.cli import app
from ffgym.config.tables import PluginTable, RunConfig, table_model
from ffgym.config.toml import to_toml
from ffgym.data.examples import PROMPTS
from ffgym.data.task_data import TASKS
from ffgym.errors import ModelError
from ffgym.models.families import family_of_type
from ffgym.models.loading import load
from ffgym.plugins import built_ins, discovery, kinds, manager
from ffgym.plugins.bases import MEASUREMENTS, STATISTICS, BatchAgent, Plugin, Reward
from ffgym.plugins.kinds import KINDS
from ffgym.testing import conformance
from ffgym.testing.conformance import (
    AgentConformance,
    CriterionConformance,
    FamilyConformance,
    HeuristicConformance,
    PluginConformance,
    ResourceConformance,
    RewardConformance,
)

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("plugins/*/README.md")])
REFERENCE = DOCS / "configuration.md"
BEGIN, END = "<!-- reference:begin -->\n", "<!-- reference:end -->\n"
BASES = {name: kinds.imported(kind.base) for name, kind in KINDS.items()}
PLURALS = {name: kind.plural for name, kind in KINDS.items()}
BUILTINS = [(kind, name) for kind, table in built_ins.BUILTINS.items() for name in table]


# --- the reference, written from the code -----------------------------------------------------------------------------


def reference() -> str:
    """The part of docs/configuration.md between its markers."""
    fields = RunConfig.model_fields
    parts = ["## Every key", "### Before the first table", keys(RunConfig, only=["seed"])]
    for table, field in fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            parts += [f"### `[{table}]`", first_line(model), keys(model)]
    parts.append("## Every built-in plugin, and its options")
    for kind, row in KINDS.items():
        has_options = row.table and issubclass(table_model(row.table), PluginTable)
        where = f": options in `[{row.table}]`" if has_options else f": named by `{row.table}.{row.key}`"
        parts += [f"### {row.plural.capitalize()}{where if row.table else ''}", options(kind, quiet=not row.table)]
    return "\n\n".join(parts) + "\n"


def keys(model: type[BaseModel], only: list[str] | None = None) -> str:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, field in model.model_fields.items():
        if only is None or key in only:
            default = literal(field.get_default(call_default_factory=True))
            rows.append(f"| `{key}` | `{default}` | {cell(field.description or '')} |")
    return "\n".join(rows)


def options(kind: kinds.PluginKind, *, quiet: bool) -> str:
    parts = []
    for name, built_in in built_ins.BUILTINS[kind].items():
        config = manager.get_class(kind, name).Config
        line = f"**`{name}`**: {built_in.description}."
        parts.append(f"{line}\n\n{keys(config)}" if config.model_fields else line if quiet else f"{line} No options.")
    return "\n\n".join(parts)


def literal(value: Any) -> str:
    """As TOML would say it; an empty string stands for "not given"."""
    return json.dumps("" if value is None else value)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def test_reference_is_what_the_code_says() -> None:
    written = REFERENCE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written == reference(), "docs/configuration.md is behind the code: run `python tests/test_docs.py`"


def test_every_option_has_a_meaning() -> None:
    silent = [line for line in reference().splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not silent, "give the field a description"


# --- everything that can be named is documented -----------------------------------------------------------------------


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands() -> list[Any]:
    return list(typer.main.get_command(app).commands.values())


def undocumented(page: str, names: Iterable[str], form: str = "`{}`", *, section: str = "") -> list[str]:
    """The names that a page, or its section with this heading, does not hold in this form, a regular expression."""
    passage = text(page)
    if section:
        level = section.partition(" ")[0]
        passage = passage.partition(f"{section}\n")[2].partition(f"\n{level} ")[0]
    return [name for name in names if not re.search(form.format(re.escape(name)), passage)]


def test_all_names_are_documented() -> None:
    from ffgym.bench.file import BenchFile
    from ffgym.bench.table import CellResult, Final, Mark
    from ffgym.measure.serving import Served
    from ffgym.pipeline.folder import WRITTEN

    page = "docs/configuration.md"
    assert undocumented(page, [command.name for command in commands()], "`ffgym {}") == []
    flags = {name for command in commands() for option in command.params for name in option.opts if name[0] == "-"}
    assert undocumented(page, sorted(flags), r"`[^`\n]*{}\b") == []
    variables = ("FFGYM_LOAD_PLUGINS", "FFGYM_CACHE", "FFGYM_CACHE_SIZE", "MLFLOW_TRACKING_URI", "PIP_INDEX_URL")
    assert undocumented(page, variables) == []
    assert undocumented(page, WRITTEN, "`{}/?`") == []

    page = "docs/plugins.md"
    assert undocumented(page, kinds.HOOKS) == []
    assert undocumented(page, sorted(STATISTICS)) == []
    assert undocumented(page, sorted(MEASUREMENTS), r"\| `{}` \|") == []
    assert undocumented(page, (*Reward.__annotations__, "objectives"), "`{}", section="### Reward") == []
    tests = [name for name in dir(conformance) if name.endswith("Conformance") and name != "PluginConformance"]
    assert undocumented(page, tests) == []

    keys_of_json = [*Served.__annotations__, "answer_tokens", "notes"]
    assert undocumented("docs/measure.md", keys_of_json, section="## Measure where it is served") == []
    assert undocumented("docs/choices.md", PROMPTS, section="## Rewards beyond perplexity") == []
    assert undocumented("docs/evaluation.md", [task for task in TASKS if not task.startswith("mmlu_")]) == []
    for model in (BenchFile, CellResult, Final, Mark):
        assert undocumented("docs/bench.md", model.model_fields) == [], model.__name__
    folders = [path.name for path in (ROOT / "experiments").iterdir() if path.is_dir()]
    assert undocumented("docs/experiments.md", folders, "`experiments/{}/`") == []
    targets = re.search(r"^\.PHONY: (.*)$", text("Makefile"), flags=re.MULTILINE)
    assert targets is not None
    assert undocumented("CONTRIBUTING.md", targets[1].split(), "`make {}`") == []


@pytest.mark.parametrize("base", [*BASES.values(), BatchAgent], ids=lambda base: base.__name__)
def test_contract_is_documented(base: type[Plugin]) -> None:
    page = text("docs/plugins.md")
    assert f"`ffgym.{base.__name__}`" in page
    for method in getattr(base, "__abstractmethods__", ()) or ("unit_price", "measure") * (base.kind == "resource"):
        assert re.search(rf"\b{method}\(|def {method}\b", page), f"{base.__name__}.{method} is not in docs/plugins.md"


def test_the_house_is_drawn_as_the_imports_are_held() -> None:
    """The rows of the drawing in docs/design.md are the layers that import-linter checks, and all rooms are there."""
    house = (DOCS / "design.md").read_text().partition("## The house")[2]
    drawing = re.search(r"```\n(.*?)```", house, re.DOTALL)
    assert drawing is not None
    drawn = [re.split(r"\s+", re.split(r"\s{3,}", line.strip())[0]) for line in drawing[1].splitlines()]
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [set(row) for row in drawn] == [set(re.split(r" [:|] ", layer)) for layer in layers]
    rooms = {path.parent.name for path in (ROOT / "ffgym").glob("*/__init__.py")}
    beside = {path.stem for path in (ROOT / "ffgym").glob("*.py")} - {"__init__", "__main__", "version"}
    assert {name for row in drawn for name in row} == rooms | beside
    flow = re.search(r"Data flows .*?```\n(.*?)```", house, re.DOTALL)
    assert flow is not None
    named = [re.findall(r"[a-z]{2,}", line) for line in flow[1].splitlines() if "->" not in line]
    assert {name for line in named for name in line} <= rooms, "the data flow names a room that is not there"


# --- links ------------------------------------------------------------------------------------------------------------


def links(page: Path) -> Iterator[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`[^`\n]*`(?!\])", "", prose)
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", prose):
        if not target.startswith(("http://", "https://")):
            yield target


def anchors(page: Path) -> set[str]:
    """GitHub's names for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolves(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def test_links_resolve() -> None:
    found = [(page, link) for page in PAGES for link in links(page)]
    assert len(found) > 100
    assert [f"{page.name}: {link}" for page, link in found if not resolves(page, link)] == []


def test_extras_are_installed_from_the_clone() -> None:
    """No index has ffgym, so pip finds `ffgym[ray]` only where ffgym is installed, as it is when messages say it."""
    assert [page.name for page in PAGES if re.search(r"(?<!/)\bffgym\[", page.read_text(encoding="utf-8"))] == []


def test_every_page_is_in_the_navigation() -> None:
    pages = [page.name for page in PAGES if page.parent in (DOCS, ROOT) and page.name != "README.md"]
    assert [name for name in pages if f": {name}\n" not in text("mkdocs.yml")] == []


def test_figures_of_the_results_are_in_their_tables() -> None:
    """A figure with an error in a table of docs/experiments.md was copied from a table that a command wrote."""
    written = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("experiments/*/*.md"))
    rows = "\n".join(re.findall(r"^\|.*\|$", text("docs/experiments.md"), flags=re.MULTILINE))
    figures = re.findall(r"[-+]?[\d.]+ ± [\d.]+", rows)
    assert len(figures) > 50
    assert [figure for figure in figures if figure not in written] == []


def test_readme_shows_a_real_run() -> None:
    table = text("README.md").partition("<!-- table:begin -->")[2].partition("<!-- table:end -->")[0]
    assert "dense" in table, "put report.md of a real run between the markers"
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text("README.md"))
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file(), f"{picture} is missing"


def test_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 150


# --- examples ---------------------------------------------------------------------------------------------------------


def example(page: str, kind: str, called: str = "") -> type[Any]:
    """The first class of a kind, or that of a name, in a page's Python examples, checked as a package's would be."""
    base = BASES[kind]  # type: ignore[index]
    for block in re.findall(r"^```python\n(.*?)^```", text(page), flags=re.MULTILINE | re.DOTALL):
        for name, parent in re.findall(r"^class (\w+)\(ffgym\.(\w+)\)", block, flags=re.MULTILINE):
            if issubclass(getattr(ffgym, parent), base) and called in ("", name):
                # The name finds the class's package again where a message names it.
                namespace: dict[str, Any] = {"__name__": "documentation", "ffgym": ffgym}
                exec(compile(block, page, "exec"), namespace)
                cls: type[Any] = namespace[name]
                discovery.check_class(kind, cls)  # type: ignore[arg-type]
                if hook := namespace.get(f"ffgym_{PLURALS[kind]}"):  # type: ignore[index]
                    assert hook() == [cls]
                return cls
    raise AssertionError(f"{page} has no example of a {kind}")


def held_to_its_contract(
    suite: type[PluginConformance], kind: str, page: str = "docs/plugins.md", called: str = ""
) -> type[Any]:
    """The conformance tests of a page's example."""
    return type("Example", (suite,), {"make": lambda self: example(page, kind, called)()})


TestTutorialCriterion = held_to_its_contract(CriterionConformance, "criterion")
TestTutorialHeuristic = held_to_its_contract(HeuristicConformance, "heuristic")
TestTutorialReward = held_to_its_contract(RewardConformance, "reward")
TestTutorialAgent = held_to_its_contract(AgentConformance, "agent")
TestTutorialResource = held_to_its_contract(ResourceConformance, "resource")
TestTutorialMeasurement = held_to_its_contract(ResourceConformance, "resource", called="Reading")
TestReadmeCriterion = held_to_its_contract(CriterionConformance, "criterion", "README.md")


@pytest.mark.parametrize("kind", ["calibration", "corpus", "metric", "export", "recovery"])
def test_plugin_conformance_is_for_every_kind(kind: str) -> None:
    suite = held_to_its_contract(PluginConformance, kind)()
    for test in (name for name in dir(suite) if name.startswith("test_")):
        getattr(suite, test)()


class TestTutorialFamily(FamilyConformance):
    """A reader's package, which is the tutorial's first example, keeps the promises that its second one names."""

    source, conformance = re.findall(
        r"^```python\n(.*?)^```", text("docs/models.md").partition("## Adding a family")[2], re.MULTILINE | re.DOTALL
    )
    family = "starcoder2"

    @pytest.fixture(autouse=True)
    def installed(self, install: Callable[..., None]) -> None:
        with pytest.raises(ModelError, match="architecture 'starcoder2' is not supported"):
            family_of_type("starcoder2")
        install("ffgym-starcoder2", self.source)

    def test_is_the_test_of_the_page(self) -> None:
        namespace: dict[str, Any] = {}
        exec(self.conformance, namespace)
        assert namespace["TestStarcoder2"].family == self.family


def test_the_text_model_of_a_vision_language_checkpoint_is_saved_as_the_docs_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word_tokenizer: Any
) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    monkeypatch.chdir(tmp_path)
    words = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sights = {**words, "image_size": 28, "patch_size": 14}
    language = {**words, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 128}
    whole = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=language, vision_config=sights, mm_tokens_per_image=4, image_token_index=127)
    )
    whole.eval().save_pretrained("vlm")
    word_tokenizer.save_pretrained("vlm")
    passage = text("docs/models.md").partition("## Vision-language checkpoints")[2].partition("\n## ")[0]
    *_, program = re.findall(r"^```python\n(.*?)^```", passage, flags=re.MULTILINE | re.DOTALL)
    exec(program.replace("google/gemma-3-4b-it", "vlm"), {})
    saved = load("gemma-3-4b-text", dtype="float32", device="cpu").model
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, whole(input_ids=ids).logits)
    assert [sublayer.units for sublayer in family_of_type("gemma3_text").sublayers(saved)] == [1, 8]


def test_tutorial_calibration_keeps_the_mean_output() -> None:
    from ffgym.prepare.calibrations import Consumer
    from ffgym.prepare.refits import path_of
    from ffgym.pruning.calibration import NestedRidge

    weight, mean = torch.randn(3, 8), torch.randn(8)
    refit = NestedRidge(weight, torch.eye(8), 0.1)
    path = path_of(
        example("docs/plugins.md", "calibration")(), Consumer(weight, None, mean, torch.eye(8), 0.1, refit), ""
    )
    torch.testing.assert_close(path.weight_at(5) @ mean[:5] + path.bias_at(5), weight @ mean)


def test_tutorial_corpus_has_text_for_every_role() -> None:
    source = example("docs/plugins.md", "corpus")()
    (search, texts), (report, others) = source.read(None, "search"), source.read(None, "report")
    assert (search, report) == ("2024", "2025")
    assert set(texts).isdisjoint(others)


def test_tutorial_metric_scores_a_model(word_tokenizer: Any) -> None:
    from ffgym.testing.models import tiny_model

    scores = example("docs/plugins.md", "metric")().scores(
        tiny_model("llama"), word_tokenizer, limit=2, on_progress=lambda done, total: None
    )
    assert len(scores) == 2
    assert all(0 <= score < 1 for score in scores)


def test_tutorial_export_format_writes_a_file(tmp_path: Path) -> None:
    from ffgym.testing.models import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "model")
    target, form = tmp_path / "weights", example("docs/plugins.md", "export")()
    written = form.write(tmp_path / "model", target, overwrite=False, progress=lambda done, total: None)
    assert (written.path, written.bytes) == (target, target.stat().st_size)


def test_tutorial_training_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    from ffgym.recover.checkpoint import Checkpoint

    (block,) = re.findall(r"^```python\n(saved = .*?)^```", text("docs/plugins.md"), flags=re.MULTILINE | re.DOTALL)
    setup, done = SimpleNamespace(checkpoint=Checkpoint(tmp_path / "parts", {})), list[int]()
    setup.checkpoint.claim()

    def train_step(weight: torch.Tensor, step: int) -> None:
        if step == 2 and step not in done:
            done.append(step)
            raise KeyboardInterrupt
        done.append(step)
        weight += 1

    with pytest.raises(KeyboardInterrupt):
        exec(block, {"setup": setup, "train_step": train_step, "steps": 4, "weight": torch.zeros(2)})
    exec(block, {"setup": setup, "train_step": train_step, "steps": 4, "weight": (weight := torch.zeros(2))})
    assert (done, weight.tolist()) == ([0, 1, 2, 2, 3], [4, 4])


def test_tutorial_recovery_trains(random_windows: Any) -> None:
    from ffgym.evaluation.perplexity import evaluate
    from ffgym.report.progress import Reporter
    from ffgym.testing.models import tiny_model

    model, windows = tiny_model("llama").requires_grad_(False), random_windows(8)
    setup = ffgym.TrainingSetup(
        model=model, dense=None, windows=windows, held_out=windows, held_out_loss=lambda: evaluate(model, windows).loss,
        tokens=256, batch_tokens=32, learning_rate=1e-2, evaluate_every=1, seed=0, tokens_per_pass=1024,
        progress=lambda steps: Reporter(Console(quiet=True)).stage("training", steps), log=lambda _: None,
    )  # fmt: skip
    before = setup.held_out_loss()
    example("docs/plugins.md", "recovery")().train(setup)
    assert setup.held_out_loss() < before


def test_readme_plugin_fits_ten_lines() -> None:
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text("README.md"), flags=re.DOTALL) if "hookimpl" in b)
    assert sum(1 for line in block.splitlines() if line.strip()) <= 10


@pytest.fixture
def program(tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs all Python blocks of a page or passage, on the model and text of ``tiny_run``; the variables they leave."""
    monkeypatch.chdir(tmp_path)
    new_store(tmp_path / "mlruns")

    def run(page: str, passage: str | None = None) -> dict[str, Any]:
        found = re.findall(r"^```python\n(.*?)^```", passage or text(page), flags=re.MULTILINE | re.DOTALL)
        source = "\n".join(found).replace('prune={"sparsity": 0.3}', 'prune={"sparsity": 0.3}, **tiny_run')
        namespace: dict[str, Any] = {"__name__": "documentation", "tiny_run": tiny_run}
        exec(compile(source, page, "exec"), namespace)
        return namespace

    return run


def test_python_examples_run(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("docs/python.md")["result"].saved.path.is_dir()
    assert "reinforce" in capsys.readouterr().out


def test_environment_recipes_run(program: Any, tmp_path: Path) -> None:
    left = program("docs/environments.md")
    assert len(left["study"].trials) == 8
    assert left["log_std"].grad is not None
    assert (tmp_path / "my-pruned-model" / "model.safetensors").is_file()


def test_readme_python_examples_run(program: Any) -> None:
    left = program("README.md", text("README.md").partition("From Python")[2].partition("\n## ")[0])
    assert left["result"].saved.path.is_dir()
    assert left["info"]["sparsity"] >= 0.3


def blocks(page: str) -> list[tuple[str, str]]:
    """The examples of a page in order: (language, text)."""
    return re.findall(r"^```(python|console)\n(.*?)^```", text(page), flags=re.MULTILINE | re.DOTALL)


def typed(block: str) -> Iterator[list[str]]:
    """The arguments of every ``ffgym`` command in an example of a shell."""
    for line in re.findall(r"^\$ ffgym ([^>|\n]*)", block, flags=re.MULTILINE):
        yield shlex.split(line, comments=True)


def test_commands_in_the_docs_exist_with_their_options() -> None:
    examples = [example for page in PAGES for example in blocks(str(page.relative_to(ROOT)))]
    commands = [arguments for language, block in examples if language == "console" for arguments in typed(block)]
    assert len(commands) > 50
    for arguments in commands:
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(command.name, arguments)


@pytest.fixture(scope="module")
def tutorial(tiny_run, tmp_path_factory) -> Path:
    """The folder of somebody who has done the tutorial, and whose first run has the names of other pages as well.

    Left out are the installation, `ffgym ui`, which waits, and `ffgym measure`, which takes its time.
    """
    folder: Path = tmp_path_factory.mktemp("tutorial")
    new_store(folder / "mlruns")
    with contextlib.chdir(folder), (folder / "printed").open("w", encoding="utf-8") as printed:
        Path("run.toml").write_text(to_toml(RunConfig.model_validate(tiny_run)), encoding="utf-8")
        for language, block in blocks("docs/tutorial.md"):
            if language == "python":
                program = compile(block.replace("Once upon a time", "w1 w2"), "docs/tutorial.md", "exec")
                with contextlib.redirect_stdout(printed):
                    exec(program, {"__name__": "documentation"})
                continue
            for command, *options in typed(block):
                if command in ("run", "compare"):
                    config = ["--config", "run.toml"] * (command == "run")
                    app([command, *options, *config], standalone_mode=False)
        for name in ("mine", "my-run"):
            Path("runs", name).symlink_to("first")
    return folder


def test_tutorial_runs(tutorial: Path) -> None:
    assert (tutorial / "printed").read_text(encoding="utf-8").startswith("w1 w2 w")
    assert (tutorial / "runs" / "second" / "report.md").is_file()
    assert (tutorial / "comparison").is_dir()


@pytest.mark.parametrize("page", ["README.md", "docs/models.md", "docs/recovery.md"])
def test_pruned_models_load_as_the_docs_say(page: str, tutorial: Path, monkeypatch) -> None:
    """Each example that loads a run's model; reading GGUF files has a test of its own in tests/export."""
    monkeypatch.chdir(tutorial)
    examples = [block for language, block in blocks(page) if language == "python" and "from_pretrained" in block]
    examples = [block for block in examples if "ImageTextToText" not in block]
    assert examples
    for example in examples:
        exec(compile(example, page, "exec"), {"__name__": "documentation"})


def test_toml_examples_are_configurations() -> None:
    from ffgym.bench.file import BenchFile

    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *DOCS.glob("*.md")))
    examples = re.findall(r"^```toml\n(.*?)^```", pages, flags=re.MULTILINE | re.DOTALL)
    assert len(examples) > 4
    for example in examples:
        content = tomllib.loads(example)
        (BenchFile if "agents" in content else RunConfig).model_validate(content)


def test_the_variants_of_the_bench_example_search_in_different_ways(tmp_path: Path) -> None:
    """No two cells of a seed differ only in options that nothing reads where slopes are followed."""
    from ffgym.bench.file import read_bench

    (spec,) = re.findall(r"^```toml\n(title = .*?)^```", text("docs/bench.md"), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "bench.toml").write_text(spec, encoding="utf-8")
    agents = [cell.config.agent.model_dump() for cell in read_bench(tmp_path / "bench.toml").cells if cell.seed == 0]
    for agent in agents:
        if agent.get("slopes"):
            for option in ("learning_rate", "spread", "smooth"):
                del agent[option]
    assert [agent for agent in agents if agents.count(agent) > 1] == []


if __name__ == "__main__":
    before, begin, rest = REFERENCE.read_text(encoding="utf-8").partition(BEGIN)
    REFERENCE.write_text(before + begin + reference() + END + rest.partition(END)[2], encoding="utf-8")
