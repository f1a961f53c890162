"""Recovery that is not linear: each MLP learns, by gradient descent, what the dense MLP in its place put out.

Layers are taken first to last. With x the dense model's input to an MLP, x~ what the pruned model gives to its own (the
layers before it are finished by then), and all weights of the pruned MLP as the unknowns theta:

    minimise  E || MLP_theta(x~) - MLP_dense(x) ||^2

Gate, up and down (fc1 and fc2) move together, through the activation. Adam starts at the weights as they are. Each
layer keeps the weights that fitted held-out text best, the ones it began with among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.func import functional_call

from ffgym.errors import RecoveryError, raising_if_out_of_memory
from ffgym.models.families import Family, dense_or_pruned_family_of, family_of_pair
from ffgym.models.walk import Stream, Walk, arguments_of
from ffgym.recover.method import Recovery, TrainingOutcome, TrainingSetup
from ffgym.recover.training import LARGEST_GRADIENT, batch_at, diverged, rate_at
from ffgym.report.layout import counted

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerFit:
    """What training one MLP brought."""

    layer: int  # from 0
    before: float  # E||MLP(x~) - y||^2 / E||y||^2 on held-out text, y the dense MLP's output
    after: float  # the same with the weights that were kept
    step: int  # the number of steps done by those


class DistilMLP(Recovery):
    """Each MLP learns, layer by layer, what the dense MLP in its place puts out."""

    name = "distil-mlp"
    learning_rate = 3e-4
    needs_dense = True

    def train(self, setup: TrainingSetup) -> TrainingOutcome:
        """Train every MLP towards the dense one; each keeps the weights that fit held-out text best."""
        steps = steps_of(setup)
        layers = dense_or_pruned_family_of(setup.model).layers(setup.model)
        with setup.progress(len(layers) * steps) as stage:

            def on_step(layer: int, step: int, error: float) -> None:
                stage.advance(layer * steps + step - stage.done, f"layer {layer}, error {error:.4f}")

            def on_layer(fit: LayerFit) -> None:
                stage.advance((fit.layer + 1) * steps - stage.done)
                setup.log([("error_before", fit.before, fit.layer), ("error_after", fit.after, fit.layer)])

            short = RecoveryError(
                "training ran out of memory",
                hint="Lower recover.tokens: the states of all its windows are in memory. Or set model.device=cpu.",
            )
            with raising_if_out_of_memory(short):
                fits = distil_mlps(setup, on_step, on_layer)
        return TrainingOutcome(
            summary=f"Every MLP was trained by Adam towards the output of the dense one, layer by layer on the pruned "
            f"model's own states: {counted(steps, 'step')} of {setup.batch_tokens:,} tokens each at up to "
            f"{setup.learning_rate:g}, seed {setup.seed}.",
            kept="the trained weights were kept",
            curve={"layers": [asdict(fit) for fit in fits]},
        )


def steps_of(setup: TrainingSetup) -> int:
    """Optimiser steps of each layer."""
    return -(-setup.tokens // setup.batch_tokens)


@torch.enable_grad()  # Ctrl-C in the middle of an earlier block without gradients may have left them off
def distil_mlps(
    setup: TrainingSetup, on_step: Callable[[int, int, float], None], on_layer: Callable[[LayerFit], None]
) -> list[LayerFit]:
    """Train every MLP of the pruned model, in place, layer by layer.

    A finished layer is a part of the checkpoint, so that Ctrl-C costs one layer at most, and the same call goes on; the
    result has then, on a CPU with the same number of threads, the same bits.

    The hidden states of all windows are held for both models, and one MLP's inputs and targets beside them.

    Args:
        setup: the order of the dense model's units does not matter. Each step draws its tokens from all windows.
        on_step: called with (layer, steps done, relative error of the batch) after every step.
        on_layer: called after every layer that was trained, also one that was read from the checkpoint.

    Raises:
        ModelError: the two models do not fit.
        RecoveryError: an error that is not finite, or layers without an MLP.
    """
    family = family_of_pair(setup.model, setup.dense, hint="Name the model that was pruned, with --model.")
    checkpoint, walks = setup.checkpoint, (Walk(setup.dense), Walk(setup.model))
    if any(family.expert_modules(layer) for layer in walks[0].layers):
        raise RecoveryError(
            f"distil-mlp trains MLPs, and layers of a {family.name} model have experts instead",
            hint="Use lora, which trains the attention of such a model.",
        )
    streams = [_Streams(*walks, family, ids, setup.tokens_per_pass) for ids in (setup.windows, setup.held_out)]
    fits: list[LayerFit] = []
    for index, layer in enumerate(walks[1].layers):
        mlp = family.mlp(layer) if family.has_half(layer, "mlp") else None
        saved = None if checkpoint is None else checkpoint.load(_part(index), LayerFit)
        pairs = [stream.dense_step(index, wanted=saved is None and mlp is not None) for stream in streams]
        if mlp is not None:
            if checkpoint is not None and saved is not None:
                tensors, fit = saved
                with checkpoint.taking_up(_part(index)):
                    _put(mlp, tensors)
            else:
                best, fit = _train(mlp, index, pairs[0], pairs[1], setup, on_step)
                _put(mlp, best)
                if checkpoint is not None:
                    checkpoint.save(_part(index), best, asdict(fit))
            fits.append(fit)
            on_layer(fit)
        for stream in streams:
            stream.pruned_step(index)
    return fits


class _Streams:
    """The hidden states of some windows on their way through both models."""

    @torch.no_grad()
    def __init__(self, dense: Walk, pruned: Walk, family: Family, windows: torch.Tensor, tokens_per_batch: int) -> None:
        self._family = family
        batches = torch.split(windows, max(1, tokens_per_batch // windows.shape[1]))
        self._dense, self._pruned = Stream(dense, batches), Stream(pruned, batches)

    @torch.no_grad()
    def dense_step(self, index: int, *, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Move the dense states behind a layer.

        Returns:
            x~ and y of the layer's MLP, each of shape (tokens, d), the models' dtype.
        """
        outputs: list[torch.Tensor] = []
        consumer = self._family.consumer(self._dense.walk.layers[index], "mlp")
        with consumer.register_forward_hook(lambda _, __, output: outputs.append(output.flatten(0, -2))):
            self._dense.step(index)
        if not wanted:
            return torch.empty(0), torch.empty(0)
        producer = self._family.producers(self._pruned.walk.layers[index], "mlp")[0]
        calls = [arguments_of(producer, run) for run in self._pruned.runs(index)]
        inputs = torch.cat([args[0].flatten(0, -2) for args, _ in calls])
        return inputs, torch.cat(outputs).to(inputs.device)

    @torch.no_grad()
    def pruned_step(self, index: int) -> None:
        """Move the pruned states behind a layer, whose MLP is finished."""
        self._pruned.step(index)


def _train(
    mlp: nn.Module,
    layer: int,
    fitted: tuple[torch.Tensor, torch.Tensor],
    held_out: tuple[torch.Tensor, torch.Tensor],
    setup: TrainingSetup,
    on_step: Callable[[int, int, float], None],
) -> tuple[Weights, LayerFit]:
    """The weights, in float32, that fitted the held-out pairs best."""
    inputs, targets = fitted
    scale = float(targets.float().square().mean()) or 1.0
    weights = {name: p.detach().float().clone().requires_grad_() for name, p in mlp.named_parameters()}
    optimiser = torch.optim.Adam(weights.values(), lr=setup.learning_rate)
    before = least = _error(mlp, weights, *held_out)
    best, chosen = _copy(weights), 0
    size, steps = min(setup.batch_tokens, len(inputs)), steps_of(setup)
    for step in range(steps if before != 0 else 0):
        indices = torch.from_numpy(batch_at(step, size, len(inputs), [setup.seed, layer])).to(inputs.device)
        loss = (_output(mlp, weights, inputs[indices]) - targets[indices].float()).square().mean() / scale
        value = float(loss.detach())
        if not math.isfinite(value):
            raise diverged(f"the error of layer {layer}'s MLP is {value} at step {step + 1}", setup.learning_rate)
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, steps, setup.learning_rate)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights.values(), LARGEST_GRADIENT)
        optimiser.step()
        on_step(layer, step + 1, value)
        if (step + 1) % setup.evaluate_every == 0 or step + 1 == steps:
            error = _error(mlp, weights, *held_out)
            if error < least:
                least, best, chosen = error, _copy(weights), step + 1
    return best, LayerFit(layer, before, least, chosen)


@torch.no_grad()
def _error(mlp: nn.Module, weights: Weights, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """E||MLP(x) - y||^2 / E||y||^2, from float32 sums."""
    missed = total = 0.0
    for x, y in zip(torch.split(inputs, 4096), torch.split(targets, 4096), strict=True):
        missed += float((_output(mlp, weights, x) - y.float()).square().sum())
        total += float(y.float().square().sum())
    return missed / total if total else missed


def _output(mlp: nn.Module, weights: Weights, inputs: torch.Tensor) -> torch.Tensor:
    """The MLP with float32 weights that are rounded to the inputs' dtype for the products; float32."""
    rounded = {name: weight.to(inputs.dtype) for name, weight in weights.items()}
    output: torch.Tensor = functional_call(mlp, rounded, (inputs,))
    return output.float()


def _copy(weights: Weights) -> Weights:
    return {name: weight.detach().clone() for name, weight in weights.items()}


@torch.no_grad()
def _put(mlp: nn.Module, weights: Weights) -> None:
    """Give the MLP its new weights, rounded once to its dtype."""
    for name, parameter in mlp.named_parameters():
        parameter.copy_(weights[name])


def _part(layer: int) -> str:
    return f"layer-{layer:03}"
