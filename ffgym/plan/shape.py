"""What a plan is computed from: the shape of a model, and what a run does with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ffgym.errors import is_out_of_memory
from ffgym.models.families import family_of
from ffgym.models.loading_errors import loading_error, quiet
from ffgym.models.towers import has_towers
from ffgym.types import Kind, Sublayer


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense model, from its config alone.

    Attributes:
        family: name of its family.
        parameters: of the whole model, tied ones once.
        hidden: channels of the residual stream, m of every consumer.
        vocabulary: tokens that the head projects to.
        sublayers: its 2L sublayers, in order of depth.
        context_limit: the longest window that the model takes, in tokens.
        saved_as: dtype of its checkpoint, e.g. ``"bfloat16"``; empty where the config does not say.
        has_towers: it is the text model of a checkpoint of several towers.
    """

    family: str
    parameters: int
    hidden: int
    vocabulary: int
    sublayers: tuple[Sublayer, ...]
    context_limit: int
    saved_as: str = ""
    has_towers: bool = False

    @property
    def prunable(self) -> int:
        """Parameters that pruning may remove."""
        return sum(s.units * s.unit_params for s in self.sublayers)

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden

    def widest(self, kind: Kind) -> int:
        """Input channels of the widest consumer of a kind, n; 0 where there is none."""
        return max((s.channels for s in self.sublayers if s.kind == kind), default=0)

    @property
    def has_experts(self) -> bool:
        """Whether a layer has a mixture of experts in place of an MLP."""
        return any(s.kind == "experts" for s in self.sublayers)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token passes through: all of them but other tokens' experts."""
        return self.parameters - sum(s.idle_params(s.units) for s in self.sublayers)

    @property
    def active_experts(self) -> int:
        """Parameters of the experts that a token passes through."""
        return sum(s.experts_per_token * s.unit_params for s in self.sublayers)


@dataclass(frozen=True)
class Workload:
    """What a run does, in tokens and counts.

    Attributes:
        window: tokens of a window.
        calibration_tokens: of the calibration split.
        sparsity: share of the prunable parameters that is removed.
        dtype: of weights and activations.
        batch_tokens: tokens of one forward pass.
        choose_ridge: lambda is chosen on held-out windows.
        gradients: first-order statistics are wanted.
        kept: statistics that sublayers keep for heuristics.
        episode_tokens: of an episode; 0 for no search.
        episodes_per_update: episodes that are measured together.
        updates: of one search.
        slopes: an episode of a search may be measured with slopes.
        searches: how many searches there are: the agent's, and that of random allocations.
        texts: on which the episodes of an update are measured; 1 where all share it.
        search_tokens: of the search split; what the dense model loses on a window is measured once.
        is_prepared: the model has been prepared before, and its store is there.
        known_tokens: on which its losses are known from earlier searches.
        start_texts: on which the allocation that the search started from is measured.
        finalists: allocations that are measured together in the finals; 0 for none.
        final_tokens: that each of them is measured on, on average.
        targets: points of the front.
        report_tokens: of the report split.
        report_rows: models that are measured on it.
        sequential: models that are refitted layer by layer at the end.
        choice_tokens: of the search split, on which either refit of such a model is measured to choose one.
        saves: models that are saved.
        train_tokens: to recover on; 0 for none.
        workers: processes that share the episodes of an update.
        elsewhere: they are on a cluster, and not all on this machine.
        gpu_workers: of those on this machine, how many find room on the GPUs that this process uses.
        kernel_step: channels by which the widths of MLPs differ, where products make code for every shape, as bfloat16
            ones do on a CPU; 0 elsewhere.
        streamed: layers are read from the checkpoint as they run (``model.placement``).
    """

    window: int
    calibration_tokens: int
    sparsity: float
    dtype: torch.dtype
    batch_tokens: int
    choose_ridge: bool = True
    gradients: bool = False
    kept: frozenset[str] = frozenset()
    episode_tokens: int = 0
    episodes_per_update: int = 1
    updates: int = 1
    slopes: bool = False
    searches: int = 1
    texts: int = 1
    search_tokens: int = 0
    is_prepared: bool = False
    known_tokens: int = 0
    start_texts: int = 0
    finalists: int = 0
    final_tokens: int = 0
    targets: int = 1
    report_tokens: int = 0
    report_rows: int = 0
    sequential: int = 0
    choice_tokens: int = 0
    saves: int = 0
    train_tokens: int = 0
    workers: int = 1
    elsewhere: bool = False
    gpu_workers: int = 1
    kernel_step: int = 0
    streamed: bool = False

    @property
    def dtype_name(self) -> str:
        """The dtype as a config says it, e.g. ``"bfloat16"``."""
        return str(self.dtype).removeprefix("torch.")


def shape_of(config: Any, name: str) -> ModelShape:
    """The shape of the model that a transformers config describes; no memory of its size is needed.

    Args:
        config: of a causal LM, or of a checkpoint of several towers, whose text model is meant.
        name: what the user called it.

    Raises:
        ModelError: an unsupported architecture, or a config that no model can be made from.
    """
    from transformers import AutoModelForCausalLM

    is_whole = not has_towers(config.to_dict())
    config = config if is_whole else config.text_config
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # wrong values fail in as many ways as there are layers
        if is_out_of_memory(error):
            raise
        raise loading_error(error, name, name) from error
    family = family_of(model)
    saved_as = getattr(config, "dtype", None)
    return ModelShape(
        family.name,
        sum(parameter.numel() for parameter in model.parameters()),
        model.get_input_embeddings().weight.shape[1],
        model.get_output_embeddings().weight.shape[0],
        tuple(family.sublayers(model)),
        int(config.max_position_embeddings),
        "" if saved_as is None else str(saved_as).removeprefix("torch."),
        has_towers=not is_whole,
    )
