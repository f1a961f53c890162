"""Writes a new plugin's package from templates: what ``ffgym new`` does."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

from ffgym.errors import OutputError, PluginError
from ffgym.files import OUTPUT_OPTION, replacing, write_text
from ffgym.plugins import manager
from ffgym.plugins.kinds import KINDS

NewKind = Literal["criterion", "agent", "reward", "heuristic", "resource"]

NAME = re.compile("[a-z][a-z0-9]*([-_][a-z0-9]+)*")
OPTIONS: dict[NewKind, str] = {
    "criterion": "--criterion",
    "agent": "--agent",
    "reward": "--reward",
    "heuristic": "--prior",
    "resource": "--resource",
}


def write_package(kind: NewKind, name: str, parent: Path) -> Path:
    """Write the package ``ffgym-NAME``, which installs, passes its conformance test and runs; returns its folder.

    Raises:
        OutputError: the folder exists, or cannot be written.
        PluginError: the name is taken, or cannot be one.
    """
    package, module = f"ffgym-{name}", f"ffgym_{name}".replace("-", "_")
    cls = "".join(part.capitalize() for part in re.split("[-_]", name))
    _check_name(kind, name, module, cls)
    folder = parent / package
    if folder.exists():
        raise OutputError(f"{folder} exists already", hint="Choose another name, or another folder with --output.")
    words = {"kind": kind, "name": name, "package": package, "module": module, "base": kind.capitalize(), "cls": cls}
    words["option"] = OPTIONS[kind]
    places = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{kind}.py": f"{module}/__init__.py",
        "test.py": f"tests/test_{module.removeprefix('ffgym_')}.py",
    }
    with replacing(folder, OUTPUT_OPTION) as part:
        for template, place in places.items():
            text = files("ffgym.plugins").joinpath("templates", f"{template}.template").read_text("utf-8")
            write_text(part / place, Template(text).substitute(words))
    return folder


def _check_name(kind: NewKind, name: str, module: str, cls: str) -> None:
    if not NAME.fullmatch(name):
        near = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        guess = f" Did you mean {near!r}?" if near else ""
        raise PluginError(
            f"{name!r} cannot be a plugin's name: its module and its class are named after it",
            hint=f"Use lower-case letters and digits, with - and _ between them; begin with a letter.{guess}",
        )
    if keyword.iskeyword(cls):
        raise PluginError(f"a plugin cannot be called {name!r}: no class can be {cls}", hint="Choose another name.")
    if manager.is_name(kind, name):
        raise PluginError(
            f"{kind} {name!r} exists already, in package {manager.package_of(manager.get_class(kind, name))}",
            hint=f"Choose another name; `ffgym ls {KINDS[kind].plural}` lists those that are taken.",
        )
    if importlib.util.find_spec(module) is not None:
        raise PluginError(f"a package {module} is installed already", hint="Choose another name.")
