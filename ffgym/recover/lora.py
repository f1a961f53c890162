"""Recovery by low-rank adapters (LoRA, arXiv 2106.09685): PEFT puts them in, they are trained, merged and taken out.

Every linear W of attention and MLP becomes W + (alpha / rank) B A, with W frozen in the model's dtype, A and B in
float32. B starts as zeros, so training starts at the model itself. What is merged are the adapters that had the least
loss on held-out text, the untrained ones among them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from ffgym.errors import RecoveryError, raising_if_out_of_memory
from ffgym.interrupts import held_back_interrupts
from ffgym.models.families import Family, dense_or_pruned_family_of
from ffgym.models.placement import devices_of
from ffgym.plugins.bases import PluginConfig
from ffgym.recover.checkpoint import random_state, set_random_state
from ffgym.recover.method import Recovery, TrainingOutcome, TrainingSetup
from ffgym.recover.training import LARGEST_GRADIENT, batch_at, diverged, rate_at
from ffgym.report.layout import counted

ADAPTER = "default"
PART = "lora"
TOKENS_PER_PASS = 2048  # the logits of one pass, and their gradient, are held in float32


@dataclass
class LoraCurve:
    """How training went."""

    train: list[float] = field(default_factory=list)  # loss of each step's windows before that step, nats per token
    # (steps done, loss on the held-out windows), the first at 0
    held_out: list[tuple[int, float]] = field(default_factory=list)
    chosen: int = 0  # the number of steps done by the adapters that were merged


class Lora(Recovery):
    """Low-rank adapters on every linear of attention and MLP, merged into the weights."""

    name = "lora"
    learning_rate = 5e-4
    requires: ClassVar[Mapping[str, str]] = {"peft": "pip install 'ffgym[recover]'"}
    free_options = frozenset({"checkpoint_every", "gradient_checkpointing"})

    class Config(PluginConfig):
        """Options of ``[recover]``."""

        rank: int = Field(default=16, ge=1, le=1024, description="rank of the adapters, 1 to 1024")
        alpha: float = Field(
            default=32.0, gt=0, allow_inf_nan=False, description="adapters are scaled by alpha / rank, above 0"
        )
        dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before the adapters, in [0, 1)")
        checkpoint_every: int = Field(default=16, ge=1, description="steps between checkpoints")
        gradient_checkpointing: bool = Field(
            default=False, description="recompute activations in the backward pass; less memory, slower"
        )

    def train(self, setup: TrainingSetup) -> TrainingOutcome:
        """Train adapters, and merge those of the step with the least held-out loss."""
        logged = [0, 0]
        with setup.progress(steps_of(setup)) as stage:

            def on_step(curve: LoraCurve) -> None:
                stage.advance(len(curve.train) - stage.done, _note(curve))
                points = [("train_loss", loss, step) for step, loss in enumerate(curve.train)][logged[0] :]
                points += [("held_out_loss", loss, step) for step, loss in curve.held_out][logged[1] :]
                logged[:] = len(curve.train), len(curve.held_out)
                setup.log(points)

            curve = train_lora(setup, self.config, on_step)
        options, step_tokens = self.config, batch_windows(setup) * setup.windows.shape[1]
        return TrainingOutcome(
            summary=f"LoRA of rank {options.rank} (alpha {options.alpha:g}) on all linears of attention and MLP, "
            f"merged: {counted(steps_of(setup), 'step')} of {step_tokens:,} tokens at up to {setup.learning_rate:g}, "
            f"seed {setup.seed}.",
            kept=f"the adapters of step {curve.chosen} were merged" if curve.chosen else "the weights are as they were",
            curve=asdict(curve),
        )


def batch_windows(setup: TrainingSetup) -> int:
    """Windows of one optimiser step."""
    return max(1, setup.batch_tokens // setup.windows.shape[1])


def steps_of(setup: TrainingSetup) -> int:
    """Optimiser steps of the whole training."""
    return -(-setup.tokens // (batch_windows(setup) * setup.windows.shape[1]))


def _note(curve: LoraCurve) -> str:
    train = f"loss {curve.train[-1]:.3f}, " if curve.train else ""
    return f"{train}held-out {curve.held_out[-1][1]:.3f}"


def target_modules(model: nn.Module, family: Family) -> list[str]:
    """Dotted names of the linears that get adapters: all of attention and MLP that have something left."""
    attention = (family.query, family.key, family.value, family.attention_consumer)
    parts = (*attention, *family.mlp_producers, family.mlp_consumer)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(parts)]


@torch.enable_grad()  # Ctrl-C in the middle of an earlier block without gradients may have left them off
def train_lora(setup: TrainingSetup, options: Any, on_step: Callable[[LoraCurve], None]) -> LoraCurve:
    """Train adapters and merge them; the model, in place, is then an ordinary one again, in eval mode and frozen.

    Ctrl-C at any moment leaves a checkpoint of the last whole step, if there is one to write to, and the same call goes
    on from there; on a CPU, with the same number of threads, the result has the same bits as without the interruption.

    Args:
        options: a `Lora.Config`.
        on_step: called after every step, and after every measurement.

    Raises:
        RecoveryError: the loss is not finite, or the memory of the device is exhausted.
    """
    model, checkpoint = setup.model, setup.checkpoint
    saved = None if checkpoint is None else checkpoint.load(PART, LoraCurve)
    gpus = [device for device in devices_of(model) if device.type == "cuda"]
    with torch.random.fork_rng(gpus), ExitStack() as stack:
        if options.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            stack.callback(model.activation_checkpointing_disable)
        torch.manual_seed(setup.seed)
        adapted = _add_adapters(model, dense_or_pruned_family_of(model), options)
        training = _Training(setup, options.checkpoint_every, on_step)
        if checkpoint is not None and saved is not None:
            with checkpoint.taking_up(PART):
                training.restore(*saved)
        try:
            training.run()
        finally:
            model.eval()
        training.take_best()
        merge(model)
        adapted.unload()
    model.requires_grad_(False)
    return training.curve


class _Training:
    """Adapters on their way: parameters, optimiser, curve, and the best so far."""

    def __init__(self, setup: TrainingSetup, checkpoint_every: int, on_step: Callable[[LoraCurve], None]) -> None:
        model = setup.model
        self.curve = LoraCurve()
        self._model = model
        self._setup = setup
        self._steps = steps_of(setup)
        self._checkpoint_every = checkpoint_every
        self._on_step = on_step
        self._device = model.get_input_embeddings().weight.device
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._best = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._optimiser = torch.optim.AdamW(self._parameters.values(), lr=setup.learning_rate, weight_decay=0.0)
        self._devices = devices_of(model)
        self._random = random_state(self._devices)

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.curve.train)

    def run(self) -> None:
        """Go on to the last step; Ctrl-C writes a checkpoint first."""
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")  # in another one it cannot go on
        short = RecoveryError(
            f"training ran out of memory on {self._device}",
            hint=f"Set recover.gradient_checkpointing=true, or model.device=cpu and model.dtype={dtype}, and go on from"
            " the last checkpoint.",
        )
        try:
            with raising_if_out_of_memory(short):
                while True:
                    is_due = self.step % self._setup.evaluate_every == 0 or self.step == self._steps
                    if is_due and not any(step == self.step for step, _ in self.curve.held_out):
                        self._evaluate()
                    if self.step == self._steps:
                        break
                    self._learn()
                    if self.step % self._checkpoint_every == 0:
                        self.save()
                self.save()
        except KeyboardInterrupt:
            self.save()
            raise

    def take_best(self) -> None:
        """Put the adapters of the least held-out loss in."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._best[name])

    def save(self) -> None:
        """Write everything that the next step depends on; valid between steps and within one that has not ended."""
        if self._setup.checkpoint is None:
            return
        tensors = {f"adapter.{name}": p for name, p in self._parameters.items()} | self._random
        tensors |= {f"best.{name}": best for name, best in self._best.items()}
        for name, parameter in self._parameters.items():
            state = self._optimiser.state.get(parameter, {})
            tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        self._setup.checkpoint.save(PART, tensors, asdict(self.curve))

    def restore(self, tensors: dict[str, torch.Tensor], curve: LoraCurve) -> None:
        """Go back to where ``save`` was."""
        if curve.held_out and curve.chosen not in dict(curve.held_out):
            raise ValueError(f"step {curve.chosen} was chosen and never measured")
        self.curve = curve
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"adapter.{name}"])
                self._best[name].copy_(tensors[f"best.{name}"])
                if f"exp_avg.{name}" in tensors:
                    moments = {k: tensors[f"{k}.{name}"].to(parameter) for k in ("exp_avg", "exp_avg_sq")}
                    self._optimiser.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        self._random = {name: state for name, state in tensors.items() if name.startswith("random.")}
        set_random_state(self._random, self._devices)

    def _evaluate(self) -> None:
        self._model.eval()
        loss = self._setup.held_out_loss()
        with held_back_interrupts():
            least = dict(self.curve.held_out).get(self.curve.chosen, math.inf)
            self.curve.held_out.append((self.step, loss))
            if loss < least:
                self.curve.chosen = self.step
                self._best = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._on_step(self.curve)

    def _learn(self) -> None:
        setup, step = self._setup, self.step
        self._model.train()
        indices = batch_at(step, batch_windows(setup), len(setup.windows), [setup.seed])
        self._optimiser.zero_grad()
        loss = self._gradient(setup.windows[torch.from_numpy(indices)])
        if not math.isfinite(loss):
            raise diverged(f"the loss of step {step + 1} is {loss}", setup.learning_rate)
        nn.utils.clip_grad_norm_(self._parameters.values(), LARGEST_GRADIENT)
        with held_back_interrupts():
            for group in self._optimiser.param_groups:
                group["lr"] = rate_at(step, self._steps, setup.learning_rate)
            self._optimiser.step()
            self.curve.train.append(loss)
            self._random = random_state(self._devices)
        self._on_step(self.curve)

    def _gradient(self, batch: torch.Tensor) -> float:
        """Add the gradient of the batch's mean loss, a few windows at a time; the loss in nats per token."""
        mean = 0.0
        for part in torch.split(batch, max(1, min(TOKENS_PER_PASS, self._setup.tokens_per_pass) // batch.shape[1])):
            ids = part.to(self._device)
            loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss * (len(part) / len(batch))
            loss.backward()
            mean += float(loss.detach())
        return mean


def _add_adapters(model: Any, family: Family, options: Any) -> Any:
    """PEFT's model around this one, whose linears now hold adapters in float32."""
    import peft

    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=target_modules(model, family),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        return peft.get_peft_model(model, config)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add (alpha / rank) B A to every adapted weight: in float32, rounded once to the weight's dtype."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if isinstance(module, Linear):
            weight = module.get_base_layer().weight
            down, up = (matrix[ADAPTER].weight.float() for matrix in (module.lora_A, module.lora_B))
            weight.copy_(torch.addmm(weight.float(), up, down, alpha=module.scaling[ADAPTER]))
