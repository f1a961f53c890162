"""``run(config)``: what can be refused at once is, before what computes is imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ffgym.config.tables import RunConfig
from ffgym.errors import ConfigError
from ffgym.pipeline.folder import check_output, reopen_folder
from ffgym.plugins import manager
from ffgym.plugins.architectures import check_folder_architecture
from ffgym.prepare import configured

if TYPE_CHECKING:
    from ffgym.pipeline.result import RunResult


def run(config: RunConfig, *, progress: Console | None = None, resume: str | Path | None = None) -> RunResult:
    """Search, prune, calibrate, report and save, as the configuration says.

    Args:
        config: everything that decides the run.
        progress: where progress goes; stderr, or the cell of a notebook, where left out.
        resume: folder of an interrupted run of this configuration to go on with, in the same MLflow run; it ends with
            the numbers that it would have ended with uninterrupted.

    Returns:
        the result of the run; that of a resumed run that was already finished is read from its folder: nothing is
            done again.

    Raises:
        FFGymError: what cannot be done, and what to do about it; the MLflow run is marked FAILED.
        KeyboardInterrupt: Ctrl-C; what was found so far is saved and printed, the MLflow run is marked KILLED.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"run takes a RunConfig, and got {type(config).__name__}",
            hint="Pass load_config(PATH), or load_config(**tables).",
        )
    if not isinstance(progress, Console | None):
        raise ConfigError(
            f"progress takes a rich.console.Console, and got {type(progress).__name__}",
            hint="Leave it out, or pass Console(quiet=True) to hear nothing.",
        )
    config = settle(config)
    if resume is None:
        check_output(config)
    else:
        resume = reopen_folder(Path(resume), config)
    from ffgym.pipeline.pipeline import run_stages

    return run_stages(config, progress, resume)


def settle(config: RunConfig) -> RunConfig:
    """Let a heuristic stand in for an agent, check that agent and model fit, and spell out all options of plugins."""
    check_folder_architecture(config.model.name)
    config = configured.resolve_agent(config)
    configured.check_agent_fits(config)
    return configured.with_options(config)


def check_inputs(config: RunConfig, *, is_resumed: bool = False) -> None:
    """Refuse bad plugins, texts and measurements before weights are loaded; a resumed run has measured by itself."""
    from ffgym.prepare.parts import check_measurements, check_texts  # torch

    check_plugins(config)
    check_texts(config.data)
    if not is_resumed:
        check_measurements(config)


def check_plugins(config: RunConfig) -> None:
    """Create the plugins of a settled configuration once, so that what they refuse fails before anything is loaded."""
    from ffgym.prepare.parts import make_reward  # torch
    from ffgym.recover.recover import check_method

    manager.create("calibration", config.prune.calibration)
    manager.create("criterion", config.criterion.name, config.criterion.options)
    make_reward(config)
    if config.prior.name != "none":
        manager.create("heuristic", config.prior.name, config.prior.options)
    if config.recover.method != "none":
        check_method(config.recover, config.model.name)
