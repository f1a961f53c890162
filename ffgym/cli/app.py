"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ffgym.errors import FFGymError, is_out_of_memory
from ffgym.files import disk_errors
from ffgym.interrupts import interruptible
from ffgym.version import __version__

OUT_OF_MEMORY = (
    "Set model.placement=stream, model.dtype=bfloat16, model.device=cpu or model.device=balanced over several GPUs, or "
    "use a smaller model."
)
COMMANDS = (
    *("run", "plan", "prepare", "recover", "bench", "eval", "measure", "latency", "export"),
    *("config", "ls", "plugins", "new", "runs", "compare", "report", "sync", "ui", "cache"),
)
# A folder that may not be entered, a name that is too long, links in a circle, a file where a folder should be.
REFUSED_PATH = frozenset({errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR})


def _ended(error: BaseException, message: str, hint: str | None) -> typer.Exit:
    """Print the message and its hint, below the traceback if the environment asks for it; exit 1."""
    if os.environ.get("FFGYM_TRACEBACK") == "1":
        traceback.print_exception(error.__cause__ or error)  # of a plugin's failure, what the plugin raised
    typer.secho(f"error: {message}", fg="red", err=True)
    if hint is not None:
        typer.echo(f"hint: {hint}", err=True)
    return typer.Exit(1)


class Guarded(TyperGroup):
    """Ends a command with a message and exit 1 where it failed for a reason that the user can do something about.

    Such reasons are an `FFGymError`, a path that the system refuses, and too little memory. Ctrl-C means exit 130.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order in which they are used, not in that of their files."""
        return sorted(super().list_commands(ctx), key=COMMANDS.index)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with disk_errors():  # stdout may be a file on a full disk
                return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # typer shows what pydantic calls it
            raise
        except FFGymError as error:
            raise _ended(error, error.message, error.hint) from None
        except OSError as error:
            if error.filename is None or error.errno not in REFUSED_PATH:
                raise
            message = f"{error.filename}: {error.strerror}"
            raise _ended(error, message, "Check the path and its permissions.") from None
        except (RuntimeError, MemoryError) as error:
            if "determine home directory" in str(error):  # of a path that begins with ~NAME
                unknown = "a path begins with ~ and the name of a user whom this machine does not know"
                raise _ended(error, unknown, "Write ./~NAME if the file itself has this name.") from None
            if not is_out_of_memory(error):
                raise
            said = str(error).strip().split("\n")[0]
            raise _ended(error, f"memory is too small{': ' * bool(said)}{said}", OUT_OF_MEMORY) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Guarded,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find out how much of each layer of a language model to remove, and save the smaller model.",
)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Hold the options that come before any command."""
    if version:
        typer.echo(f"ffgym {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the console script ``ffgym``."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # tables hold what ASCII lacks; stderr replaces it by itself
    os.environ["MPLBACKEND"] = "agg"  # notebooks name a backend to all they start, which may not be installed here
    try:
        with interruptible():
            app(prog_name="ffgym")
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C would end torch's clean-up in a traceback
