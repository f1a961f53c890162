"""The frozen dataclasses, and the types of callbacks, that cross rooms.

torch appears in annotations only, so importing this costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

Kind = Literal["attention", "mlp", "experts"]
Bos = Literal["every", "first", "none"]  # which windows of a text begin with BOS
Ramp = Literal["none", "cubic", "staircase"]
OnShare = Callable[[float], None]  # called with the share that is done, from 0 to 1
OnStep = Callable[[int, int], None]  # called with steps done, and steps
Notify = Callable[[str], None]  # called with lines for the user


def do_nothing(*_: object) -> None:
    """The callback where none is given."""


@dataclass(frozen=True)
class Sublayer:
    """The attention or the other half of one decoder layer, and what one of its units is made of.

    A unit is a KV group (attention: one key/value head with all its query heads), the attention as a whole where its
    family cannot be cut by heads, an intermediate channel (MLP), or an expert (mixture of experts).

    Attributes:
        layer: index of the decoder layer, from 0.
        kind: ``"attention"``, ``"mlp"`` or ``"experts"``.
        units: how many units the dense sublayer has.
        channels_per_unit: consumer input columns that one unit owns, contiguous; 1 for an expert.
        unit_params: parameters that go with one unit: producer rows, their biases and consumer columns; an expert's
            weights and its row of the router.
        unit_macs: multiply-accumulates per token that go with one unit (no attention scores). A token passes through
            as many experts as before when one is gone, so of an expert this is its row of the router.
        query_heads_per_unit: query heads in one unit of an attention; 0 for an MLP.
        kv_heads_per_unit: key/value heads in one unit of an attention: 1, or all of them.
        head_dim: channels of one head; 0 for an MLP.
        depth: decoder layers in the model, so that rules about ends need nothing else.
        experts_per_token: experts that each token is sent to; so many have to stay. 0 for attention and MLPs.
    """

    layer: int
    kind: Kind
    units: int
    channels_per_unit: int
    unit_params: int = 0
    unit_macs: int = 0
    query_heads_per_unit: int = 0
    kv_heads_per_unit: int = 1
    head_dim: int = 0
    depth: int = 1
    experts_per_token: int = 0

    @property
    def name(self) -> str:
        """``"layer 3 mlp"``: what messages, tables and pictures call it."""
        return f"layer {self.layer} {self.kind}"

    @property
    def heads_per_unit(self) -> tuple[int, int, int]:
        """Query, key and value heads in one unit of an attention."""
        return self.query_heads_per_unit, self.kv_heads_per_unit, self.kv_heads_per_unit

    @property
    def channels(self) -> int:
        """Consumer input columns of the dense sublayer."""
        return self.units * self.channels_per_unit

    def idle_params(self, kept: int) -> int:
        """Parameters that one token does not pass through where so many units are kept: all experts but its own."""
        others = kept - self.experts_per_token if self.kind == "experts" else 0
        return others * (self.unit_params - self.unit_macs)


@dataclass(frozen=True)
class LayerStats:
    """What the calibration split says about the inputs x of one consumer (n channels, m outputs).

    Only what was asked for is there; the rest is ``None``. All tensors are float32 or float64 on the CPU or the
    model's device.

    Attributes:
        tokens: how many tokens the averages run over.
        mean: E[x], shape (n,).
        square: E[x^2], shape (n,).
        second_moment: E[x x^T], shape (n, n).
        gradient: dL/dW of the mean token loss (nats) with respect to the consumer's weight, shape (m, n).
        output_gradient: E[g g^T] of g, the gradient of a window's summed token loss (nats) with respect to the
            consumer's output at one token, shape (m, m): the empirical Fisher information of the output.
        channels_per_unit: each unit owns so many contiguous channels, which go together.
    """

    tokens: int = 0
    mean: torch.Tensor | None = None
    square: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    output_gradient: torch.Tensor | None = None
    channels_per_unit: int = 1

    @property
    def variance(self) -> torch.Tensor:
        """Var[x] per channel, shape (n,); needs ``mean`` and ``square``."""
        assert self.mean is not None, "needs mean"
        assert self.square is not None, "needs square"
        return (self.square - self.mean**2).clamp_min(0)


@dataclass(frozen=True)
class SublayerView:
    """Everything a heuristic may look at: one sublayer's facts, weight, statistics and pruning path.

    Channels and units stand in path order: the most important first.

    Attributes:
        sublayer: its facts.
        weight: the consumer's dense weight, shape (m, n), the model's dtype.
        stats: what the heuristic's ``needs`` asked for.
        unit_scores: the criterion's score of each unit, shape (units,), non-increasing.
        removal_error: output error that is left after calibration when the first k units are kept, and the ridge term
            of the refit: E||W x - W'_k x_k||^2 + l' ||W - W'_k||^2, where what W'_k leaves out counts as zeros, and x
            is centred where the bias moves too; for k = 0 .. units, shape (units + 1,), non-increasing.
        output_energy: E||W x||^2, what ``removal_error`` is measured against.
        loss_increase: where ``output_gradient`` was asked for, the second-order estimate of what keeping the first k
            units costs in nats per token, shape (units + 1,), non-increasing; else ``None``.
    """

    sublayer: Sublayer
    weight: torch.Tensor
    stats: LayerStats
    unit_scores: torch.Tensor
    removal_error: np.ndarray
    output_energy: float
    loss_increase: np.ndarray | None = None


@dataclass(frozen=True)
class Allocation:
    """How many units each sublayer keeps, and what that costs.

    Attributes:
        kept: units kept per sublayer, length 2L, in the order layer 0 attention, layer 0 mlp, layer 1 attention, ...
        cost: what the kept units cost in the budget's resource.
        dense_cost: what all prunable units cost in it.
        resource: name of that resource.
    """

    kept: tuple[int, ...]
    cost: float
    dense_cost: float
    resource: str = "params"

    @property
    def sparsity(self) -> float:
        """Share of the resource removed over the prunable sublayers, in [0, 1]."""
        return 1.0 - self.cost / self.dense_cost


def perplexity_of(loss: float) -> float:
    """exp(loss); infinite where it overflows."""
    return math.inf if loss > 700 else math.exp(loss)


@dataclass(frozen=True)
class Evaluation:
    """What one model was measured to be: its losses on some windows of one split, and what a reward ``needs`` beside.

    Only what was asked for is there; the rest is ``None``. P is the dense model's distribution of the next token, Q
    that of the model at hand, for the dense model itself P = Q.

    Attributes:
        losses: mean next-token loss of each window in nats per token, shape (windows,), float64.
        tokens_per_window: predicted tokens in each window.
        kls: ``kl``: mean KL(P || Q) of each window in nats per token, shape (windows,).
        reverse_kls: ``reverse_kl``: mean KL(Q || P) of each window in nats per token, shape (windows,).
        accuracy: ``accuracy``: share of the update's task examples that are answered right, mean over tasks, in [0, 1].
        costs: ``cost``: what the prunable sublayers cost, by resource, in the resource's unit.
        slopes: ``slopes``, which agents ask for: first-order change, as each unit joins, of what the reward falls with,
            else of the loss, in nats per token, shape (units,), float64, for every sublayer; 0 for units far from the
            level that was measured.
    """

    losses: tuple[float, ...]
    tokens_per_window: int
    kls: tuple[float, ...] | None = None
    reverse_kls: tuple[float, ...] | None = None
    accuracy: float | None = None
    costs: Mapping[str, float] | None = None
    slopes: tuple[np.ndarray, ...] | None = field(default=None, compare=False)

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return sum(self.losses) / len(self.losses)

    @property
    def finite(self) -> bool:
        """Whether losses and divergences are numbers: whether the model still works."""
        return all(map(math.isfinite, (*self.losses, *(self.kls or ()), *(self.reverse_kls or ()))))

    @property
    def kl(self) -> float:
        """Mean KL(P || Q) in nats per token; needs ``kl``."""
        assert self.kls is not None, "kl is None: it was not measured"
        return sum(self.kls) / len(self.kls)

    @property
    def reverse_kl(self) -> float:
        """Mean KL(Q || P) in nats per token; needs ``reverse_kl``."""
        assert self.reverse_kls is not None, "reverse_kl is None: it was not measured"
        return sum(self.reverse_kls) / len(self.reverse_kls)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where it overflows."""
        return perplexity_of(self.loss)


@dataclass(frozen=True, eq=False)  # no ==: its action is an array
class Episode:
    """One decision and what came of it: the row that histories, trackers and pictures are made of.

    Attributes:
        index: from 0, over the whole search.
        update: the vector step it belongs to, from 0; all episodes of one update share its text, or every mirrored
            pair has text of its own.
        action: the importances, shape (2L,), float32, in [-1, 1].
        kept: units kept per sublayer.
        reward: what the agent received.
        loss: pruned loss in nats per token on the update's subset.
        dense_loss: dense loss on the same windows.
        target_sparsity: what the schedule asked for.
        sparsity: what the projection reached.
        fidelity: share of ``episode_tokens`` it was measured on.
        tokens: tokens it was measured on, which count in the search's token budget.
        failed: the loss was not finite, so the reward is the reward's ``worst``.
        objectives: what the reward says it weighs, by name, higher = better; empty where it weighs nothing, or failed.
        slopes: derivative by each importance, at ``action``, of what the reward falls with, else of the loss, length
            2L, nats per token; empty where nobody asked for it.
        slope_tokens: how many of ``tokens`` the passes took that the slopes are from.
        windows: indices of the search windows it was measured on.
        examples: indices of the task examples it was measured on.
    """

    index: int
    update: int
    action: np.ndarray
    kept: tuple[int, ...]
    reward: float
    loss: float
    dense_loss: float
    target_sparsity: float
    sparsity: float
    fidelity: float
    tokens: int
    failed: bool = False
    objectives: dict[str, float] = field(default_factory=dict)
    slopes: tuple[float, ...] = ()
    slope_tokens: int = 0
    windows: tuple[int, ...] = ()
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class Update:
    """What an agent reports after one policy update: numbers about the policy, for progress bars and trackers.

    Attributes:
        index: the update, from 0.
        rewards: the rewards of its episodes, shape (episodes,).
        diagnostics: e.g. ``{"policy/spread": 0.21}``.
    """

    index: int
    rewards: np.ndarray
    diagnostics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PluginRecord:
    """One row of ``ffgym plugins``.

    Attributes:
        name: the entry point's name, or ``built-in``.
        package: distribution that ships it.
        version: that distribution's version.
        provides: ``{"criterion": ["output-energy"], ...}``.
        failure: why it could not be loaded; ``None`` when it was.
    """

    name: str
    package: str
    version: str
    provides: dict[str, list[str]]
    failure: str | None = None


JSONDict = dict[str, Any]
