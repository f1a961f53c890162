"""ffgym: how much of each layer of a language model can go, and the smaller model that comes out.

The names here are the public ones. Importing them loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffgym.errors import FFGymError
from ffgym.plugins.bases import Agent, BatchAgent, Criterion, Heuristic, PluginConfig, Reward
from ffgym.plugins.hookspecs import hookimpl
from ffgym.types import Allocation, Evaluation, LayerStats, Sublayer, SublayerView, Update
from ffgym.version import __version__

if TYPE_CHECKING:
    from ffgym.config.tables import RunConfig
    from ffgym.config.toml import load_config
    from ffgym.costs.resource import Resource
    from ffgym.data.corpora import CorpusSource
    from ffgym.export.format import Exported, ExportFormat
    from ffgym.measure.metrics import Metric
    from ffgym.models.families import Family, Stock
    from ffgym.pipeline.result import RunResult
    from ffgym.pipeline.start import run
    from ffgym.prepare.calibrations import Calibration, Consumer
    from ffgym.pruning.calibration import ConsumerPath
    from ffgym.recover.method import Recovery, TrainingOutcome, TrainingSetup

__all__ = [
    "Agent",
    "Allocation",
    "BatchAgent",
    "Calibration",
    "Consumer",
    "ConsumerPath",
    "CorpusSource",
    "Criterion",
    "Evaluation",
    "ExportFormat",
    "Exported",
    "FFGymError",
    "Family",
    "Heuristic",
    "LayerStats",
    "Metric",
    "PluginConfig",
    "Recovery",
    "Resource",
    "Reward",
    "RunConfig",
    "RunResult",
    "Stock",
    "Sublayer",
    "SublayerView",
    "TrainingOutcome",
    "TrainingSetup",
    "Update",
    "__version__",
    "hookimpl",
    "load_config",
    "run",
]

_LATE = {
    **dict.fromkeys(("Recovery", "TrainingOutcome", "TrainingSetup"), "ffgym.recover.method"),
    **dict.fromkeys(("Calibration", "Consumer"), "ffgym.prepare.calibrations"),
    "ConsumerPath": "ffgym.pruning.calibration",
    "CorpusSource": "ffgym.data.corpora",
    "Resource": "ffgym.costs.resource",
    "Metric": "ffgym.measure.metrics",
    "ExportFormat": "ffgym.export.format",
    "Exported": "ffgym.export.format",
    "Family": "ffgym.models.families",
    "RunConfig": "ffgym.config.tables",
    "RunResult": "ffgym.pipeline.result",
    "Stock": "ffgym.models.families",
    "load_config": "ffgym.config.toml",
    "run": "ffgym.pipeline.start",
}


if not TYPE_CHECKING:  # a type checker would let every misspelt name pass

    def __getattr__(name: str) -> Any:
        """Import what is heavy only when somebody asks for it (PEP 562)."""
        if name in _LATE:
            import importlib

            return getattr(importlib.import_module(_LATE[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return sorted({*globals(), *__all__})
