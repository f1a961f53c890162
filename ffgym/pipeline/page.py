"""What the page about a run shows."""

from __future__ import annotations

import shlex

from ffgym.config.mixture import described
from ffgym.export.checkpoint import load_line
from ffgym.pipeline.artifacts import PICTURES
from ffgym.pipeline.compare import model_folder
from ffgym.pipeline.folder import read_record, resume_command
from ffgym.pipeline.stored import StoredRun
from ffgym.recover.folders import output_folder
from ffgym.report.layout import percent
from ffgym.report.page import Page


def run_page(run: StoredRun) -> Page:
    """The page about a run; one that is not finished gets a page that says so."""
    config, folder, table = run.config, run.folder, run.table
    search, data = config.search, config.data
    share = " to ".join(map(percent, dict.fromkeys(config.prune.ends)))
    removed = f"{share} of its prunable {config.prune.resource}"
    model = model_folder(config, folder, config.main_target)
    saved = [place for place in (model, output_folder(model)) if (place / "config.json").is_file()]
    again = f"ffgym run --config {shlex.quote(str(folder / 'config.toml'))} --output NEW"
    unfinished = table is None or not read_record(folder).results
    warnings = ["This run is not finished. The command at the end of this page goes on with it."] if unfinished else []
    warnings += [table.warning] if table is not None and table.warning else []
    return Page(
        title=f"{folder.name}: {config.model.name} without {removed}, by {config.agent.name}",
        summary=[] if table is None else table.verdict,
        warnings=warnings,
        settings={
            "model": config.model.name,
            "removed": removed,
            "agent": config.agent.name,
            "started from": config.prior.name,
            "criterion": config.criterion.name,
            "reward": config.reward.name,
            "search": f"{search.episodes:,} episodes of {search.episode_tokens:,} tokens of {described(data.search)}",
            "calibration": f"{data.whole_tokens('calibration'):,} tokens of {described(data.calibration)}",
            "report": f"{data.whole_tokens('report'):,} tokens of {described(data.report)} in windows of "
            f"{data.window:,}",
            "seed": str(config.seed),
        },
        table=None if table is None else table.layout(),
        pictures={folder / name: caption for name, caption in PICTURES.items()},
        load="\n\n".join(load_line(place).replace("; ", "\n") for place in saved),
        repeat=resume_command(folder) if unfinished else again,
        configuration=(folder / "config.toml").read_text(encoding="utf-8").partition("\n[output]")[0],
    )
