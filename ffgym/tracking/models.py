"""The pruned model as a logged model of MLflow's: listed under *Models*, loaded and served by MLflow.

MLflow's own `save_model` cannot take a checkpoint's folder with transformers 5, and would load the model to copy it. So
the few lines that it would write beside the files are written here.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffgym.plugins.architectures import MODEL_CONFIG
from ffgym.tracking.store import FOLDER_TAG

MOST_COPIED_BYTES = 10**9  # a larger model stays where it is, as one of several towers does, and MLflow has its path
TOKENIZER_FILES = ("token", "special_tokens", "chat_template", "vocab", "merges", "added_tokens", "config.json")
REQUIREMENTS = ("mlflow", "torch", "transformers", "accelerate")


def log_model(
    client: Any, run_id: str, path: str, params: Mapping[str, str], result: Sequence[tuple[str, float, int, int]]
) -> None:
    """Log a saved model as what a run has made; at most once.

    Args:
        params: to compare models by.
        result: metrics of the run that are the model's: name, value, step, and when, in milliseconds.
    """
    from mlflow.entities import LoggedModelOutput

    folder = Path(path)
    run = client.get_run(run_id)
    experiment, name = run.info.experiment_id, re.sub(r"[^\w -]+", "_", f"{run.info.run_name} {folder.name}")
    logged = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    begun = [model for model in logged if model.name == name]
    if any(str(model.status) == "READY" for model in begun):
        return
    is_small = sum(file.stat().st_size for file in folder.iterdir()) <= MOST_COPIED_BYTES
    config = MODEL_CONFIG.read(folder / "config.json")
    is_copied = is_small and config.get("text_config") is None  # MLflow's pipeline is for language models alone
    tags = {FOLDER_TAG: path} | ({} if is_copied else {"mlflow.model.isExternal": "true"})
    model = begun[0] if begun else client.create_logged_model(experiment, name, run_id, tags, dict(params))
    with tempfile.TemporaryDirectory() as around:
        if is_copied:
            _add_description(folder, Path(around), model, run_id, config["architectures"][0])
            client.log_model_artifacts(model.model_id, path, artifact_path="model")
        else:
            from mlflow.models.utils import get_external_mlflow_model_spec

            get_external_mlflow_model_spec(model).save(str(Path(around) / "MLmodel"))
        client.log_model_artifacts(model.model_id, around)
    for key, value, step, time in result:  # with the run's own time stamps, so that they are not shown twice
        client.log_metric(run_id, key, value, timestamp=time, step=step, model_id=model.model_id)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


def _add_description(folder: Path, around: Path, logged: Any, run_id: str, architecture: str) -> None:
    """What MLflow needs beside the checkpoint: ``MLmodel``, the tokenizer by itself, and the packages."""
    import mlflow
    import transformers
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    text = Schema([ColSpec("string")])
    model = Model(run_id=run_id, model_id=logged.model_id, signature=ModelSignature(text, text))
    model.add_flavor(
        "transformers",
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type=architecture,
        source_model_name=str(folder),
        model_binary="model",
        components=["tokenizer"],
        tokenizer_type="AutoTokenizer",
        transformers_version=transformers.__version__,
    )
    mlflow.pyfunc.add_to_model(model, loader_module="mlflow.transformers")
    model.save(str(around / "MLmodel"))
    (around / "requirements.txt").write_text("".join(f"{package}\n" for package in REQUIREMENTS), encoding="utf-8")
    tokenizer = around / "components" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name.startswith(TOKENIZER_FILES):
            shutil.copy(file, tokenizer)
