"""Where requests are measured: in this process, so far."""

from ffgym.execute.base import Executor
from ffgym.execute.local import LocalExecutor

__all__ = ["Executor", "LocalExecutor"]
