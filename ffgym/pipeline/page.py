"""What the page about a run shows."""

from __future__ import annotations

import shlex
from typing import Any

from ffgym.config.mixture import described
from ffgym.config.toml import written
from ffgym.export.checkpoint import load_code
from ffgym.pipeline.compare import target_model_folder
from ffgym.pipeline.folder import PICTURES, read_record, resume_command
from ffgym.pipeline.stored import StoredRun, read_front
from ffgym.recover.folders import output_folder
from ffgym.report.front import Front
from ffgym.report.layout import Table, percent
from ffgym.report.page import Page
from ffgym.search.log import read_log


def run_page(run: StoredRun) -> Page:
    """The page about a run; one that is not finished gets a page that says so."""
    config, folder, table = run.config, run.folder, run.table
    data, recover = config.data, config.recover
    share = " to ".join(map(percent, dict.fromkeys(config.prune.ends)))
    removed = f"{share} of its prunable {config.prune.resource}"
    again = f"ffgym run --config {shlex.quote(str(folder / 'config.toml'))} --output NEW"
    log, front = folder / "episodes.jsonl", read_front(folder)
    episodes = read_log(log).episodes if log.is_file() else ()
    main = percent(config.main_target) if config.prune.is_range else ""
    tables: dict[str, Table[Any]] = {} if front is None else {"The whole range": front.layout()}
    record, warnings = read_record(folder), list[str]()
    unfinished = table is None or not record.results
    if unfinished:
        so_far = f"it has {len(episodes):,} episodes so far"
        warnings = [f"This run is not finished: {so_far}. Continue it: {resume_command(folder)}"]
        warnings += record.ended.splitlines()
    if table is not None:
        tables[f"The table at {main}" if main else "The table"] = table.layout()
        warnings += [table.warning] if table.warning else []
    search = f"{len(episodes):,} episodes, {sum(episode.tokens for episode in episodes):,} tokens of "
    options = ", ".join(f"{key} = {written(value)}" for key, value in config.reward.options.items())
    return Page(
        title=f"{folder.name}: {config.model.name} without {removed}, by {config.agent.name}",
        summary=[f"At {main}: {said}" if main else said for said in (table.verdict if table is not None else [])],
        warnings=warnings,
        settings={
            "model": config.model.name,
            "removed": removed,
            "agent": config.agent.name,
            "started from": config.prior.name,
            "criterion": config.criterion.name,
            "reward": f"{config.reward.name} ({options})" if options else config.reward.name,
            "search": search + described(data.search) + " and task examples" * any(e.examples for e in episodes),
            "calibration": f"{data.whole_tokens('calibration'):,} tokens of {described(data.calibration)}",
            "report": f"{data.whole_tokens('report'):,} tokens of {described(data.report)} in windows of "
            f"{data.window:,}",
            **({} if recover.method == "none" else {"recovery": f"{recover.method}, {recover.tokens:,} tokens"}),
            "seed": str(config.seed),
        },
        tables=tables,
        pictures={folder / name: caption for name, caption in PICTURES.items()},
        load=_loading(run, front),
        repeat=resume_command(folder) if unfinished else again,
        configuration=(folder / "config.toml").read_text(encoding="utf-8").partition("\n[output]")[0],
    )


def _loading(run: StoredRun, front: Front | None) -> dict[str, str]:
    """How to load each saved model, by the row of a table that it is."""
    config, table, load = run.config, run.table, dict[str, str]()
    found = {} if front is None else {point.target: point.found for point in front.points}
    for target in config.targets if config.output.save_all else (config.main_target,):
        place = target_model_folder(config, run.folder, target)
        if target == config.main_target:
            saved = [row for row in table.rows if row.is_saved] if table is not None else []
        else:
            saved = [found[target]] if target in found else []
        rows = [f"{row.label}: perplexity {row.perplexity_text}" for row in saved]
        rows += ["the saved model", "the same model, trained afterwards"][len(rows) :]
        if table is not None and not table.rows[-1].is_saved:  # a training that was undone
            del rows[1:]
        for folder, row in zip((place, output_folder(place)), rows, strict=False):
            if (folder / "config.json").is_file():
                at = f"At {100 * target:.6g}%, " if config.prune.is_range else ""
                load[f"{at}{row}"] = load_code(folder)
    return load
