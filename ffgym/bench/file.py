"""A bench file: TOML that names agents and seeds, expanded into cells."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ffgym.bench.cell import Cell
from ffgym.config.refusals import config_error
from ffgym.config.tables import RunConfig, Table
from ffgym.config.toml import PLUGIN_TABLES, read_toml, without_foreign_options
from ffgym.errors import ConfigError
from ffgym.prepare import configured


class BenchFile(Table):
    """One bench: a TOML file.

    Attributes:
        title: what the table is called.
        agents: names of agents or heuristics, or of entries of ``variants``.
        seeds: one cell per agent and seed; heuristics, which draw nothing, run the first seed only.
        results: folder of the cells' JSON files, relative to the file.
        baseline: whose final quality the others' tokens are counted to.
        marks: at how many token marks, log-spaced, the incumbent is measured on the report split; the last is the end.
        plain: also measure what was found without any refit.
        run: tables of ``RunConfig`` that all cells share.
        variants: named changes of the configuration, each a set of tables (``agent.name`` says who searches).
    """

    title: str
    agents: list[str] = Field(min_length=1, description="names of agents or heuristics (see: ffgym ls agents)")
    seeds: list[int] = Field(min_length=1, description="whole numbers, one cell per agent and seed, e.g. [0, 1, 2]")
    results: str
    baseline: str = "evolution"
    marks: int = Field(default=6, ge=2)
    plain: bool = False
    run: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A bench file, read and expanded."""

    file: Path
    spec: BenchFile
    cells: tuple[Cell, ...]


def read_bench(file: Path) -> Bench:
    """Read one bench file and expand its cells, every configuration validated."""
    file = file.expanduser()
    try:
        spec = BenchFile.model_validate(read_toml(file))
    except ValidationError as error:
        problem = config_error(error, BenchFile)
        raise ConfigError(f"{file}: {problem.message}", hint=problem.hint) from None
    for key, values in (("agents", spec.agents), ("seeds", spec.seeds)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{file}: {key} = {values} names one of them twice", hint="Name each once.")
    if unused := sorted(set(spec.variants) - set(spec.agents)):
        raise ConfigError(
            f"{file}: variants has {', '.join(map(repr, unused))}, which agents does not name",
            hint=f"Named in agents: {', '.join(spec.agents)}.",
        )
    near = difflib.get_close_matches(spec.baseline, spec.agents, n=1, cutoff=0.75)
    if near and spec.baseline not in spec.agents:  # a typing error; one that is far from all of them is only said
        raise ConfigError(
            f"{file}: baseline {spec.baseline!r} is not one of its agents",
            hint=f"Did you mean {near[0]!r}? Named in agents: {', '.join(spec.agents)}.",
        )
    if "seed" in spec.run or any("seed" in changes for changes in spec.variants.values()):
        raise ConfigError(f"{file} sets `seed` for a run, and a bench runs several", hint="Use `seeds`.")
    folder = file.parent / spec.results
    cells = []
    for label in spec.agents:
        if Path(label).name != label:
            raise ConfigError(f"{file}: agents has {label!r}, which cannot name a file", hint="Leave the slash out.")
        changes = spec.variants.get(label, {"agent": {"name": label}})
        for seed in spec.seeds:
            try:
                config = _resolved(spec.run, changes, seed)
            except ConfigError as error:
                raise ConfigError(f"{file}, {label}: {error.message}", hint=error.hint) from None
            if config.agent.name == "one-shot" and seed != spec.seeds[0]:
                continue
            cells.append(Cell(label, seed, config, folder / f"{label}-seed{seed}.json", spec.marks, spec.plain))
    return Bench(file, spec, tuple(cells))


def _resolved(run: dict[str, Any], changes: dict[str, Any], seed: int) -> RunConfig:
    for name in PLUGIN_TABLES:
        run = without_foreign_options(run, changes, name)
    tables = dict(run)
    for name, table in changes.items():
        shared = run.get(name)
        tables[name] = {**shared, **table} if isinstance(shared, dict) and isinstance(table, dict) else table
    try:
        config = RunConfig.model_validate({**tables, "seed": seed})
    except ValidationError as error:
        raise config_error(error, RunConfig) from None
    return configured.with_options(configured.resolve_agent(config))
