"""The hooks of the entry point group ``ffgym``: each returns a list of classes.

A plugin implements the hooks it has something for, in the module that its entry point names::

    @ffgym.hookimpl
    def ffgym_criteria():
        return [MyCriterion]
"""

from __future__ import annotations

import pluggy

from ffgym.plugins.bases import Agent, Criterion, Heuristic, Plugin, Reward

GROUP = "ffgym"
"""The entry point group that plugins are found in, and the name of the pluggy project."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
"""Decorator that marks a function as a plugin's answer to the hook of the same name."""


@hookspec
def ffgym_agents() -> list[type[Agent]]:
    """Classes that search."""
    return []


@hookspec
def ffgym_calibrations() -> list[type[Plugin]]:
    """Classes that refit consumers after units were removed, children of ``ffgym.Calibration``."""
    return []


@hookspec
def ffgym_corpora() -> list[type[Plugin]]:
    """Classes that read text by name, children of ``ffgym.CorpusSource``."""
    return []


@hookspec
def ffgym_criteria() -> list[type[Criterion]]:
    """Classes that score channels."""
    return []


@hookspec
def ffgym_exports() -> list[type[Plugin]]:
    """Classes that write a saved model for another program, children of ``ffgym.ExportFormat``."""
    return []


@hookspec
def ffgym_families() -> list[type[Plugin]]:
    """Classes that say what an architecture calls its parts, children of ``ffgym.Family``."""
    return []


@hookspec
def ffgym_heuristics() -> list[type[Heuristic]]:
    """Classes that give importances without any episode."""
    return []


@hookspec
def ffgym_metrics() -> list[type[Plugin]]:
    """Classes that score a model in ``ffgym eval``, children of ``ffgym.Metric``."""
    return []


@hookspec
def ffgym_resources() -> list[type[Plugin]]:
    """Subclasses of `ffgym.Resource`: what a budget counts."""
    return []


@hookspec
def ffgym_rewards() -> list[type[Reward]]:
    """Classes that turn a measurement into one number."""
    return []


@hookspec
def ffgym_recoveries() -> list[type[Plugin]]:
    """Classes that train a pruned model, each a ``ffgym.Recovery``."""
    return []
