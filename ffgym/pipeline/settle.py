"""A run's configuration with everything spelled out, and its plugins checked before anything is loaded."""

from __future__ import annotations

from ffgym.config.tables import RunConfig
from ffgym.plugins import manager
from ffgym.prepare import configured
from ffgym.prepare.parts import make_reward
from ffgym.recover.recover import check_method


def settle(config: RunConfig) -> RunConfig:
    """Let a heuristic stand in for an agent, check every plugin, and spell out all their options."""
    config = configured.resolve_agent(config)
    check_plugins(config)
    return configured.with_options(config)


def check_plugins(config: RunConfig) -> None:
    """Create every plugin that a run names once, so that a wrong name or option fails before anything is loaded.

    Raises:
        ConfigError: an agent that cannot do what the run asks of it, see :func:`configured.check_agent_fits`.
        PluginError, UnknownNameError: as `manager.create`.
    """
    configured.check_agent_fits(config)
    manager.create("calibration", config.prune.calibration)
    manager.create("criterion", config.criterion.name, config.criterion.options)
    make_reward(config)
    if config.prior.name != "none":
        manager.create("heuristic", config.prior.name, config.prior.options)
    if config.recover.method != "none":
        check_method(config.recover, config.model.name)
