"""One policy against separate searches, on the small trained model: it goes on where it stopped, its sums hold."""

from __future__ import annotations

import importlib
import io
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomli_w
from glass_runs import PER_UPDATE, glass_tables
from rich.console import Console

from ffgym.pipeline import task
from ffgym.plugins import discovery
from ffgym.report.progress import Reporter

FOLDER = Path(__file__).parents[2] / "experiments" / "range"
TARGETS = (0.2, 0.3, 0.4)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv(discovery.ENVIRONMENT_VARIABLE, "")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("compare")


def write(folder: Path, **changes: Any) -> Path:
    tables = glass_tables(folder)
    run = {name: tables[name] for name in ("model", "data", "prune", "search", "tracking")}
    run["prune"]["front_points"] = len(TARGETS)
    content = {
        "title": "Small",
        "results": "results",
        "range": "0.2:0.4",
        "seeds": [0, 1],
        "episodes": 2 * PER_UPDATE,
        "separate": [PER_UPDATE],
        "run": run,
    }
    file = folder / "small.toml"
    file.write_text(tomli_w.dumps({**content, **changes}), encoding="utf-8")
    return file


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO()))


def result(script: ModuleType, group: str, seed: int, losses: dict[float, float], tokens: int) -> Any:
    points = [script.Point(target=t, loss=loss, dense_loss=3.0, kept=[1, 2]) for t, loss in losses.items()]
    return script.Result(
        group=group,
        seed=seed,
        settings={},
        points=points,
        search_tokens=tokens - 10,
        final_tokens=10,
        seconds=1.0,
        report_tokens=1000,
        dtype="float32",
        threads=1,
    )


@pytest.mark.usefixtures("drawn")
def test_it_goes_on_where_it_stopped_and_says_how_many_tokens(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_episodes: Any
) -> None:
    file = write(tmp_path)
    measured = []

    def counted() -> None:
        measured.append("episode")
        if len(measured) == PER_UPDATE + 1:
            raise KeyboardInterrupt

    before_episodes(counted)
    with pytest.raises(KeyboardInterrupt):
        script.compare(file, reporter=quiet())
    assert [path.stem for path in (tmp_path / "results").iterdir()] != []
    text = script.compare(file, reporter=quiet())
    one, separate = 2 * PER_UPDATE, len(TARGETS) * PER_UPDATE
    assert len(measured) - 1 <= 2 * (one + separate), "nothing is measured twice"
    assert len(list((tmp_path / "results").glob("*.json"))) == 2 * (1 + len(TARGETS))
    assert "over 2 seeds" in text
    assert all(f"| {target:.0%} |" in text for target in TARGETS)
    assert (tmp_path / "small.md").read_text() == text
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(task, "load_parts", lambda config: pytest.fail("something was loaded"))
    assert script.compare(file, only_report=True) == text


def test_differences_are_paired_by_seed_and_averaged_over_targets(script: ModuleType) -> None:
    results = [
        result(script, script.ONE, 0, {0.2: 3.1, 0.4: 3.5}, 100),
        result(script, script.ONE, 1, {0.2: 3.3, 0.4: 3.7}, 100),
        *(result(script, "own", 0, {t: loss}, 200) for t, loss in ((0.2, 3.2), (0.4, 3.8))),
        *(result(script, "own", 1, {t: loss}, 200) for t, loss in ((0.2, 3.4), (0.4, 3.8))),
        result(script, script.ONE, 2, {0.2: 9.0, 0.4: 9.0}, 100),  # its separate searches are missing
    ]
    losses = script.Losses(results)
    assert losses.seeds == [0, 1]
    assert losses.tokens("own") == 400
    behind = losses.behind("own")
    assert behind.mean == pytest.approx((0.2 + 0.1) / 2)
    assert behind.margin == pytest.approx(0.05 * 12.706, rel=1e-4), "Student's t of two seeds"
    assert losses.perplexity(script.ONE, 0.2).value == pytest.approx((math.exp(3.1) + math.exp(3.3)) / 2)
    (sentence,) = script.verdicts(losses)
    assert "take 4.0 times the tokens" in sentence
    assert "not clearly different: +0.1500 ± 0.6353" in sentence
    (alone,) = script.verdicts(script.Losses([each for each in results if each.seed == 0]))
    assert "not clearly different: +0.2000 nats per token, mean over targets (one seed" in alone
    close = [each for each in results if (each.group, each.seed) == (script.ONE, 0)]
    close += [result(script, script.ONE, 1, {0.2: 3.1, 0.4: 3.5}, 100)]
    close += [result(script, "own", seed, {0.2: 3.2 + seed / 500, 0.4: 3.8}, 200) for seed in (0, 1)]
    (sentence,) = script.verdicts(script.Losses(close))
    assert "end worse: +0.2005 ± 0.0064" in sentence
