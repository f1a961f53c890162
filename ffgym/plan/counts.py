"""What every stage of a run holds in memory and computes: pure functions of the shape of a model and the load of a run.

Memory is counted at each stage's peak, in bytes that are alive at the same time. The counts follow the code that they
name, and experiments/scale/memory.py compares them with what processes really need.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch

from ffgym.evaluation.perplexity import TILE_COLUMNS, TILE_ROWS
from ffgym.models.placement import KEPT_KERNELS
from ffgym.models.walk import LOGIT_ROWS
from ffgym.plan.shape import ModelShape, RunLoad
from ffgym.prepare.paths import GRADIENT_SHARE, HELD_OUT_ROWS, held_out_windows
from ffgym.pruning.calibration import SKETCHED
from ffgym.pruning.factors import WIDE, factor_bytes, grid
from ffgym.pruning.statistics import BLOCK, kept_bytes

LIBRARIES = 390_000_000  # Python, torch, transformers, the tokenizer and the text; measured
TRACKING = 100_000_000  # what drawing pictures and saving load in addition; measured
# Code that oneDNN makes for the products of a sublayer at one more width and keeps until the process ends, and what it
# keeps for each of the products that were used last; both measured.
KERNELS, LAST_KERNELS = 800_000, 400_000
# Bytes for each entry of an n x n moment while `ffgym.prepare.paths` chooses a lambda: two covariances and a moment in
# float32, and of 3/4 of the channels a copy and its factor. A narrow consumer's moment is in float64, and a wide one's
# copy becomes its factor.
FACTORISING, FACTORISING_WIDE = 25, 15
# Bytes for each entry of a moment, and for each weight of its consumer, while a criterion that asks for moments orders
# units: three in float32, and one with its weights that `ffgym.criteria.obs` inverts and halves in float64.
INVERTING, INVERTING_WEIGHTS = 26, 16
TRIED = 3  # lambdas that choosing one takes, at most 3/4 of the channels
LOADING_SECONDS = 3.0  # tokenising text and building modules; measured
LOADED_BYTES = 1e9  # a second
BACKWARD = 2  # a walk backwards in forward passes
FORWARD_ATTENTION = 5  # tensors of the residual stream's width that are alive in the attention of a batch
FORWARD_MLP = 3  # of the intermediate width in its MLP
# Tensors of each width that a layer's graph and its backward pass hold, measured; and the bytes for each logit of the
# loss: the model's, in float32, its logarithm, and their gradients. A divergence takes the second number more, for the
# logits of the dense model and the terms that it sums.
GRAPH_RESIDUALS, GRAPH_ATTENTION, GRAPH_MLP, LOGIT_BYTES, DIVERGING_BYTES = 6, 6, 6, 16, 12


@dataclass(frozen=True)
class Operations:
    """Floating-point operations, a multiplication and an addition being two, by what decides their speed."""

    model: float = 0.0  # of the model's layers and head, in its dtype
    float32: float = 0.0  # of products in float32: moments and refits
    float64: float = 0.0  # of factorisations

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Operations:
        return Operations(*(getattr(self, f.name) * times for f in fields(self)))

    @property
    def total(self) -> float:
        """All of them."""
        return self.model + self.float32 + self.float64

    def seconds(self, speed: Operations) -> float:
        """How long they take at so many a second."""
        return self.model / speed.model + self.float32 / speed.float32 + self.float64 / speed.float64


@dataclass(frozen=True)
class PlannedStage:
    """What one stage of a run needs."""

    name: str  # "load", "prepare", "search", "finals", "report", "save", "recover"
    tokens: int  # how many go through the model
    operations: Operations
    # bytes at the peak, by what holds them; empty where that is not known
    memory: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0  # in addition to what the operations take
    # Shares of the operations, and into how many equal parts workers divide each; empty where workers do not help.
    parts: tuple[tuple[float, int], ...] = ()

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    @property
    def largest_part(self) -> str:
        """What holds most of them; empty where that is not known."""
        return max(self.memory, key=lambda name: self.memory[name], default="")


def stages(shape: ModelShape, load: RunLoad) -> list[PlannedStage]:
    """The stages of a run, in order; those that it does not have are left out."""
    wanted = {
        _load: True,
        _prepare: True,
        _search: load.episode_tokens,
        _finals: load.finalists,
        _report: load.report_rows,
        _save: load.saves,
        _recover: load.train_tokens,
    }
    return [count(shape, load) for count, is_wanted in wanted.items() if is_wanted]


# --- parts that are there whatever a stage does -----------------------------------------------------------------------


def weights(shape: ModelShape, load: RunLoad) -> int:
    """Bytes of the dense weights."""
    return shape.parameters * load.dtype.itemsize


def factors(shape: ModelShape) -> int:
    """Bytes of the refit factors of all sublayers, B (m x n) and D (n x n, its triangle)."""
    return sum(factor_bytes(shape.hidden, sublayer.channels) for sublayer in shape.sublayers)


def moments(shape: ModelShape) -> int:
    """Bytes of the moments of one layer, which are all that exist at a time."""
    return 4 * (shape.widest("attention") ** 2 + shape.widest("mlp") ** 2)


def store(shape: ModelShape, load: RunLoad) -> int:
    """Bytes of the prepared model on disk."""
    return factors(shape) + _kept_statistics(shape, load)


def saved_model(shape: ModelShape, load: RunLoad, sparsity: float) -> int:
    """Bytes of a saved model."""
    return round((shape.parameters - sparsity * shape.prunable) * load.saved_dtype.itemsize)


def saved_models(shape: ModelShape, load: RunLoad) -> int:
    """Bytes of all models that are saved."""
    return sum(saved_model(shape, load, sparsity) for sparsity in load.saves)


def hidden_states(shape: ModelShape, load: RunLoad, tokens: int) -> int:
    """Bytes of the residual stream at some tokens."""
    return tokens * shape.hidden * load.dtype.itemsize


def _kept_statistics(shape: ModelShape, load: RunLoad) -> int:
    return sum(kept_bytes(shape.hidden, s.channels, load.kept) for s in shape.sublayers)


def _at_a_time(shape: ModelShape, load: RunLoad, size: int, layers: int = 1) -> int:
    """Bytes in memory at a time, of the size of all layers: all of it, or so many layers where they are streamed."""
    return size * layers // (len(shape.sublayers) // 2) if load.streamed else size


def _own_weights(shape: ModelShape, load: RunLoad) -> int:
    """Bytes of the weights in this process's own memory: those neither converted nor permuted stay in the file."""
    if load.streamed:  # the layer at work, the next one, and what belongs to no layer
        layers = _at_a_time(shape, load, shape.prunable, layers=2)
        return (shape.parameters - shape.prunable + layers) * load.dtype.itemsize
    is_converted = shape.saved_as != load.dtype_name
    return (shape.parameters if is_converted else shape.prunable) * load.dtype.itemsize


def _prepared(shape: ModelShape, load: RunLoad) -> dict[str, int]:
    return {
        "libraries": LIBRARIES,
        "weights": _own_weights(shape, load),
        "factors": _at_a_time(shape, load, factors(shape) + _kept_statistics(shape, load)),
    }


def _searched(shape: ModelShape, load: RunLoad, rows: int = 0) -> dict[str, int]:
    """A prepared model, the dense model's last states if rewards need them, and code for the widths used so far.

    The widths are those of a search and of so many rows of the report.
    """
    finals = load.finalists * len(load.targets)
    allocations = (load.episodes_per_update * load.updates + finals) * load.searches + rows
    met = allocations * len(shape.sublayers) // 2
    widths = min(met, shape.widest("mlp") // load.kernel_step) if load.kernel_step else 0
    kernels = KERNELS * widths + LAST_KERNELS * min(2 * widths, KEPT_KERNELS)
    states = hidden_states(shape, load, load.diverging * load.search_tokens)
    return {**_prepared(shape, load), "kernels": kernels, "dense states": states}


def _finished(shape: ModelShape, load: RunLoad) -> dict[str, int]:
    """What the stages after a search hold: the libraries that draw and save too, and the consumers of a cut model."""
    kept = load.most_kept * sum(s.channels for s in shape.sublayers)
    consumers = _at_a_time(shape, load, round(kept * shape.hidden * load.dtype.itemsize))
    held = _searched(shape, load, load.report_rows)
    return held | {"libraries": LIBRARIES + TRACKING, "refitted consumers": consumers}


def _activations(shape: ModelShape, load: RunLoad, tokens: int) -> int:
    """Bytes of a forward pass through one layer, and of the tiles of logits after the last one."""
    tokens = min(tokens, max(load.batch_tokens, load.window))
    attention = FORWARD_ATTENTION * max(shape.hidden, shape.widest("attention"))
    tiles = TILE_ROWS * TILE_COLUMNS * (torch.float32.itemsize + load.dtype.itemsize)
    return tokens * load.dtype.itemsize * max(attention, FORWARD_MLP * shape.widest("mlp")) + tiles


# --- operations -------------------------------------------------------------------------------------------------------


def forward(shape: ModelShape, load: RunLoad, *, sparsity: float = 0.0, head: bool = True) -> float:
    """Operations of one token through the layers, and through the head."""
    attention = 2 * load.window * sum(s.channels for s in shape.sublayers if s.kind == "attention")
    experts = sum(s.units * s.unit_params for s in shape.sublayers if s.kind == "experts")
    layers = (1 - sparsity) * (2 * (shape.prunable - experts) + attention) + 2 * shape.active_experts
    return layers + (2 * shape.head if head else 0)


def refit(shape: ModelShape, sparsity: float, allocations: int = 1) -> float:
    """Operations of the refits of allocations that are measured together.

    One sweep down the grid, to twice the sparsity, serves them all; each starts from the grid's next level above it.
    """
    total = 0.0
    for sublayer in shape.sublayers:
        n = sublayer.channels
        levels = grid(n)
        kept, least = (1 - sparsity) * n, max(0, 1 - 2 * sparsity) * n
        total += shape.hidden * (n**2 - least**2)
        total += allocations * shape.hidden * (-levels.step if levels else n) * kept
    return total


def factorise(shape: ModelShape, load: RunLoad) -> Operations:
    """Operations of choosing lambda and factorising, over all sublayers."""
    total, m = Operations(), shape.hidden
    for sublayer in shape.sublayers:
        n = sublayer.channels
        cubes = 2 * n**3 / 3
        total += Operations(0, cubes + m * n**2) if n > WIDE else Operations(0, 0, cubes + 2 * m * n**2)
        if load.choose_ridge:
            k, rows = 3 * n // 4, min(HELD_OUT_ROWS, load.calibration_tokens)
            total += Operations(0, TRIED * (k**3 / 3 + 2 * SKETCHED * k * (k + rows)))
    return total


def _products(load: RunLoad, operations: float) -> Operations:
    """Operations of products that round their factors to the model's dtype."""
    return Operations(operations) if load.dtype is torch.bfloat16 else Operations(0, operations)


# --- stages -----------------------------------------------------------------------------------------------------------


def _load(shape: ModelShape, load: RunLoad) -> PlannedStage:
    seconds = LOADING_SECONDS + weights(shape, load) / LOADED_BYTES
    memory = {"libraries": LIBRARIES, "weights": _own_weights(shape, load)}
    return PlannedStage("load", 0, Operations(), memory, seconds)


def _prepare(shape: ModelShape, load: RunLoad) -> PlannedStage:
    tokens, n = load.calibration_tokens, max(shape.widest("attention"), shape.widest("mlp"))
    blocks = sum(s.channels * (s.channels + min(s.channels, BLOCK)) for s in shape.sublayers)  # up to the diagonal
    operations = (Operations(forward(shape, load, head=False)) + _products(load, blocks)) * tokens
    operations += factorise(shape, load)
    held_out = 0
    if load.choose_ridge:
        held_out = held_out_windows(-(-tokens // load.window), load.window) * load.window
    inputs = held_out * load.dtype.itemsize * (shape.widest("attention") + shape.widest("mlp"))
    gradients = 0
    if load.gradients:
        sample = int(GRADIENT_SHARE * tokens)
        operations += Operations((2 + BACKWARD) * forward(shape, load)) * sample
        gradients = sum(4 * shape.hidden * (s.channels + shape.hidden) for s in shape.sublayers)
    moments = (FACTORISING if n <= WIDE else FACTORISING_WIDE) * n**2
    if load.second_moments:
        moments = max(moments, INVERTING * n**2 + INVERTING_WEIGHTS * shape.hidden * n)
    memory = {
        **_prepared(shape, load),
        "gradients": _at_a_time(shape, load, gradients),
        "hidden states": hidden_states(shape, load, tokens) + inputs,
        "moments": moments,
    }
    if load.is_prepared:  # needs as much memory all the same, in case its store turns out to be damaged
        return PlannedStage("prepare", 0, Operations(), memory, store(shape, load) / LOADED_BYTES)
    return PlannedStage("prepare", tokens, operations, memory)


def _measure(shape: ModelShape, load: RunLoad, name: str, allocations: int, tokens: int, times: int) -> PlannedStage:
    """A number of allocations measured together, each on so many tokens, so many times."""
    heads = 2 * shape.head * load.diverging  # the dense model's last states go through it again
    operations = Operations(forward(shape, load, sparsity=load.sparsity) + heads, 0) * (allocations * tokens)
    operations += _products(load, refit(shape, load.sparsity, allocations))
    own = -(-allocations // load.workers)
    kept = load.most_kept * (shape.widest("attention") + shape.widest("mlp"))
    memory = {
        **_searched(shape, load),
        "hidden states": 2 * own * hidden_states(shape, load, tokens),
        "refitted consumers": round(own * kept * shape.hidden * load.dtype.itemsize) + 12 * shape.hidden * round(kept),
        "activations": _activations(shape, load, tokens),
    }
    return PlannedStage(name, allocations * tokens * times, operations * times, memory)


def _search(shape: ModelShape, load: RunLoad) -> PlannedStage:
    found = _measure(shape, load, "search", load.episodes_per_update, load.episode_tokens, load.updates * load.searches)
    met = min(load.search_tokens, load.updates * load.texts * load.episode_tokens)
    known = 0 if load.diverging else load.known_tokens  # losses are kept from run to run, states are not
    dense = Operations(forward(shape, load)) * max(0, met - known)
    memory = found.memory
    if load.slopes:
        slopes = _slopes(shape, load)
        # One after the other: losses, the gradient at the last layer, and layer by layer back to the first.
        memory = memory | {"activations": max(0, memory["activations"] - slopes), "slopes": slopes}
    return replace(found, operations=found.operations + dense, memory=memory, parts=load.parts)


def _slopes(shape: ModelShape, load: RunLoad) -> int:
    """Bytes of the states before each layer, and of what needs more: some rows of logits, or a layer's graph."""
    states = (len(shape.sublayers) // 2 + 1) * hidden_states(shape, load, load.episode_tokens)
    attention, mlp = shape.widest("attention"), shape.widest("mlp")
    graph = load.window * (GRAPH_RESIDUALS * shape.hidden + GRAPH_ATTENTION * attention + GRAPH_MLP * mlp)
    logits = LOGIT_ROWS * shape.vocabulary * (LOGIT_BYTES + DIVERGING_BYTES * load.diverging)
    return states + max(graph * load.dtype.itemsize, logits)


def _finals(shape: ModelShape, load: RunLoad) -> PlannedStage:
    found = _measure(shape, load, "finals", load.finalists, load.final_tokens, load.searches * len(load.targets))
    return replace(found, parts=((1.0, max(1, load.finalists * load.final_tokens // load.window)),))


def _report(shape: ModelShape, load: RunLoad) -> PlannedStage:
    tokens = load.report_rows * load.report_tokens
    operations = Operations(forward(shape, load, sparsity=load.sparsity)) * tokens
    operations += _products(load, refit(shape, load.sparsity)) * load.report_rows
    memory = {
        **_finished(shape, load),
        "hidden states": hidden_states(shape, load, load.report_tokens),
        "activations": _activations(shape, load, load.report_tokens),
    }
    return PlannedStage("report", tokens, operations, memory)


def _save(shape: ModelShape, load: RunLoad) -> PlannedStage:
    # safetensors writes from the tensors' own memory; layers of a streamed model are copied, and what is converted.
    is_copied = load.streamed or load.saved_in is not None
    saved = _at_a_time(shape, load, saved_model(shape, load, min(load.saves)), layers=2) if is_copied else 0
    return PlannedStage("save", 0, Operations(), {**_finished(shape, load), "saved model": saved})


def _recover(shape: ModelShape, load: RunLoad) -> PlannedStage:
    passes = (1 + BACKWARD) * forward(shape, load, sparsity=load.sparsity)
    return PlannedStage("recover", load.train_tokens, Operations(passes) * load.train_tokens)
