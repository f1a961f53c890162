"""The plan of a configuration: from the model's config and the tables of the run, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import torch

from ffgym.config.mixture import described
from ffgym.config.tables import RunConfig
from ffgym.data.splits import ROLES, check_window
from ffgym.errors import ConfigError
from ffgym.models.loading import config_of
from ffgym.models.placement import choose_device, choose_dtype, named_dtype, tokens_per_batch
from ffgym.plan.machine import free_memory
from ffgym.plan.plan import Plan
from ffgym.plan.shape import ModelShape, Workload, shape_of
from ffgym.plugins import manager
from ffgym.pruning.budget import width_step
from ffgym.pruning.statistics import GRADIENT_STATISTICS


def plan_of(config: RunConfig, needs: frozenset[str] = frozenset()) -> Plan:
    """The plan of preparing a model and measuring an update of episodes, on this machine.

    Args:
        needs: statistics that its heuristics ask for.

    Raises:
        ModelError: the model's architecture is not supported, or its config is missing or damaged.
        DataError: windows that are longer than the model's context.
    """
    data, model, search = config.data, config.model, config.search
    device = choose_device(model.device)
    criterion = manager.create("criterion", config.criterion.name, config.criterion.options)
    dtype = choose_dtype(device) if model.dtype == "auto" else named_dtype(model.dtype)
    shape = shape_of(config_of(model.name, revision=model.revision), model.name)
    check_window(data.window, shape.context_limit)
    load = Workload(
        window=data.window,
        calibration_tokens=data.whole_tokens("calibration"),
        sparsity=config.prune.ends[1],
        dtype=dtype,
        batch_tokens=tokens_per_batch(device),
        choose_ridge=config.prune.ridge == "auto",
        gradients=bool((criterion.needs | needs) & GRADIENT_STATISTICS),
        second_moments="second_moment" in needs,
        episode_tokens=-(-search.episode_tokens // data.window) * data.window,
        episodes_per_update=search.episodes_per_update,
        kernel_step=_mlp_step(config, shape) if dtype is torch.bfloat16 and device.type == "cpu" else 0,
        streamed=model.placement == "stream",
    )
    texts: dict[str, str] = {role: described(getattr(data, role)) for role in ROLES}
    return placed(config, Plan(model.name, shape, load, device, free_memory(device), texts))


def placed(config: RunConfig, plan: Plan) -> Plan:
    """The plan with its layers where the configuration says: ``auto`` streams them where only that fits."""
    table = config.model
    if table.placement == "stream" and plan.shape.has_experts:
        raise ConfigError(
            f"model.placement = 'stream' cannot read the experts of {plan.shape.family!r} layer by layer",
            hint="Set model.placement to 'resident', or use a larger machine.",
        )
    if table.placement != "auto" or table.device == "balanced" or plan.fits or plan.shape.has_experts:
        return plan
    streamed = replace(plan, load=replace(plan.load, streamed=True))
    return streamed if streamed.fits else plan


def _mlp_step(config: RunConfig, shape: ModelShape) -> int:
    """Channels by which the widths of MLPs may differ."""
    widest = max(shape.sublayers, key=lambda sublayer: (sublayer.kind == "mlp", sublayer.channels))
    return width_step(widest, config.prune.align)
