"""Text to prepare and search with: C4, text of the report's domain, and a mixture, at equal tokens."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from glass_runs import glass_home, glass_tables
from rich.console import Console

from ffgym.bench.bench import bench
from ffgym.bench.cell import CELL_RESULT
from ffgym.bench.checks import check_benches
from ffgym.bench.file import read_bench
from ffgym.config.mixture import described

FOLDER = Path(__file__).parents[2] / "experiments" / "text"


def undated(name: str) -> dict[str, Any]:
    """The content of a bench file, to be computed even where its results are of an earlier version."""
    content = tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key != "dated"}


@pytest.mark.parametrize("domain", ["wiki", "code"])
def test_the_benches_compare_three_texts_at_equal_tokens(domain: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.toml"
    file.write_text(tomli_w.dumps(undated(f"{domain}-20.toml")), encoding="utf-8")
    read = read_bench(file)
    check_benches([read])
    mine = f"experiments/text/corpora/{domain}.txt"
    texts = {"c4": "demo:c4", domain: mine, "half": f"50% demo:c4 + 50% {mine}"}
    for cell in read.cells:
        data = cell.config.data
        assert described(data.calibration) == described(data.search) == texts[cell.label.partition("-")[2]]
        assert data.report == f"demo:{domain}"
    assert len(read.cells) == 3 * 5 + 3


def test_a_small_model_goes_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    home = glass_home()
    wiki, mine = home / "wiki.txt", tmp_path / "rest.txt"
    mine.write_text(importlib.import_module("rest").rest(str(wiki)), encoding="utf-8")
    assert wiki.read_text(encoding="utf-8").endswith(mine.read_text(encoding="utf-8"))

    written = tomli_w.dumps(undated("wiki-20.toml"))
    written = written.replace("experiments/text/corpora/wiki.txt", str(mine)).replace("demo:c4", str(home / "c4.txt"))
    content = tomllib.loads(written)
    content |= {"run": glass_tables(tmp_path), "seeds": [0], "more_seeds": {}}
    file = tmp_path / "small.toml"
    file.write_text(tomli_w.dumps(content), encoding="utf-8")
    (table,) = bench([file], progress=Console(quiet=True))

    cells = [CELL_RESULT.read(cell.path) for cell in read_bench(file).cells]
    assert len({round(cell.dense_loss, 5) for cell in cells}) == 1, "the same windows are reported on"
    assert len({tuple(cell.final.losses) for cell in cells}) == 6
    assert {row.label for row in table.rows} == set(content["agents"])
    assert "| rule-half |" in file.with_suffix(".md").read_text(encoding="utf-8")
