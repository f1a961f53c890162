"""A bench file: TOML that names agents and seeds, expanded into cells."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from ffgym.bench.cell import Cell
from ffgym.config.refusals import config_error
from ffgym.config.tables import RunConfig
from ffgym.config.toml import layered
from ffgym.errors import ConfigError, UnknownNameError
from ffgym.files import FileFormat, Strict
from ffgym.plugins import manager
from ffgym.prepare import configured

BENCH_FILE = FileFormat("bench file", dict[str, Any], ConfigError, "docs/bench.md shows one.")


class BenchFile(Strict):
    """One bench: a TOML file."""

    title: str = Field(description="what the table is called")
    agents: list[str] = Field(
        min_length=1, description="names of agents or heuristics (see: ffgym ls agents), or variants"
    )
    seeds: list[int] = Field(
        min_length=1,
        description="whole numbers, one cell per agent and seed, e.g. [0, 1, 2]; heuristics run the first one only",
    )
    more_seeds: dict[str, list[int]] = Field(default_factory=dict, description="further seeds of some agents, by label")
    results: str = Field(description="folder of the cells' JSON files, relative to the file")
    baseline: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field(
        default_factory=lambda: ["evolution"],
        description="whose final quality the others' tokens are counted to; one label, or several",
    )
    marks: int = Field(
        default=6,
        ge=2,
        description="at how many token marks the incumbent is measured, at least 2; the last is the end",
    )
    plain: bool = Field(default=False, description="also measure what was found without any refit")
    dated: str = Field(
        default="",
        description="when an earlier version computed the results: they are shown, and nothing is checked or computed",
    )
    run: dict[str, Any] = Field(default_factory=dict, description="tables of a run's configuration, for all cells")
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="changes of these tables by name; agent.name says who searches, and the name of an agent needs it",
    )

    def seeds_of(self, label: str) -> list[int]:
        """The seeds that an agent runs."""
        return [*self.seeds, *self.more_seeds.get(label, [])]

    @property
    def seeds_in_words(self) -> str:
        """``0, 1 (cma-es: also 2)``."""
        more = "; ".join(f"{label}: also {', '.join(map(str, seeds))}" for label, seeds in self.more_seeds.items())
        return ", ".join(map(str, self.seeds)) + (f" ({more})" if more else "")


@dataclass(frozen=True)
class Bench:
    """A bench file, read and expanded."""

    file: Path
    spec: BenchFile
    cells: tuple[Cell, ...]  # what it computes; none where its results are dated

    @property
    def results(self) -> list[Path]:
        """The result files that are there."""
        labels = ((label, seed) for label in self.spec.agents for seed in self.spec.seeds_of(label))
        dated = (result_file(self.file, self.spec, *each) for each in labels)
        files = dated if self.spec.dated else (cell.path for cell in self.cells)
        return [path for path in files if path.exists()]


def result_file(file: Path, spec: BenchFile, label: str, seed: int) -> Path:
    """Where the result of an agent with a seed is."""
    return file.parent / spec.results / f"{label}-seed{seed}.json"


def read_bench(file: Path) -> Bench:
    """Read one bench file and expand its cells, every configuration validated."""
    file = file.expanduser()
    content = BENCH_FILE.read(file)
    if content.keys() & set(RunConfig.model_fields) and not content.keys() & set(BenchFile.model_fields):
        raise ConfigError(
            f"{file} configures one run: it names no agents and seeds, as a bench file does",
            hint=f"Run it: ffgym run --config {shlex.quote(str(file))}. To bench it, put its tables below [run]; see "
            "docs/bench.md.",
        )
    try:
        spec = BenchFile.model_validate(content)
    except ValidationError as error:
        problem = config_error(error, BenchFile)
        raise ConfigError(f"{file}: {problem.message}", hint=problem.hint or BENCH_FILE.hint) from None
    lists: dict[str, Sequence[object]] = {"agents": spec.agents, "seeds": spec.seeds}
    lists |= {f"seeds and more_seeds.{label}": spec.seeds_of(label) for label in spec.more_seeds}
    for key, values in lists.items():
        if len(set(values)) < len(values):
            raise ConfigError(f"{file}: {key} = {values} names one of them twice", hint="Name each once.")
    for table, labels in (("variants", spec.variants), ("more_seeds", spec.more_seeds)):
        if unused := sorted(set(labels) - set(spec.agents)):
            raise ConfigError(
                f"{file}: {table} has {', '.join(map(repr, unused))}, which agents does not name",
                hint=f"Named in agents: {', '.join(spec.agents)}.",
            )
    for baseline in spec.baseline if "baseline" in spec.model_fields_set else ():  # the default need not be there
        if baseline not in spec.agents:
            unknown = UnknownNameError("baseline", baseline, spec.agents)
            raise ConfigError(f"{file}: {unknown.message}", hint=unknown.hint)
    if "seed" in spec.run or any("seed" in changes for changes in spec.variants.values()):
        raise ConfigError(f"{file} sets `seed` for a run, and a bench runs several", hint="Use `seeds`.")
    if spec.dated:
        return Bench(file, spec, ())
    cells = []
    for label in spec.agents:
        if Path(label).name != label:
            raise ConfigError(f"{file}: agents has {label!r}, which cannot name a file", hint="Leave the slash out.")
        _check_is_known(file, label, spec.variants)
        changes = spec.variants.get(label, {"agent": {"name": label}})
        _check_says_who_searches(file, label, changes)
        for number, seed in enumerate(spec.seeds_of(label)):
            try:
                config = _resolved(spec, changes, seed)
            except ConfigError as error:
                raise ConfigError(f"{file}, {label}: {error.message}", hint=error.hint) from None
            if not config.searches and label in spec.more_seeds:
                raise ConfigError(
                    f"{file}: more_seeds has {label!r}, a heuristic, which draws no random numbers and runs one seed",
                    hint="Leave it out of more_seeds.",
                )
            if not config.searches and seed != spec.seeds[0]:
                continue
            path = result_file(file, spec, label, seed)
            cells.append(Cell(label, seed, config, path, file, spec.title, number, spec.marks, spec.plain))
    return Bench(file, spec, tuple(cells))


def _check_is_known(file: Path, label: str, variants: dict[str, dict[str, Any]]) -> None:
    """Refuse a label that is no variant of the file, no agent and no heuristic."""
    if label not in variants and not (manager.is_name("agent", label) or manager.is_name("heuristic", label)):
        known = {*variants, *manager.names("agent"), *manager.names("heuristic")}
        unknown = UnknownNameError("agent, heuristic or variant", label, known)
        raise ConfigError(f"{file}: {unknown.message}", hint=manager.with_plugins(str(unknown.hint), label))


def _check_says_who_searches(file: Path, label: str, changes: dict[str, Any]) -> None:
    """Refuse a variant that is named after an agent and leaves to ``run`` who searches: the table would name another.

    Whoever changes one setting of an agent means that agent; but a bench of criteria may call a variant ``random`` too.
    """
    agent = changes.get("agent", {})
    is_said = not isinstance(agent, dict) or "name" in agent
    if not is_said and (manager.is_name("agent", label) or manager.is_name("heuristic", label)):
        raise ConfigError(
            f"{file}: the variant {label!r} has the name of an agent or heuristic, and does not say who searches",
            hint=f'Set agent.name = "{label}" in it, or name another agent, or give the variant another name.',
        )


def _resolved(spec: BenchFile, changes: dict[str, Any], seed: int) -> RunConfig:
    try:
        config = RunConfig.model_validate(layered(spec.run, {**changes, "seed": seed}))
    except ValidationError as error:
        raise config_error(error, RunConfig) from None
    return configured.with_options(configured.resolve_agent(config))
