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
    """Sizes of a dense model, from its config alone."""

    family: str  # name of its family
    parameters: int  # of the whole model, tied ones once
    hidden: int  # channels of the residual stream, m of every consumer
    vocabulary: int  # tokens that the head projects to
    sublayers: tuple[Sublayer, ...]  # its 2L sublayers, in order of depth
    context_limit: int  # the longest window that the model takes, in tokens
    saved_as: str = ""  # dtype of its checkpoint, e.g. "bfloat16"; empty where the config does not say
    has_towers: bool = False  # it is the text model of a checkpoint of several towers
    is_quantised: bool = False  # its checkpoint holds codes in place of weights

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
class RunLoad:
    """What a run does, in tokens and counts."""

    window: int  # tokens of a window
    calibration_tokens: int  # of the calibration split
    targets: tuple[float, ...]  # share of the prunable parameters that is removed, at each point of a front, rising
    dtype: torch.dtype  # of weights and activations
    batch_tokens: int  # tokens of one forward pass
    choose_ridge: bool = True  # lambda is chosen on held-out windows
    gradients: bool = False  # first-order statistics are wanted
    second_moments: bool = False  # the criterion asks for second moments, and may factorise them
    kept: frozenset[str] = frozenset()  # statistics that sublayers keep for heuristics
    episode_tokens: int = 0  # of an episode, with its task examples; 0 for no search
    episodes_per_update: int = 1  # episodes that are measured together
    updates: int = 1  # of one search
    slopes: bool = False  # an episode of a search may be measured with slopes
    diverging: bool = False  # the reward compares distributions with the dense model's
    searches: int = 1  # how many searches there are: the agent's, and that of random allocations
    texts: int = 1  # on which the episodes of an update are measured; 1 where all share it
    search_tokens: int = 0  # of the search split; what the dense model loses on a window is measured once
    is_prepared: bool = False  # the model has been prepared before, and its store is there
    known_tokens: int = 0  # on which its losses are known from earlier searches
    finalists: int = 0  # allocations that are measured together in the finals; 0 for none
    final_tokens: int = 0  # that each of them is measured on, on average
    report_tokens: int = 0  # of the report split
    report_rows: int = 0  # models that are measured on it
    saves: tuple[float, ...] = ()  # target of each model that is saved
    saved_in: torch.dtype | None = None  # dtype of saved models, where it is narrower
    train_tokens: int = 0  # to recover on; 0 for none
    workers: int = 1  # processes that share the parts of an update
    # Shares of what the searches compute, and into how many parts workers divide an update of each.
    parts: tuple[tuple[float, int], ...] = ((1.0, 1),)
    elsewhere: bool = False  # they are on a cluster, and not all on this machine
    gpu_workers: int = 1  # of those on this machine, how many find room on the GPUs that this process uses
    # Channels by which the widths of MLPs differ, where products make code for every shape, as bfloat16 ones do on a
    # CPU; 0 elsewhere.
    kernel_step: int = 0
    streamed: bool = False  # layers are read from the checkpoint as they run (``model.placement``)

    @property
    def sparsity(self) -> float:
        """The mean target: what is computed is the mean over them."""
        return sum(self.targets) / len(self.targets)

    @property
    def most_kept(self) -> float:
        """What is kept at the lowest target: what is in memory is the most of them all."""
        return 1 - self.targets[0]

    @property
    def saved_dtype(self) -> torch.dtype:
        """The dtype of saved models."""
        return self.saved_in or self.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype as a config says it, e.g. ``"bfloat16"``."""
        return str(self.dtype).removeprefix("torch.")


def skeleton_of(config: Any, name: str) -> Any:
    """The model that a transformers config describes, on the meta device: every shape, and no memory of its size.

    Args:
        config: of a causal LM, or of a checkpoint of several towers, whose text model is meant.
        name: what the user called it.

    Raises:
        ModelError: a config that no model can be made from.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(_text_config(config))
    except Exception as error:  # wrong values fail in as many ways as there are layers
        if is_out_of_memory(error):
            raise
        raise loading_error(error, name, name) from error


def shape_of(config: Any, name: str) -> ModelShape:
    """The shape of that model; see `skeleton_of` for the arguments.

    Raises:
        ModelError: an unsupported architecture, or a config that no model can be made from.
    """
    model, text = skeleton_of(config, name), _text_config(config)
    family, saved_as = family_of(model), config.dtype or text.dtype
    return ModelShape(
        family.name,
        sum(parameter.numel() for parameter in model.parameters()),
        text.hidden_size,  # an OPT may have narrower embeddings
        model.get_output_embeddings().weight.shape[0],
        tuple(family.sublayers(model)),
        int(text.max_position_embeddings),
        "" if saved_as is None else str(saved_as).removeprefix("torch."),
        has_towers=text is not config,
        is_quantised=getattr(text, "quantization_config", None) is not None,
    )


def _text_config(config: Any) -> Any:
    return config.text_config if has_towers(config.to_dict()) else config
