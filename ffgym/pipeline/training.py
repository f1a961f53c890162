"""Training after the final calibration, as a stage of a run, and what the run logs at its end."""

from __future__ import annotations

import shlex
from dataclasses import replace

from ffgym.export.checkpoint import SavedModel
from ffgym.pipeline.artifacts import PICTURES, description, tracked_result, write_table
from ffgym.pipeline.compare import with_recovered
from ffgym.pipeline.result import RunResult
from ffgym.pipeline.session import Session
from ffgym.recover.folders import output_folder, unfinished_folder
from ffgym.recover.recover import train_and_save
from ffgym.recover.result import RecoveredModel
from ffgym.recover.text import RecoveryTexts


def train(result: RunResult, texts: RecoveryTexts | None, session: Session) -> RunResult:
    """Train the saved model where the run asks for it, add its row to the table, and log the table."""
    if texts is not None and result.saved is not None:
        recovered = _recover(result.saved, texts, session)
        result = replace(result, recovered=recovered, table=with_recovered(result.table, recovered, session.config))
        write_table(session.folder, result.table)
        last = tracked_result(result.table.result, result.table.dense, result.found)
        session.tracker.log_result(last, step=1)
        session.tracker.log_model(recovered.saved.path)
    saved = result.saved if result.recovered is None else result.recovered.saved
    front = None if result.front is None else result.front.layout().markdown()
    session.tracker.describe("\n\n".join(filter(None, [front, description(result.table, saved)])))
    session.tracker.log_table(result.table.layout().as_dicts())
    for name in ("report.md", "losses.json", *PICTURES):
        if (session.folder / name).is_file():
            session.tracker.log_artifact(session.folder / name)
    return result


def _recover(saved: SavedModel, texts: RecoveryTexts, session: Session) -> RecoveredModel:
    place = output_folder(saved.path)
    try:
        return train_and_save(
            session.config,
            saved.path,
            place,
            session.tracker,
            session.progress,
            overwrite=True,  # the folder is this run's: only an earlier session wrote there
            dense=session.config.model.name,
            texts=texts,
        )
    except KeyboardInterrupt:
        where = f"the pruned model is in {saved.path}"
        if unfinished_folder(place).exists() or not place.exists():
            session.progress.print(f"{where}; continue with: ffgym recover {shlex.quote(str(saved.path))}")
        else:
            session.progress.print(f"{where}, the trained one, complete, in {place}")
        raise
