"""``ffgym report``: one page that needs nothing else, about runs that are written by hand and about a bench."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_episodes import episode
from processes import PATIENCE
from stored_runs import write_front, write_run
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.errors import PluginError
from ffgym.pipeline.artifacts import write_table
from ffgym.pipeline.folder import PICTURES, RunFolder, RunRecord
from ffgym.pipeline.stored import read_table
from ffgym.report.figures import new_figure, save_figure
from ffgym.report.front import TIE
from ffgym.report.layout import STAR
from ffgym.search.log import Recorder

BENCH = Path(__file__).parents[2] / "experiments/ablation/start.toml"


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path, "one")
    for name in PICTURES:
        save_figure(new_figure(3, 2), folder / name)
    with Recorder(folder / "episodes.jsonl") as log:
        for i in range(3):
            log.record(episode(i, 0, 0.5))
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text('{"auto_map": {}}', encoding="utf-8")
    return folder


def page_of(run: Path) -> str:
    done = call(run)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(run / "report.html")
    return (run / "report.html").read_text(encoding="utf-8")


def test_the_page_says_what_was_run_what_came_of_it_how_to_load_and_how_to_repeat_it(run: Path) -> None:
    page = page_of(run)
    for part in (
        "one: demo without 20% of its prunable params, by reinforce",
        "reinforce + ridge is better than the best heuristic, uniform, by",
        "<dt>search</dt><dd>3 episodes, 192 tokens of demo:c4</dd>",
        "<td>best heuristic</td>",
        '<tr class="bold"><td class="left">reinforce + ridge</td><td>20.09',
        "how it was measured",
        "<p>reinforce + ridge: perplexity 20.09</p>",
        f"folder = &#39;{run / 'model'}&#39;",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        f"ffgym run --config {run / 'config.toml'} --output NEW",
    ):
        assert part in page
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert "not finished" not in page


def test_every_saved_model_is_named_by_its_row(run: Path) -> None:
    table = read_table(run)
    trained = replace(table.saved, label="reinforce + ridge + lora", perplexity=12.0)
    shutil.copytree(run / "model", run / "model-recovered")
    assert "<p>the same model, trained afterwards</p>" in page_of(run), "by ffgym recover: it is no row of the table"
    write_table(run, replace(table, rows=(*table.rows, trained)))
    with (run / "config.toml").open("a") as file:
        file.write('[recover]\nmethod = "lora"\ntokens = 16000\n')
    page = " ".join(page_of(run).split())
    for row, name in (("ridge: perplexity 20.09", "model"), ("ridge + lora: perplexity 12.00", "model-recovered")):
        code = f"from transformers import AutoModelForCausalLM, AutoTokenizer folder = &#39;{run / name}&#39;"
        assert f"<p>reinforce + {row}</p> <pre><code>{code}" in page
    assert "<dt>recovery</dt><dd>lora, 16,000 tokens</dd>" in page


def test_a_range_has_its_own_table_first_and_the_size_of_the_other_is_said(run: Path) -> None:
    (run / "config.toml").write_text(
        '[prune]\nsparsity = "0.1:0.35"\nfront_points = 3\n[output]\nsave_all = true\n', encoding="utf-8"
    )
    write_front(run)
    for name in ("0.10", "0.225", "0.35"):
        shutil.copytree(run / "model", run / f"model-{name}")
    page = page_of(run)
    parts = (
        '<p class="lead">At 22.5%: reinforce + ridge is better than',
        "<h2>The whole range</h2>",
        f'<td class="left">10.0%</td><td>11.02{STAR}</td><td>12.18{TIE}</td><td>90.0 M</td>',
        "<li>* lowest perplexity at that sparsity; tie",
        "<h2>The table at 22.5%</h2>",
        f'alt="{PICTURES["front.png"]}"',
        f'alt="{PICTURES["reward.png"]}"',
        "<p>At 10%, reinforce + ridge: perplexity 11.02</p>",
        f"{run / 'model-0.10'}&#39;",
        "<p>At 22.5%, reinforce + ridge: perplexity 20.09</p>",
        f"{run / 'model-0.225'}&#39;",
        "<p>At 35%, reinforce + ridge: perplexity 33.12</p>",
        f"{run / 'model-0.35'}&#39;",
    )
    places = [page.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)
    assert page.count("how it was measured") == 1
    (run / "front.json").write_text("{}", encoding="utf-8")
    assert "front.json is no front of a run, or a damaged one" in call(run).stderr


def test_a_reward_is_shown_with_its_options(run: Path) -> None:
    with (run / "config.toml").open("a") as file:
        file.write('[reward]\nname = "multi-objective"\nperplexity = 1.0\ncost = 0.5\n')
    assert "<dd>multi-objective (perplexity = 1.0, cost = 0.5)</dd>" in page_of(run)


def test_a_share_is_no_rounder_than_it_was_asked_for(run: Path) -> None:
    (run / "config.toml").write_text('[prune]\nsparsity = "0.005:0.125"\n', encoding="utf-8")
    assert "without 0.5% to 12.5% of its prunable params" in page_of(run)


def test_the_page_needs_no_network_and_no_script(run: Path) -> None:
    page = page_of(run)
    links = re.findall(r"""(?:src|href)=["']([^"']*)""", page) + re.findall(r"url\(([^)]*)", page)
    assert all(link.startswith("data:") for link in links)
    assert "<script" not in page


def test_an_unfinished_run_gets_a_page_that_says_so_and_how_to_go_on(run: Path) -> None:
    for name in ("report.json", "losses.json"):
        (run / name).unlink()
    shutil.rmtree(run / "model")
    page = page_of(run)
    assert "This run is not finished: it has 3 episodes so far." in page
    assert f"ffgym run --resume {run}" in page
    assert "<table>" not in page
    assert "from_pretrained" not in page


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (
            PluginError("sick at postgresql://me:secret@host/db", hint="Mend it."),
            ["It failed: PluginError: sick at ", "Mend it."],
        ),
        (ValueError("wrong"), ["It failed: ValueError: wrong"]),
        (KeyboardInterrupt(), ["It was interrupted."]),
    ],
)
def test_a_run_that_ended_early_gets_a_page_that_says_why(run: Path, stop: BaseException, said: list[str]) -> None:
    place = RunFolder(run, resumed=True)
    place.begin((run / "config.toml").read_text(), RunRecord())
    place.end_early(stop, print)
    page = page_of(run)
    parts = [f"Continue it: ffgym run --resume {run}<", *said, "<h2>What was run</h2>"]
    places = [page.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)
    assert "secret" not in page


def test_a_destroyed_model_is_called_so(tmp_path: Path) -> None:
    assert "The pruned model is destroyed" in page_of(write_run(tmp_path, "broken"))


def test_what_a_run_is_called_is_no_markup(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, "<b>one & two"))
    assert "<b>" not in page
    assert "&lt;b&gt;one &amp; two" in page


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    folder = tmp_path / "ablation"
    shutil.copytree(BENCH.parent / "results/start", folder / "results/start")
    shutil.copy(BENCH.parent / "policy-20.json", folder)
    return Path(shutil.copy(BENCH, folder))


def test_a_bench_has_a_page_too(bench: Path, tmp_path: Path) -> None:
    folder = bench.parent
    done = call(folder / "start.toml", "--output", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The lowest perplexity is that of " in page
    assert page.count("data:image/png;base64,") == 1
    assert f"ffgym bench {folder / 'start.toml'}" in page
    shutil.rmtree(folder / "results")
    assert "has no results yet" in call(folder / "start.toml").stderr


def test_what_cannot_be_reported_is_an_error(run: Path, tmp_path: Path) -> None:
    assert "has no config.toml" in call(tmp_path).stderr
    assert "ends in '.pdf'" in call(run, "--output", tmp_path / "page.pdf").stderr
    assert "cannot be read" in call(tmp_path / "nothing.toml").stderr


@pytest.mark.usefixtures("read_only_disk")
def test_a_run_that_may_not_be_written_to_is_reported_elsewhere(run: Path) -> None:
    done = call(run)
    assert "report.html: Read-only file system" in done.stderr
    assert "hint: You may not write there: choose another place with --output." in done.stderr


@pytest.mark.browser
def test_a_browser_shows_it_on_phone_and_desktop_light_and_dark_without_an_error(run: Path, browser: Any) -> None:
    page_of(run)
    grounds = {}
    for width, scheme in ((390, "light"), (1280, "light"), (390, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page, said, asked = context.new_page(), list[str](), list[str]()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto((run / "report.html").as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [(run / "report.html").as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert grounds["light"] != grounds["dark"]


@pytest.mark.browser
def test_a_browser_shows_every_column_of_a_bench_and_no_hole_above_it(bench: Path, browser: Any) -> None:
    call(bench)
    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(bench.with_suffix(".html").as_uri())
        assert page.evaluate("document.querySelector('thead').clientHeight") < 90, "at most three lines"
        if width == 1280:
            assert page.evaluate("(box => box.scrollWidth - box.clientWidth)(document.querySelector('.scroll'))") == 0
