"""``ffgym report``: one page that needs nothing else, about runs that are written by hand and about a bench."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE
from stored_runs import write_run
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.pipeline.artifacts import PICTURES
from ffgym.report.figures import new_figure, save_figure

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
BENCH = Path(__file__).parents[2] / "experiments/ablation/start.toml"


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path, "one")
    for name in PICTURES:
        save_figure(new_figure(3, 2), folder / name)
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
        "reinforce + ridge is better than the best heuristic, uniform + ridge",
        "96 episodes of 2,048 tokens of demo:c4",
        "<td>best heuristic</td>",
        "how it was measured",
        f"AutoModelForCausalLM.from_pretrained(&#39;{run / 'model'}&#39;, trust_remote_code=True)",
        f"ffgym run --config {run / 'config.toml'} --output NEW",
    ):
        assert part in page
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert "not finished" not in page


def test_the_page_says_how_to_load_what_training_made_of_the_model_too(run: Path) -> None:
    shutil.copytree(run / "model", run / "model-recovered")
    page = page_of(run)
    for name in ("model", "model-recovered"):
        assert f"from_pretrained(&#39;{run / name}&#39;, trust_remote_code=True)" in page


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
    assert "This run is not finished" in page
    assert f"ffgym run --resume {run}" in page
    assert "<table>" not in page
    assert "from_pretrained" not in page


def test_a_destroyed_model_is_called_so(tmp_path: Path) -> None:
    assert "The pruned model is destroyed" in page_of(write_run(tmp_path, "broken"))


def test_what_a_run_is_called_is_no_markup(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, "<b>one & two"))
    assert "<b>" not in page
    assert "&lt;b&gt;one &amp; two" in page


def test_a_bench_has_a_page_too(tmp_path: Path) -> None:
    folder = tmp_path / "ablation"
    shutil.copytree(BENCH.parent / "results/start", folder / "results/start")
    shutil.copy(BENCH, folder)
    shutil.copy(BENCH.parent / "policy-20.json", folder)
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
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_a_browser_shows_it_on_phone_and_desktop_light_and_dark_without_an_error(run: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    page_of(run)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
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
        browser.close()
    assert grounds["light"] != grounds["dark"]
