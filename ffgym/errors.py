"""What goes wrong, said so that the reader knows the thing, the value, the allowed range and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class FFGymError(Exception):
    """Base of every error that ffgym raises on purpose.

    The command line prints the message and the hint without a traceback and exits with 1.

    Args:
        message: what is wrong: the thing, its value, what was allowed.
        hint: the next step, in the imperative.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way from one process to another, whatever arguments a child takes."""
        return _restored, (type(self), self.args, self.__dict__)


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or what it announces: the next, a traceback's last; or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *others = lines or [type(error).__name__]
    others = others[-1:] if others and others[0].startswith("Traceback") else others
    return f"{first} {others[0]}" if first.endswith(":") and others else first


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small, a device's or the machine's.

    torch says so with an error of its own on CUDA, and with plain RuntimeErrors elsewhere: for mps, for cuBLAS, for a
    CUDA context, and for the CPU.
    """
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    signs = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def raising_if_out_of_memory(instead: FFGymError) -> Iterator[None]:
    """Raise this error where memory is too small for the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise instead from error


def _restored(cls: type[FFGymError], args: tuple[Any, ...], state: dict[str, Any]) -> FFGymError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class ConfigError(FFGymError):
    """A configuration table holds an unknown key, a mistyped value or a combination that cannot run."""


class AssetError(FFGymError):
    """A pinned asset could not be fetched, verified or stored."""


class DataError(FFGymError):
    """A corpus is missing, too short for what was asked of it, or its splits would touch."""


class ModelError(FFGymError):
    """A checkpoint is missing, damaged, of an unsupported family, or pickled."""


class FitError(FFGymError):
    """What is asked for needs more memory than there is."""


class BudgetError(FFGymError):
    """The wanted sparsity lies outside what the allowed levels can reach."""


class CalibrationError(FFGymError):
    """Second moments that cannot be factorised, or statistics that do not fit the weight."""


class RecoveryError(FFGymError):
    """Training after pruning cannot start, go on or end: a missing package, a foreign checkpoint, a loss of NaN."""


class PluginError(FFGymError):
    """A plugin failed to load, or broke its contract; the message names the plugin."""


class UnknownNameError(FFGymError):
    """A name that nothing is registered under; the hint holds the near match and the list.

    Args:
        kind: what was looked for, e.g. ``"criterion"``.
        name: the name as given.
        known: every registered name of that kind.
        listed: the names to list, where all of them would fill the screen.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], *, listed: Iterable[str] | None = None) -> None:
        names = sorted(known)
        head = name.partition("_")[0]  # qwen2 for qwen2_5_vl_text
        alike = [head] if head in names else difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        near = max(alike, key=lambda word: sum(name.startswith(word[: n + 1]) for n in range(len(word))), default=None)
        guess = f"Did you mean {near!r}? " if near else ""
        shown = names if listed is None else list(listed)
        label = "Known" if listed is None else "Among those known"
        super().__init__(f"unknown {kind} {name!r}", hint=f"{guess}{label}: {', '.join(shown) or 'none'}.")


class OutputError(FFGymError):
    """A folder exists and is not empty, is read-only, or the disk is full."""


class TrackingError(FFGymError):
    """The MLflow store cannot be opened or written."""


class WorkerError(FFGymError):
    """A process that computed in parallel was ended from outside."""
