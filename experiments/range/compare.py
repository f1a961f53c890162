"""Does one policy for a range of budgets cost less than separate searches, at equal quality?

    python experiments/range/compare.py experiments/range/demo.toml            # what is missing, then the report
    python experiments/range/compare.py experiments/range/demo.toml --report   # compute nothing

With every seed: one search over the range, and for every target of its front separate searches of several lengths. What
each found is measured on the report split after the same ridge refit; nothing selects on it.

One JSON file a search; what is there is not computed again, and a search that was interrupted goes on from its log.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from rich.console import Console

from ffgym.bench.table import Mean, mean_of
from ffgym.config.refusals import config_error
from ffgym.config.tables import RunConfig
from ffgym.config.toml import digest, read_toml, settings
from ffgym.errors import ConfigError, DataError, FFGymError
from ffgym.files import FileFormat, Strict
from ffgym.pipeline.agent import make_agent
from ffgym.pipeline.search import tracked_search
from ffgym.pipeline.task import give_prior, on_report, open_task, with_config
from ffgym.prepare import configured
from ffgym.report.figures import new_figure, save_figure, tidy
from ffgym.report.paired import Difference, margin
from ffgym.report.progress import Reporter
from ffgym.tracking.tracker import Tracker
from ffgym.types import JSONDict

ONE = "one policy"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


class Experiment(Strict):
    """The TOML file.

    Attributes:
        title: of the table.
        results: folder of the result files, relative to the file.
        range: of budgets, e.g. ``"0.1:0.5"``.
        seeds: of all searches.
        episodes: of the search over the range.
        separate: of each separate search; one group of searches a length.
        dated: when earlier code computed the results: they are shown, and nothing is checked or computed.
        run: tables of ``RunConfig`` that all searches share.
    """

    title: str
    results: str
    range: str
    seeds: list[int] = Field(min_length=1)
    episodes: int = Field(ge=1)
    separate: list[int] = Field(min_length=1)
    dated: str = ""
    run: dict[str, Any] = Field(default_factory=dict)


class Point(Strict):
    """One target of one search: its report loss and the dense one (nats per token), the units kept per sublayer."""

    target: float
    loss: float
    dense_loss: float
    kept: list[int]


class Result(Strict):
    """One search: over the range, or at one target. ``settings`` is all that decided its numbers."""

    group: str
    seed: int
    settings: JSONDict
    points: list[Point]
    search_tokens: int
    final_tokens: int
    seconds: float
    report_tokens: int
    dtype: str
    threads: int


@dataclass(frozen=True)
class Search:
    """One search to run."""

    group: str
    config: RunConfig
    path: Path


def read_experiment(file: Path) -> tuple[Experiment, list[Search]]:
    """The file, and its searches: first seeds first, the one over the range before the separate ones."""
    try:
        spec = Experiment.model_validate(read_toml(file))
        folder = file.parent / spec.results
        searches = []
        for seed in spec.seeds:
            one = _config(spec, seed, spec.range, spec.episodes)
            searches.append(Search(ONE, one, folder / f"range-seed{seed}.json"))
            for episodes in spec.separate:
                for target in one.targets:
                    config = _config(spec, seed, target, episodes)
                    name = f"separate-{episodes}-at-{target}-seed{seed}.json"
                    searches.append(Search(f"separate, {episodes} episodes each", config, folder / name))
    except ValidationError as error:
        raise config_error(error, RunConfig if error.title == "RunConfig" else Experiment) from None
    return spec, searches


def _config(spec: Experiment, seed: int, sparsity: float | str, episodes: int) -> RunConfig:
    tables = {**spec.run, "seed": seed}
    tables["prune"] = {**spec.run.get("prune", {}), "sparsity": sparsity}
    tables["search"] = {**spec.run.get("search", {}), "episodes": episodes}
    config = configured.with_options(RunConfig.model_validate(tables))
    configured.check_agent_fits(config)
    return config


RESULT = FileFormat("result", Result, DataError, "Delete it to compute it again.")


def read_result(search: Search, dated: str) -> Result | None:
    """Its result; ``None`` where there is none yet. The settings of a dated one are not checked.

    Raises:
        DataError: not a result.
        ConfigError: the result of other settings.
    """
    if not search.path.exists():
        return None
    result = RESULT.read(search.path)
    if not dated and (changed := configured.changed_since(result.settings, search.config)):
        raise ConfigError(
            f"{search.path} holds the result of another configuration: {'; '.join(changed)}",
            hint="Point `results` at another folder, or delete that file to compute it again.",
        )
    return result


def compute(searches: Sequence[Search], reporter: Reporter) -> None:
    """Run every search; all share one prepared model."""
    prior = searches[0].config.prior
    heuristics = [] if prior.name == "none" else [(prior.name, prior.options)]
    shared = open_task(searches[0].config, heuristics, reporter)
    dense = on_report(shared, shared.prepared.prunable.dense_units).loss
    untracked = Tracker(shared.config.tracking.folder, "ffgym", "range", enabled=False)
    for number, search in enumerate(searches, start=1):
        config = search.config
        reporter.print(f"search {number} of {len(searches)}: {search.path.stem}")
        space = with_config(shared, config)
        agent = make_agent(config)
        give_prior(agent, space)
        log = config.tracking.folder / "range" / f"{digest(config)[:16]}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        found = tracked_search(space, agent, reporter, untracked, search.path.stem, log)
        points = []
        for each in found:
            kept = each.best.allocation.kept
            loss = on_report(space, kept).loss
            points.append(Point(target=each.target, loss=loss, dense_loss=dense, kept=list(kept)))
        result = Result(
            group=search.group,
            seed=config.seed,
            settings=settings(config),
            points=points,
            search_tokens=found[0].search_tokens,
            final_tokens=sum(each.final_tokens for each in found),
            seconds=round(found[-1].seconds, 1),
            report_tokens=space.splits.report.predicted_tokens,
            dtype=space.loaded.dtype_name,
            threads=torch.get_num_threads(),
        )
        search.path.parent.mkdir(parents=True, exist_ok=True)
        search.path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        log.unlink(missing_ok=True)


# --- what came out ----------------------------------------------------------------------------------------------------


class Losses:
    """Report losses by group, target and seed; complete seeds only."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.groups = list(dict.fromkeys(result.group for result in results))
        self.targets = sorted({point.target for result in results for point in result.points})
        self._of = {(r.group, p.target, r.seed): p.loss for r in results for p in r.points}
        self._tokens: dict[tuple[str, int], int] = {}
        for result in results:
            key = result.group, result.seed
            self._tokens[key] = self._tokens.get(key, 0) + result.search_tokens + result.final_tokens
        seeds = sorted({result.seed for result in results})
        self.seeds = [s for s in seeds if all((g, t, s) in self._of for g in self.groups for t in self.targets)]

    def perplexity(self, group: str, target: float) -> Mean:
        """Over seeds."""
        return mean_of([math.exp(self._of[group, target, seed]) for seed in self.seeds])

    def above(self, group: str, target: float) -> Mean:
        """By how much this group's loss is above the one policy's at a target, nats per token, seed by seed."""
        return mean_of([self._gap(group, target, seed) for seed in self.seeds])

    def behind(self, group: str) -> Difference:
        """By how much this group's loss is above the one policy's, nats per token: mean over targets.

        Its 95 % interval is over seeds, of the means over targets.
        """
        means = [float(np.mean([self._gap(group, target, seed) for target in self.targets])) for seed in self.seeds]
        return Difference(float(np.mean(means)), margin(means))

    def _gap(self, group: str, target: float, seed: int) -> float:
        return self._of[group, target, seed] - self._of[ONE, target, seed]

    def tokens(self, group: str) -> float:
        """Tokens of all searches of a group, finals included, a seed."""
        return float(np.mean([self._tokens[group, seed] for seed in self.seeds]))


def markdown(spec: Experiment, results: Sequence[Result]) -> str:
    """The table, and a sentence for every length of separate searches."""
    losses, first = Losses(results), results[0]
    dense = math.exp(first.points[0].dense_loss)
    lines = [
        f"# {spec.title}: one policy for all, or a search for each",
        "",
        (f"Computed {spec.dated} by an earlier version, with the settings in the result files. " if spec.dated else "")
        + f"Report split, {first.report_tokens:,} tokens, {first.dtype}, after the same ridge; dense perplexity "
        f"{dense:.2f}; perplexities: {over(losses)}.",
        "",
        "| target | " + " | ".join(losses.groups) + " |",
        "|---:|" + "---:|" * len(losses.groups),
        *(
            f"| {target:.0%} | " + " | ".join(str(losses.perplexity(group, target)) for group in losses.groups) + " |"
            for target in losses.targets
        ),
        "| tokens, finals included | " + " | ".join(f"{losses.tokens(group):,.0f}" for group in losses.groups) + " |",
        "",
        *(f"* {sentence}" for sentence in verdicts(losses)),
    ]
    return "\n".join(lines) + "\n"


def over(losses: Losses) -> str:
    """What the figures are means over."""
    count = len(losses.seeds)
    return f"mean and standard error over {count} seeds" if count > 1 else f"seed {losses.seeds[0]} alone"


def verdicts(losses: Losses) -> list[str]:
    """How each group compares with the one policy in quality and in tokens."""
    sentences = []
    for group in losses.groups:
        if group == ONE:
            continue
        behind, several = losses.behind(group), len(losses.seeds) > 1
        quality = "not clearly different" if behind.is_tie else "worse" if behind.mean > 0 else "better"
        spread = f" ± {behind.margin:.4f}" if several else ""
        caveat = "half of the 95 % interval over seeds" if several else "one seed, which says little about others"
        ratio = losses.tokens(group) / losses.tokens(ONE)
        sentences.append(
            f"Searches of their own ({group}) take {ratio:.1f} times the tokens of one policy and end {quality}: "
            f"{behind.mean:+.4f}{spread} nats per token, mean over targets ({caveat})."
        )
    return sentences


def draw(spec: Experiment, losses: Losses, path: Path) -> None:
    """Perplexity over sparsity, and how far each group's loss is above the one policy's: a line a group."""
    figure = new_figure(10.5, 4.5)
    fronts, differences = figure.subplots(1, 2)
    for colour, group in zip(cycle(COLOURS), losses.groups, strict=False):
        label = f"{group}: {losses.tokens(group):,.0f} tokens"
        _line(fronts, losses.targets, [losses.perplexity(group, t) for t in losses.targets], colour, label)
        _line(differences, losses.targets, [losses.above(group, t) for t in losses.targets], colour, label)
    fronts.set_yscale("log")
    fronts.yaxis.set_major_formatter("{x:.0f}")
    fronts.yaxis.set_minor_formatter("{x:.0f}")
    fronts.set_ylabel("report perplexity (log scale)")
    differences.set_ylabel(f"loss above {ONE}'s (nats per token)")
    for axes in (fronts, differences):
        axes.set_xticks(losses.targets, [f"{target:.0%}" for target in losses.targets])
        axes.set_xlabel("sparsity")
        tidy(axes)
    fronts.set_title(f"{spec.title}: {over(losses)}", loc="left", fontsize=11)
    handles, labels = fronts.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=8)
    save_figure(figure, path)


def _line(axes: Any, targets: Sequence[float], means: Sequence[Mean], colour: str, label: str) -> None:
    values, errors = [mean.value for mean in means], [mean.stderr or 0.0 for mean in means]
    axes.errorbar(targets, values, errors, marker="o", capsize=3, linewidth=1, color=colour, label=label)


def compare(file: Path, *, only_report: bool = False, reporter: Reporter | None = None) -> str:
    """The whole experiment; the Markdown that was written beside the file, with the picture."""
    spec, searches = read_experiment(file)
    missing = [search for search in searches if read_result(search, spec.dated) is None]
    if missing and not only_report and not spec.dated:
        compute(missing, reporter or Reporter(Console(stderr=True)))
    results = [result for search in searches if (result := read_result(search, spec.dated)) is not None]
    if not results or not Losses(results).seeds:
        raise DataError(f"no seed of {file} is complete yet", hint="Run without --report.")
    text = markdown(spec, results)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(spec, Losses(results), file.with_suffix(".png"))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute what is missing, then write table and figure beside the TOML file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="experiment file (TOML)")
    parser.add_argument("--report", action="store_true", help="compute nothing, show what is there")
    given = parser.parse_args(arguments)
    try:
        sys.stdout.write(compare(given.file, only_report=given.report))
    except FFGymError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
