"""Command-line options that set keys of the run configuration, each declared once: its flag and its key.

Help text, default and type are those of the configuration's field. `configured` gives a command the options of some
flags, and hands it the configuration that they describe.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config

PANELS = {
    "What searches": {
        "--agent": "agent.name",
        "--criterion": "criterion.name",
        "--reward": "reward.name",
        "--prior": "prior.name",
        "--init-from": "search.init_from",
        "--episodes": "search.episodes",
        "--seed": "seed",
    },
    "What is made smaller, and by how much": {
        "--model": "model.name",
        "--sparsity": "prune.sparsity",
        "--resource": "prune.resource",
        "--latency-table": "prune.latency_table",
        "--align": "prune.align",
        "--uniform": "prune.uniform",
        "--calibration": "prune.calibration",
        "--recover": "recover.method",
    },
    "Where it goes": {
        "--output": "output.dir",
        "--overwrite": "output.overwrite",
        "--save-at": "output.save_at",
        "--save-all": "output.save_all",
    },
    "Who measures": {
        "--workers": "workers.count",
        "--ray-address": "workers.ray_address",
    },
}
"""What the options of `run` set, by the panel of its help."""
KEYS = {flag: key for keys in PANELS.values() for flag, key in keys.items()}

FileOption = Annotated[Path | None, typer.Option("--config", help="TOML file to start from; options override it")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="any other setting, e.g. prune.min_units=2; repeatable"),
]
OverwriteFileOption = Annotated[bool, typer.Option("--overwrite", help="replace FILE if it exists")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON to stdout and nothing else")]
RootOption = Annotated[str, typer.Option("--root", metavar="DIR", help="folder of the MLflow store")]


def _owner(key: str) -> tuple[Any, str]:
    """The table that holds a key, with its defaults, and the key's name in it."""
    table, _, field_name = key.rpartition(".")
    return (getattr(RunConfig(), table) if table else RunConfig()), field_name


def key_option(flag: str, key: str, **settings: Any) -> Any:
    """An option for one key of the run configuration, whose description and default it shows."""
    owner, field_name = _owner(key)
    field = type(owner).model_fields[field_name]
    default = getattr(owner, field_name)
    shown: Any = "none" if default is None else False if default is False else str(default)
    return typer.Option(flag, help=field.description, show_default=shown, **settings)


ExperimentOption = Annotated[str, key_option("--experiment", "tracking.experiment")]


def configured(flags: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these flags of `KEYS`, with ``--config`` and ``--set``.

    The command takes ``config``, the `RunConfig` that the options describe; its other parameters stay its own options.
    One of them may be ``resume``: the configuration of the run in that folder is then what the options add to.
    """
    names = {flag: parameter_of(flag) for flag in flags}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            file, overrides = given.pop("of_config"), given.pop("of_set")
            values = {KEYS[flag]: given.pop(name) for flag, name in names.items()}
            start = file or _stored(given.get("resume"))
            command(config=load_config(start, overrides or [], **_tables(values)), **given)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
        made = [_parameter(name, _annotation(flag, KEYS[flag])) for flag, name in names.items()]
        made += [_parameter("of_config", FileOption), _parameter("of_set", SetOption)]
        parameters = [*made, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {p.name: p.annotation for p in parameters}
        del with_options.__wrapped__  # typer would read the annotations of the command itself
        return with_options

    return decorate


def parameter_of(flag: str) -> str:
    """What typer calls the option of a flag of `KEYS`."""
    return "of_" + flag.strip("-").replace("-", "_")


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _annotation(flag: str, key: str) -> Any:
    """The option's type: that of the key for numbers and switches, or else text, which the configuration checks."""
    owner, field_name = _owner(key)
    declared = type(owner).model_fields[field_name].annotation
    plain = {int: int | None, bool: bool | None}
    panel = {"rich_help_panel": next(panel for panel, keys in PANELS.items() if flag in keys)}
    if declared in plain:
        return Annotated[plain[declared], key_option(flag, key, **panel)]
    if _names(declared, float) or _names(declared, int):
        return Annotated[str | None, key_option(flag, key, parser=_number_or_text, **panel)]
    return Annotated[str | None, key_option(flag, key, **panel)]


def _names(annotation: Any, kind: type) -> bool:
    """Whether a type stands anywhere in an annotation."""
    return annotation is kind or any(_names(part, kind) for part in get_args(annotation))


def _tables(values: dict[str, Any]) -> dict[str, Any]:
    """``{"prune.align": 8, "seed": 1}`` -> ``{"prune": {"align": 8}, "seed": 1}``."""
    tables: dict[str, Any] = {}
    for key, value in values.items():
        table, _, field_name = key.rpartition(".")
        (tables.setdefault(table, {}) if table else tables)[field_name] = value
    return tables


def _stored(resume: Path | None) -> RunConfig | None:
    """The configuration of the run that is to go on, if there is one."""
    if resume is None:
        return None
    from ffgym.pipeline.folder import stored_config

    return stored_config(resume.expanduser())


def _number_or_text(text: str) -> int | float | str:
    """``"0.2"`` as a number; what is none, such as ``"0.1:0.5"``, stays text for the configuration to check."""
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text
