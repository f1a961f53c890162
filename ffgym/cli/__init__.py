"""The command line: one file a group of commands, which register with the app as they are imported.

Everything heavy is imported inside the command that needs it.
"""

from ffgym.cli import bench, cache, export, measure, plugins, recover, results, run, runs  # noqa: F401
from ffgym.cli.app import app, main

__all__ = ["app", "main"]
