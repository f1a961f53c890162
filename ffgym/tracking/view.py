"""How MLflow's UI shows an experiment of ffgym's: the classic page of runs, best result first, with telling columns.

MLflow keeps a view of an experiment's runs, the kind that *Share* makes, in a tag of the experiment.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

VIEW = "ffgym"
RESULT = "metrics.`result/perplexity`"
WIDTHS = {  # pixels, by column, from left to right
    "params.`agent`": 100,
    "params.`criterion`": 90,
    "params.`model`": 90,
    "params.`sparsity`": 80,
    RESULT: 140,
    "metrics.`result/ratio_to_dense`": 160,
    "metrics.`result/sparsity`": 120,
    "metrics.`result/search_tokens`": 160,
}
STATE = {
    "orderByKey": RESULT,
    "orderByAsc": True,
    "selectedColumns": list(WIDTHS),
    "columnOrder": list(WIDTHS),
    "columnWidths": WIDTHS,
}
TAGS = {
    f"mlflow.sharedViewState.{VIEW}": json.dumps(STATE),
    "mlflow.experimentKind": "custom_model_development",  # or MLflow opens an overview of traces and chats
}


def arrange(client: Any, experiment: Any) -> None:
    """Give an experiment the view, where it does not have it yet and may be changed: nobody depends on it."""
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):
        for key, value in TAGS.items():
            if experiment.tags.get(key) != value:
                client.set_experiment_tag(experiment.experiment_id, key, value)


def page(server: str, experiment_id: str) -> str:
    """Where a server shows the view."""
    view = f"workflowType=machine_learning&viewStateShareKey={VIEW}"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{view}"
