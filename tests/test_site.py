"""The documentation as a site: nothing is missing, and a browser shows every page without an error, also on a phone."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed: pip install '.[docs]'"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it: a broken link, or a page that the navigation lacks, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1"})
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_reference_has_every_public_name(site: Path) -> None:
    import ffgym

    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    names = [name for name in ffgym.__all__ if not name.startswith("__")]
    assert [name for name in names if f'id="ffgym.{name}"' not in page] == []


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    page = (site / "mathematics" / "index.html").read_text(encoding="utf-8")
    assert page.count("<math") > 50
    assert "arithmatex" not in page


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.browser
def test_every_page_reads_well(site: Path, address: str, browser: Any) -> None:
    """No message on the console, nothing asked of another server, no line that runs out of the window."""
    from playwright.sync_api import TimeoutError

    faults: list[str] = []
    page = browser.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    page.on("console", lambda message: faults.append(f"{page.url}: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
    page.on("request", lambda request: request.url.startswith(address) or faults.append(f"asks {request.url}"))
    for file in sorted(site.rglob("index.html")):
        page.goto(address + file.parent.relative_to(site).as_posix())
        for width in (1400, 390):
            page.set_viewport_size({"width": width, "height": 800})
            try:  # the search box slides into its place
                page.wait_for_function("document.documentElement.scrollWidth <= innerWidth", timeout=5000)
            except TimeoutError:
                faults.append(f"{page.url} is wider than {width} pixels")
    assert faults == []


@pytest.mark.browser
def test_commands_are_copied_without_their_prompts(address: str, browser: Any) -> None:
    page = browser.new_page(permissions=["clipboard-read", "clipboard-write"])
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(address + "tutorial")
    page.locator("[data-clipboard-target]").first.click()
    page.get_by_text("Copied to clipboard").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert [line for line in copied.splitlines() if line.strip()] == [
        "python3 -m venv .venv",
        "source .venv/bin/activate",
        "pip install .",
    ]
