"""What a person does who compares runs: `ffgym ui` in a real browser, from the sorted runs to a model.

The pictures of docs/comparing.md are what this browser shows; this makes them anew:
`SCREENSHOTS=docs/images pytest tests/tracking/test_browser.py`
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from glass_runs import glass_config, glass_home
from mlflow_store import new_store
from processes import PATIENCE, free_port
from rich.console import Console

import ffgym
from ffgym.errors import DataError

SCREENSHOTS = Path(os.environ["SCREENSHOTS"]).resolve() if "SCREENSHOTS" in os.environ else None
AGENTS = ("reinforce", "evolution", "random")
# At the first visit MLflow opens its assistant's panel, and stands at "GenAI" on pages that no address says more of.
VISITED = """
    localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
    localStorage.setItem('mlflow.workflowType_v1', '"machine_learning"');
"""

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, drawing: Any) -> Iterator[Path]:
    """A folder with the runs of three agents, of a heuristic, and one that failed; the current one meanwhile."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(glass_home(), folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, drawing():
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        new_store(Path("mlruns"))
        for agent in (*AGENTS, "uniform"):
            one_shot = {"agent": {"name": "one-shot"}, "prior": {"name": "uniform"}}
            track(agent, **(one_shot if agent == "uniform" else {"agent": {"name": agent}}))
        with contextlib.suppress(DataError):
            track("too-long", data={"report_tokens": 10**6})
        yield folder


def track(name: str, data: dict[str, Any] | None = None, **tables: Any) -> None:
    texts = {"calibration": "c4.txt", "search": "c4.txt", "report": "wiki.txt"}
    config = glass_config(
        Path(),
        model={"name": "glass"},
        data={**texts, **(data or {})},
        prune={"sparsity": 0.3},
        search={"episodes": 48, "episodes_per_update": 8},
        output={"dir": f"runs/{name}"},
        tracking={"enabled": True, "root": "mlruns"},
        **tables,
    )
    ffgym.run(config, progress=Console(quiet=True))


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """What `ffgym ui` prints: the page of the runs."""
    command = [sys.executable, "-m", "ffgym", "ui", "--port", str(free_port()), "--no-browser"]
    server = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None
        yield found[0]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 0, "Ctrl-C is the way to end it"


# MLflow moves columns while it loads, and its document has them in no particular order: from left to right, then.
COLUMNS_STAND_IN_ORDER = """wanted => {
    const heads = [...document.querySelectorAll(".ag-header-cell")];
    heads.sort((one, other) => one.getBoundingClientRect().left - other.getBoundingClientRect().left);
    const names = heads.map(head => head.innerText.trim()).filter(name => wanted.includes(name));
    return JSON.stringify(names) === JSON.stringify(wanted);
}"""


CELLS_ARE_FILLED = """([column, count]) => {
    const cells = [...document.querySelectorAll(`.ag-row ${column}`)];
    return cells.length === count && cells.every(cell => cell.innerText.trim());
}"""


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page of the runs, loaded, as for somebody who has not been there before."""
    page = browser.new_page(viewport={"width": 1440, "height": 640})
    page.set_default_timeout(PATIENCE * 1000)
    page.add_init_script(VISITED)
    page.goto(address)
    page.get_by_role("link", name="reinforce", exact=True).wait_for()
    yield page
    page.close()


def picture(page: Any, name: str) -> None:
    """Keep what the browser shows, where pictures are wanted."""
    if SCREENSHOTS is not None:
        page.wait_for_timeout(1500)  # until nothing moves any more
        page.screenshot(path=SCREENSHOTS / f"mlflow-{name}.png")


def test_the_runs_are_sorted_by_result_with_the_columns_that_tell(page: Any) -> None:
    wanted = ["agent", "criterion", "model", "sparsity"]
    wanted += ["result/perplexity", "result/ratio_to_dense", "result/sparsity", "result/search_tokens"]
    page.wait_for_function(COLUMNS_STAND_IN_ORDER, arg=wanted)
    column = "[col-id='metrics.`result/perplexity`']"
    page.wait_for_function(CELLS_ARE_FILLED, arg=[column, len(AGENTS) + 2])
    results = [page.locator(f".ag-row[row-index='{row}'] {column}").inner_text() for row in range(len(AGENTS) + 2)]
    assert results[-1] == "-", "the run that failed has none, and comes last"
    numbers = [float(result.rstrip("…")) for result in results[:-1]]
    assert len(numbers) == 4
    assert numbers == sorted(numbers)
    page.locator(".ag-header-cell", has_text="result/perplexity").click()
    page.locator(f".ag-row[row-index='0'] {column}").filter(has_text=results[-2][:6]).wait_for()


def test_three_runs_of_different_agents_are_compared_in_one_column(page: Any) -> None:
    for agent in AGENTS:
        row = page.locator(".ag-pinned-left-cols-container .ag-row").filter(
            has=page.get_by_role("link", name=agent, exact=True)
        )
        row.locator("input[type=checkbox]").first.check()
    picture(page, "runs")
    page.get_by_role("button", name="Compare").click()
    label = page.get_by_role("link", name="result/perplexity")
    label.scroll_into_view_if_needed()
    page.wait_for_function(
        """count => {
            const top = element => element.getBoundingClientRect().top;
            const links = [...document.querySelectorAll('a')];
            const label = links.find(link => link.innerText.startsWith('result/perplexity'));
            const beside = [...document.querySelectorAll("div[style*='position: absolute'] *")]
                .filter(element => !element.children.length && Math.abs(top(element) - top(label)) < 12)
                .map(element => element.innerText.trim()).filter(text => /^[0-9]/.test(text));
            return beside.length === count && new Set(beside).size === count;
        }""",
        arg=len(AGENTS),
    )
    picture(page, "compare")


def test_the_page_of_a_run_says_what_it_is_and_shows_its_pictures(page: Any) -> None:
    page.get_by_role("link", name="reinforce", exact=True).click()
    page.get_by_text("reinforce + ridge").first.wait_for()
    assert page.get_by_text("<br>").count() == 0
    page.get_by_text("ffgym run --config config.toml --output NEW_FOLDER").wait_for()
    status = page.get_by_text("Finished", exact=True).bounding_box()
    assert status["x"] + status["width"] < page.viewport_size["width"], "the right column is in view"
    picture(page, "run")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("units_kept.png").first.click()
    page.wait_for_function("[...document.images].some(image => image.naturalWidth > 600)")


def test_the_page_of_a_run_that_failed_says_why(page: Any) -> None:
    page.get_by_role("link", name="too-long", exact=True).click()
    page.get_by_text("Failed:").first.wait_for()
    page.get_by_text(re.compile("DataError: .*report")).first.wait_for()


def test_the_pruned_model_is_listed_and_opened(page: Any) -> None:
    page.get_by_role("link", name="Models", exact=True).first.click()
    page.get_by_role("link", name="reinforce model").first.click()
    page.get_by_text("About this logged model").wait_for()
    page.get_by_text("result/perplexity").first.wait_for()
