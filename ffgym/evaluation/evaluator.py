"""Measures allocations on tokens: the one place where a cut model runs during a search.

An update is measured layer by layer: all its requests go through layer i before any goes through layer i + 1. So a
layer is cut once for all requests that keep the same units of it, and requests on the same text that agree on the first
layers share the hidden states up to there. Batches are the same as for a request alone, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ffgym.data.examples import EncodedExample
from ffgym.errors import ModelError
from ffgym.evaluation.divergence import divergence_from, window_divergences
from ffgym.evaluation.known import KnownLosses
from ffgym.evaluation.multiple_choice import PaddedExamples, batches, padded, right_answers, task_accuracy
from ffgym.evaluation.perplexity import head_share, window_losses
from ffgym.evaluation.slopes import mean_slopes, unit_slopes
from ffgym.models.cut import PrunableModel
from ffgym.models.modes import own_modes
from ffgym.models.walk import Entry, Walk
from ffgym.plugins.bases import SLOPE_PASSES
from ffgym.types import Evaluation, OnShare, do_nothing

DIVERGENCES = frozenset({"kl", "reverse_kl"})


@dataclass(frozen=True)
class Request:
    """An allocation, and what to measure it on."""

    kept: tuple[int, ...]  # units per sublayer, length 2L
    windows: tuple[int, ...]  # indices of windows of text, at least one
    examples: tuple[int, ...] = ()  # indices of multiple-choice examples
    needs: frozenset[str] = frozenset()  # what to measure beside the losses, any of kl, reverse_kl, accuracy, slopes
    slopes_of: str = "loss"  # what slopes are the derivative of: loss, kl or reverse_kl

    @property
    def divergences(self) -> frozenset[str]:
        """Those that are measured, or followed, so that the dense model's hidden states are needed."""
        followed = {self.slopes_of} if "slopes" in self.needs else set[str]()
        return DIVERGENCES & (self.needs | followed)


class Evaluator(Protocol):
    """Measures allocations. The same request gives the same bits, whatever else is asked for at the same time."""

    def measure(self, requests: Sequence[Request], on_progress: OnShare = do_nothing) -> list[Evaluation]:
        """Measure every request, in the order given.

        Args:
            on_progress: called with the share that is done, from 0 to 1.

        Raises:
            ModelError: the dense model's loss is not finite on a window.
        """


@dataclass(frozen=True)
class _Pass:
    """A batch through the model cut to an allocation: windows of text, or examples that are padded to one length."""

    indices: tuple[int, ...]
    kept: tuple[int, ...]
    divergences: frozenset[str] = frozenset()  # to compute at its end
    examples: bool = False


@dataclass(frozen=True)
class _Stream:
    """Hidden states of a batch after the layers so far, and the passes that share them."""

    entry: Entry
    hidden: torch.Tensor
    passes: tuple[_Pass, ...]
    asked: PaddedExamples | None = None


class ModelEvaluator:
    """Measures allocations of one prepared model, layer by layer; see `Evaluator`.

    The dense model runs on one window, or one example, at a time, and its results are kept. In larger batches, which
    depend on what earlier requests have left, kernels would round otherwise.

    Args:
        prunable: the prepared model; it is dense again after every call, even an interrupted one.
        windows: token ids, shape (windows, length), int64.
        calibrated: use refitted consumers, not plain removal.
        known: file of what the dense model loses on windows, which is read and added to.
    """

    def __init__(
        self,
        prunable: PrunableModel,
        windows: torch.Tensor,
        *,
        examples: Sequence[EncodedExample] = (),
        calibrated: bool = True,
        tokens_per_batch: int = 4096,
        known: Path | None = None,
    ) -> None:
        self._prunable = prunable
        self._model = prunable.model
        self._walk = Walk(prunable.model)
        self._head_share = head_share(prunable.model)
        self._windows = windows
        self._length = windows.shape[1]
        self._examples = tuple(examples)
        self._calibrated = calibrated
        self._tokens_per_batch = tokens_per_batch
        self._known = KnownLosses(known)
        self._dense = {
            _Pass((index,), prunable.dense_units): torch.tensor([[loss]], dtype=torch.float64)
            for index, loss in self._known.among(windows).items()
        }
        # Of windows on which a divergence was asked for: final hidden states of the dense model, from which its
        # distributions can be computed again, shape (length - 1, d), the model's dtype, on the CPU.
        self._dense_hidden: dict[int, torch.Tensor] = {}

    @own_modes()
    def measure(self, requests: Sequence[Request], on_progress: OnShare = do_nothing) -> list[Evaluation]:
        """Measure every request, in the order asked for; see `Evaluator`."""
        compared = {i for request in requests if request.divergences for i in request.windows}
        # Requests for slopes are measured one by one, after the others.
        sloped = {r: self._of_text(r) for r in requests if "slopes" in r.needs}
        later = [each for own in sloped.values() for each in own]
        own_walk = {each for each in later if not self._is_dense(each.kept)}
        passes = [p for p in self._passes(requests) if p not in own_walk and not self._is_known(p, compared)]
        tokens = sum(map(self._tokens, passes)) + (1 + SLOPE_PASSES) * sum(map(self._tokens, later))
        advance = _counter(on_progress, tokens)
        slopes: dict[Request, tuple[np.ndarray, ...]] = {}
        try:
            self._prunable.restore()
            with torch.inference_mode():
                read = self._run(passes, compared, advance)
            for request, own in sloped.items():
                states: list[dict[tuple[int, ...], torch.Tensor]] = []
                with torch.no_grad():  # no inference tensors: the graphs of slopes begin with the states
                    read |= self._run(own, compared, advance, states)
                slopes[request] = self._slopes(request, own, states)
                advance(SLOPE_PASSES * sum(map(self._tokens, own)))
        finally:
            self._prunable.restore()
        return [replace(self._evaluation(r, read), slopes=slopes.get(r)) for r in requests]

    def _passes(self, requests: Sequence[Request]) -> Iterable[_Pass]:
        """What has to be known of the requests, each pass once."""
        dense = [replace(r, kept=self._prunable.dense_units) for r in requests if r.divergences]
        passes = [p for r in requests for p in (*self._of_text(r), *self._of_examples(r))]
        return dict.fromkeys([*passes, *(p for r in dense for p in self._of_text(r))])

    def _of_text(self, request: Request) -> list[_Pass]:
        dense = self._is_dense(request.kept)
        # Slopes are those of single windows, so that workers may share the windows of a request.
        one_by_one = dense or "slopes" in request.needs
        size = 1 if one_by_one else max(1, self._tokens_per_batch // self._length)
        divergences = frozenset[str]() if dense else request.needs & DIVERGENCES
        starts = range(0, len(request.windows), size)
        return [_Pass(request.windows[i : i + size], request.kept, divergences) for i in starts]

    def _of_examples(self, request: Request) -> list[_Pass]:
        if "accuracy" not in request.needs:
            return []
        asked = [self._examples[i] for i in request.examples]
        places: Iterable[list[int]] = batches(asked, self._tokens_per_batch)
        if self._is_dense(request.kept):
            places = [[place] for place in range(len(asked))]
        indices = [tuple(request.examples[place] for place in own) for own in places]
        return [_Pass(own, request.kept, examples=True) for own in indices]

    def _is_dense(self, kept: tuple[int, ...]) -> bool:
        return kept == self._prunable.dense_units

    def _is_known(self, each: _Pass, compared: Set[int]) -> bool:
        """Whether it is a pass of the dense model whose results are known, with hidden states where they are needed."""
        hidden = set[int]() if each.examples else compared & set(each.indices)
        return each in self._dense and self._dense_hidden.keys() >= hidden

    def _tokens(self, each: _Pass) -> int:
        if each.examples:
            return sum(self._examples[i].tokens for i in each.indices)
        return len(each.indices) * self._length

    def _run(
        self,
        passes: Sequence[_Pass],
        compared: Set[int],
        advance: Callable[[float], None],
        states: list[dict[tuple[int, ...], torch.Tensor]] | None = None,
    ) -> dict[_Pass, torch.Tensor]:
        """Results by pass: losses and divergences, shape (1 or 3, windows), or what is right, (1, examples).

        All that are known of the dense model are among them. ``states`` is given the hidden states of every batch
        before each layer and behind the last one, by windows; the passes are those of one request then.
        """
        tokens, depth = sum(map(self._tokens, passes)), len(self._prunable.halves) // 2
        together: dict[tuple[tuple[int, ...], bool], list[_Pass]] = {}
        for each in passes:
            together.setdefault((each.indices, each.examples), []).append(each)
        streams = [self._entered(tuple(members)) for members in together.values()]
        for layer in range(depth + 1):
            if states is not None:
                states.append({stream.passes[0].indices: stream.hidden for stream in streams})
            if layer < depth:
                streams = self._through(layer, streams)
                advance((1 - self._head_share) * tokens / depth)
        dense = [stream for stream in streams if self._is_dense(stream.passes[0].kept)]
        others = [stream for stream in streams if not self._is_dense(stream.passes[0].kept)]
        self._keep_dense(dense, compared, advance)  # first: the divergences of the others need its hidden states
        read = dict(self._dense)
        for stream in others:
            read |= self._read(stream, self._walk.leave(stream.hidden, stream.entry))
            advance(self._head_share * sum(map(self._tokens, stream.passes)))
        return read

    def _slopes(
        self, request: Request, passes: Sequence[_Pass], states: list[dict[tuple[int, ...], torch.Tensor]]
    ) -> tuple[np.ndarray, ...]:
        """Slopes of every sublayer's units, given the states of a request's passes, each of one window."""
        by_window = [[layer[each.indices] for each in passes] for layer in states]
        states.clear()
        objectives = None
        if request.slopes_of in DIVERGENCES:
            hidden = (self._dense_hidden[index] for index in request.windows)
            objectives = [divergence_from(self._model, each, request.slopes_of) for each in hidden]
        found = unit_slopes(
            self._prunable,
            self._windows[list(request.windows)],
            request.kept,
            by_window,
            calibrated=self._calibrated,
            objectives=objectives,
        )
        return mean_slopes(found)

    def _entered(self, passes: tuple[_Pass, ...]) -> _Stream:
        indices = list(passes[0].indices)
        if passes[0].examples:
            asked = padded(self._model, [self._examples[i] for i in indices])
            entry = self._walk.enter(asked.ids, asked.mask, asked.positions)
            return _Stream(entry, entry.hidden, passes, asked)
        entry = self._walk.enter(self._windows[indices])
        return _Stream(entry, entry.hidden, passes)

    def _through(self, layer: int, streams: Sequence[_Stream]) -> list[_Stream]:
        """All streams after the next layer, which is cut to each level once."""
        split: dict[tuple[int, ...], list[_Stream]] = {}
        for stream in streams:
            passes: dict[tuple[int, ...], list[_Pass]] = {}
            for each in stream.passes:
                passes.setdefault(each.kept[2 * layer : 2 * layer + 2], []).append(each)
            for units, own in passes.items():
                split.setdefault(units, []).append(replace(stream, passes=tuple(own)))
        behind = []
        with self._prunable.layer(layer) as halves:
            refits = [
                half.refits({units[i] for units in split} - {half.sublayer.units}, calibrated=self._calibrated)
                for i, half in enumerate(halves)
            ]
            for units, parts in split.items():
                for half, kept, refit in zip(halves, units, refits, strict=True):
                    half.cut(kept, refit=refit.get(kept))
                behind += [replace(each, hidden=self._walk.layer(layer, each.hidden, each.entry)) for each in parts]
            for half in halves:
                half.restore()
        return behind

    def _keep_dense(self, streams: Sequence[_Stream], compared: Set[int], advance: Callable[[float], None]) -> None:
        """Keep the dense model's results; raises ``ModelError`` where a loss is not finite."""
        text = [stream for stream in streams if stream.asked is None]
        broken, found = 0, dict[int, float]()
        for stream in streams:
            last = self._walk.leave(stream.hidden, stream.entry)
            ((each, row),) = self._read(stream, last).items()
            advance(self._head_share * self._tokens(each))
            if not row.isfinite().all():
                broken += 1
                continue
            if not each.examples:
                (index,) = each.indices
                if each not in self._dense:
                    found[index] = row.item()
                if index in compared:
                    self._dense_hidden[index] = last[0, :-1].cpu()
            self._dense[each] = row
        self._known.add(self._windows, found)
        if broken:
            raise ModelError(
                f"the loss of the dense model is not finite on {broken} of {len(text)} search windows",
                hint="It overflows (try --set model.dtype=float32 or bfloat16), or its weights are damaged.",
            )

    def _read(self, stream: _Stream, last: torch.Tensor) -> dict[_Pass, torch.Tensor]:
        """The results of a stream's passes, given its final hidden states."""
        first = stream.passes[0]
        if stream.asked is not None:
            likelihoods = stream.asked.log_likelihoods(self._model, last)
            return {first: torch.tensor([right_answers(stream.asked.examples, likelihoods)])}
        hidden, targets = last[:, :-1], stream.entry.ids[:, 1:].to(last.device)
        read = {}
        for each in stream.passes:
            if each.divergences:
                dense = torch.stack([self._dense_hidden[i] for i in each.indices])
                read[each] = window_divergences(self._model, hidden, dense, targets, each.divergences)
            else:
                read[each] = window_losses(self._model, hidden, targets)[None]
        return read

    def _evaluation(self, request: Request, read: Mapping[_Pass, torch.Tensor]) -> Evaluation:
        rows = torch.cat([read[each] for each in self._of_text(request)], dim=1).tolist()
        losses, *divergences = map(tuple, rows)
        kls, reverse_kls = divergences or [(0.0,) * len(losses)] * 2  # of the dense model
        accuracy = None
        if "accuracy" in request.needs and request.examples:
            right: dict[int, bool] = {}
            for each in self._of_examples(request):
                right.update(zip(each.indices, read[each][0].tolist(), strict=True))
            accuracy = task_accuracy(
                [self._examples[i] for i in request.examples], [right[i] for i in request.examples]
            )
        return Evaluation(
            losses,
            self._length - 1,
            kls=kls if "kl" in request.needs else None,
            reverse_kls=reverse_kls if "reverse_kl" in request.needs else None,
            accuracy=accuracy,
        )


def _counter(on_progress: OnShare, total: float) -> Callable[[float], None]:
    """A function that adds up tokens and reports the share that is done."""
    done = 0.0

    def advance(tokens: float) -> None:
        nonlocal done
        done += tokens
        if total:
            on_progress(min(1.0, done / total))

    return advance
