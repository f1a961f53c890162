"""Training after the final calibration, as a stage of a run, and what the run logs at its end."""

from __future__ import annotations

from dataclasses import replace

from ffgym.config.toml import load_config
from ffgym.pipeline.artifacts import description, tracked_result, write_table
from ffgym.pipeline.compare import with_recovered
from ffgym.pipeline.folder import PICTURES
from ffgym.pipeline.result import RunResult
from ffgym.pipeline.session import Session
from ffgym.recover.folders import output_folder
from ffgym.recover.recover import train_and_save
from ffgym.recover.text import RecoveryTexts
from ffgym.search.loop import SearchResult


def train(result: RunResult, found: SearchResult, texts: RecoveryTexts | None, session: Session) -> RunResult:
    """Train the saved model where the run asks for it, add its row to the table, and log the table."""
    if texts is not None and result.saved is not None:
        measured_in, config = str(session.place.record.dtype), session.config
        if measured_in != "float16":  # auto might choose another one now, and nothing trains in this one
            config = load_config(config, model={"dtype": measured_in})
        recovered = train_and_save(
            config,
            result.saved.path,
            output_folder(result.saved.path),
            session.tracker,
            session.progress,
            overwrite=True,  # the folder is this run's: only an earlier session wrote there
            dense=session.config.model.name,
            texts=texts,
        )
        table = with_recovered(result.table, recovered, session.config, measured_in)
        result = replace(result, table=table, trained=recovered.saved.path, recovered=recovered)
        write_table(session.folder, result.table)
        last = tracked_result(result.table.result, result.table.dense, found)
        session.tracker.log_result(last, step=1)
        session.tracker.log_model(recovered.saved.path)
    saved = result.saved if result.recovered is None else result.recovered.saved
    front = None if result.front is None else result.front.layout().markdown()
    session.tracker.describe("\n\n".join(filter(None, [front, description(result.table, saved)])))
    for name in ("report.md", "report.json", "losses.json", *PICTURES):
        if (session.folder / name).is_file():
            session.tracker.log_artifact(session.folder / name)
    return result
