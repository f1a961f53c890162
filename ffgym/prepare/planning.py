"""The plan of a configuration: from the model's config and the tables of the run, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import torch

from ffgym.config.mixture import described
from ffgym.config.tables import RunConfig
from ffgym.costs.resource import resource_class
from ffgym.data.splits import ROLES, check_window
from ffgym.errors import ConfigError
from ffgym.models.loading import config_of
from ffgym.models.placement import choose_device, choose_dtype, named_dtype, narrower_dtype, tokens_per_batch
from ffgym.plan.machine import free_memory
from ffgym.plan.plan import Plan
from ffgym.plan.shape import ModelShape, RunLoad, shape_of
from ffgym.plugins import manager
from ffgym.plugins.bases import Criterion, Reward
from ffgym.prepare.calibrations import calibration_class, has_ridge_path
from ffgym.prepare.store import is_stored
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
    is_spread = model.device == "balanced"
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if is_spread else [device]
    criterion: Criterion = manager.create("criterion", config.criterion.name, config.criterion.options)
    dtype = choose_dtype(device) if model.dtype == "auto" else named_dtype(model.dtype)
    shape = shape_of(config_of(model.name, revision=model.revision), model.name)
    saved_in = narrower_dtype(shape.saved_as, dtype)
    if device.type != "cpu":
        shape = replace(shape, saved_as="")  # no weights stay in the file
    check_window(data.window, shape.context_limit)
    load = RunLoad(
        window=data.window,
        calibration_tokens=data.whole_tokens("calibration"),
        targets=config.targets,
        dtype=dtype,
        saved_in=saved_in,
        batch_tokens=tokens_per_batch(device),
        choose_ridge=config.prune.ridge == "auto",
        gradients=bool((criterion.needs | needs) & GRADIENT_STATISTICS),
        second_moments="second_moment" in criterion.needs,
        kept=needs,
        episode_tokens=config.episode_windows * data.window,
        episodes_per_update=search.episodes_per_update,
        kernel_step=_mlp_step(config, shape) if dtype is torch.bfloat16 and device.type == "cpu" else 0,
        streamed=model.placement == "stream",
        gpu_workers=-(-len(devices) // (1 if config.workers.gpus == "auto" else max(1, config.workers.gpus))),
    )
    texts: dict[str, str] = {role: described(getattr(data, role)) for role in ROLES}
    return placed(config, Plan(model.name, shape, load, device, sum(map(free_memory, devices)), texts))


def placed(config: RunConfig, plan: Plan) -> Plan:
    """The plan with its layers where the configuration says: ``auto`` streams them where only that fits.

    Raises:
        ConfigError: ``stream``, and the run needs the model in memory.
    """
    placement = config.model.placement
    needs, hint = _what_needs_memory(config, plan.shape)
    if needs and placement == "stream":
        hint = f"{hint}, or set model.placement to resident."
        raise ConfigError(f"model.placement is 'stream', and {needs}", hint=hint)
    plan = replace(plan, unstreamable=needs)
    streamed = replace(plan, load=replace(plan.load, streamed=True))
    return streamed if placement == "auto" and not needs and not plan.fits and streamed.fits else plan


def _what_needs_memory(config: RunConfig, shape: ModelShape) -> tuple[str, str]:
    """Why the layers of a run cannot be streamed, and what to change; empty where they can."""
    criterion: Criterion = manager.create("criterion", config.criterion.name, config.criterion.options)
    if not has_ridge_path(calibration_class(config.prune.calibration)):
        return f"the cache keeps no refits of calibration {config.prune.calibration!r}", "Use --calibration ridge"
    if not is_stored(criterion, config.prune.calibration):
        return (
            "what is prepared, which is then read from the cache, cannot be kept there",
            "Give FFGYM_CACHE_SIZE a size, use a criterion that is a file of a package",
        )
    if shape.has_towers:
        return "a model of several towers is loaded as a whole", "Save its text model by itself, as docs/models.md says"
    if shape.is_quantised:
        return "a quantised checkpoint is dequantised as a whole", "Name a copy of the model that is not quantised"
    if shape.has_experts:
        return f"the experts of {shape.family!r} cannot be read layer by layer", "Use a larger machine"
    if config.model.device == "balanced":
        return "model.device = 'balanced' spreads the layers over GPUs", "Set model.device to cuda"
    if config.recover.method != "none":
        return (
            f"recover.method = {config.recover.method!r} trains a model in memory",
            "Run without it (where the saved model fits, ffgym recover trains it later)",
        )
    reward: Reward = manager.create("reward", config.reward.name, config.reward.options)
    resources = {config.prune.resource, *(reward.resources if "cost" in reward.needs else ())}
    if measured := sorted(name for name in resources if resource_class(name).is_measured()):
        return f"{measured[0]} is measured on a model in memory", "Count another resource, such as params"
    return "", ""


def _mlp_step(config: RunConfig, shape: ModelShape) -> int:
    """Channels by which the widths of MLPs may differ."""
    widest = max(shape.sublayers, key=lambda sublayer: (sublayer.kind == "mlp", sublayer.channels))
    return width_step(widest, config.prune.align)
