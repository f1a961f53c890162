"""The kinds of plugins: what each kind's hook and base class are, and which table of a configuration names one.

Base classes are given as ``"module:Class"``, because listing plugins must import neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, NamedTuple

PluginKind = Literal[
    "agent", "calibration", "corpus", "criterion", "export", "family", "heuristic", "metric", "recovery", "resource",
    "reward",
]  # fmt: skip


class Kind(NamedTuple):
    """What the plugin manager knows about a kind."""

    plural: str  # argument of ffgym ls; the hook is ffgym_ and this word
    base: str  # the class that plugins of the kind subclass, as "module:Class"
    table: str = ""  # the configuration's table that names a plugin of the kind; empty where none does
    key: str = "name"  # the key in that table. A `PluginTable` holds the plugin's options too; other tables hold none.

    @property
    def hook(self) -> str:
        """Name of the hook that returns a list of classes."""
        return f"ffgym_{self.plural}"


KINDS: dict[PluginKind, Kind] = {
    "agent": Kind("agents", "ffgym.plugins.bases:Agent", "agent"),
    "calibration": Kind("calibrations", "ffgym.prepare.calibrations:Calibration", "prune", "calibration"),
    "corpus": Kind("corpora", "ffgym.data.corpora:CorpusSource"),
    "criterion": Kind("criteria", "ffgym.plugins.bases:Criterion", "criterion"),
    "export": Kind("exports", "ffgym.export.format:ExportFormat"),
    "family": Kind("families", "ffgym.models.families:Family"),
    "heuristic": Kind("heuristics", "ffgym.plugins.bases:Heuristic", "prior"),
    "metric": Kind("metrics", "ffgym.measure.metrics:Metric"),
    "resource": Kind("resources", "ffgym.costs.resource:Resource", "prune", "resource"),
    "reward": Kind("rewards", "ffgym.plugins.bases:Reward", "reward"),
    "recovery": Kind("recoveries", "ffgym.recover.method:Recovery", "recover", "method"),
}
HOOKS: dict[str, PluginKind] = {kind.hook: name for name, kind in KINDS.items()}


def imported(target: str) -> Any:
    """The object that ``"module:attribute"`` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
