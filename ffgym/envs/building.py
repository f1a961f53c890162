"""From plain data to an environment: what ``gymnasium.make("ffgym/Pruning-v0", ...)`` calls."""

from __future__ import annotations

from typing import Any

import torch

from ffgym.config import RunConfig
from ffgym.data.splits import Splits, make_splits
from ffgym.envs.pruning_env import PruningEnv
from ffgym.models.capture import OnProgress
from ffgym.models.families import family_of
from ffgym.models.loading import LoadedModel, load
from ffgym.models.preparation import Prepared, prepare
from ffgym.plugins import manager
from ffgym.pruning.budget import Budget


def load_parts(config: RunConfig) -> tuple[LoadedModel, Splits]:
    """Load the model and cut the three splits."""
    loaded = load(
        config.model.name, revision=config.model.revision, dtype=config.model.dtype, device=config.model.device
    )
    return loaded, make_splits(config.data, loaded.tokenizer, context_limit=loaded.context_limit)


def tokens_per_batch(device: torch.device | str) -> int:
    """Tokens of one forward pass: what keeps the caches warm on a CPU, and an accelerator busy."""
    return 4096 if torch.device(device).type == "cpu" else 16384


def prepare_model(
    config: RunConfig,
    loaded: LoadedModel,
    windows: torch.Tensor,
    *,
    keep: frozenset[str] = frozenset(),
    on_progress: OnProgress | None = None,
) -> Prepared:
    """Statistics, order and refits as the configuration says."""
    return prepare(
        loaded.model,
        manager.create("criterion", config.criterion.name, config.criterion.options),
        windows,
        calibration=config.prune.calibration,
        ridge=None if config.prune.ridge == "auto" else float(config.prune.ridge),
        keep=keep,
        tokens_per_batch=tokens_per_batch(loaded.device),
        on_progress=on_progress,
    )


def make_budget(config: RunConfig, model: Any) -> Budget:
    """The budget of a run on a dense model.

    Raises:
        BudgetError: the sparsity is out of reach.
        ModelError: a stock checkpoint is asked for, which the family does not have, or not with this calibration.
    """
    family, prune = family_of(model), config.prune
    if prune.uniform and prune.calibration == "affine":
        family.check_stock_biases(model)
    budget = Budget(
        family.sublayers(model),
        resource=prune.resource,
        min_units=prune.min_units,
        align=prune.align,
        shapes=family.stock_shapes(model) if prune.uniform else None,
        context=prune.context,
        kv_bytes=model.get_output_embeddings().weight.element_size(),
    )
    budget.check(prune.ends[1])
    return budget


def build_env(config: RunConfig, prepared: Prepared, windows: torch.Tensor, budget: Budget) -> PruningEnv:
    """The stationary environment of a run.

    Args:
        config: the run.
        prepared: model with paths.
        windows: search split, shape (windows, length), int64.
        budget: see ``make_budget``.
    """
    return PruningEnv(
        prepared.prunable,
        manager.create("reward", config.reward.name, config.reward.options),
        windows,
        budget,
        sparsity=config.prune.target,
        episode_windows=-(-config.search.episode_tokens // config.data.window),
        calibrated=config.prune.calibration != "none",
        tokens_per_batch=tokens_per_batch(prepared.prunable.model.device),
    )


def make_pruning_env(config: RunConfig | dict[str, Any] | None = None, **tables: Any) -> PruningEnv:
    """Build the environment from plain data.

    Args:
        config: a ``RunConfig`` or the same as nested dicts; defaults where left out.
        tables: tables of the configuration, e.g. ``prune={"sparsity": 0.3}``.
    """
    if config is None or isinstance(config, dict):
        config = RunConfig.model_validate({**(config or {}), **tables})
    loaded, splits = load_parts(config)
    budget = make_budget(config, loaded.model)
    prepared = prepare_model(config, loaded, splits.calibration.windows)
    return build_env(config, prepared, splits.search.windows, budget)
