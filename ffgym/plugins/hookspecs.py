"""The hooks of the entry point group ``ffgym``, one for each kind of plugin: each returns a list of classes.

A plugin implements the hooks it has something for, in the module that its entry point names::

    @ffgym.hookimpl
    def ffgym_criteria():
        return [MyCriterion]
"""

from __future__ import annotations

from collections.abc import Callable

import pluggy

from ffgym.plugins.bases import Plugin
from ffgym.plugins.kinds import KINDS, Kind

GROUP = "ffgym"
"""The entry point group that plugins are found in, and the name of the pluggy project."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
"""Decorator that marks a function as a plugin's answer to the hook of the same name."""


def _specification(kind: Kind) -> Callable[[], list[type[Plugin]]]:
    def classes() -> list[type[Plugin]]:
        return []

    classes.__name__, classes.__doc__ = kind.hook, f"Subclasses of ``{kind.base}``."
    return hookspec(classes)


globals().update({kind.hook: _specification(kind) for kind in KINDS.values()})
