"""Where requests are measured and whole cells run: this process, or several."""

from ffgym.execute.base import Executor
from ffgym.execute.local import LocalExecutor

__all__ = ["Executor", "LocalExecutor"]
