"""The three splits: windows of tokens for calibration, search and report, which never share a token.

Documents are joined by a blank line, tokenised as one stream, and cut into windows that do not overlap. Where the
tokenizer adds BOS, every window begins with one, as what a served model reads does, or only the first window of a text,
the way WikiText perplexities are usually taken. A mixture takes turns: any stretch of its windows has every corpus at
its share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ffgym.config.mixture import Corpora, described, shares
from ffgym.data.corpora import Corpus, Role, load_text
from ffgym.data.repeats import REPEATED_TOKENS, run_hashes
from ffgym.errors import DataError
from ffgym.types import Bos

if TYPE_CHECKING:
    import torch

ROLES: tuple[Role, ...] = ("calibration", "search", "report")
SEPARATOR = "\n\n"
# A tokenizer cuts the end of a shortened text differently from the same place inside the whole text. Tokens this far
# before the end are the same.
SAFETY_TOKENS = 64
# A little more text than English needs for one token, so that the first try is mostly enough.
TYPICAL_CHARACTERS = 5
MOST_REPEATED = 0.1


@dataclass(frozen=True)
class SplitPart:
    """What a split has of one corpus."""

    corpus: Corpus
    share: Fraction  # of the split, in (0, 1]
    windows: torch.Tensor = field(repr=False)  # token ids, shape (windows, window), int64, in the order of the text
    bos: bool  # every window begins with BOS

    @property
    def text(self) -> torch.Tensor:
        """The ids without the BOS of every window, in the order of the text, shape (tokens,), int64."""
        return self.windows[:, int(self.bos) :].reshape(-1)


@dataclass(frozen=True)
class Split:
    """Windows of one corpus, or of a mixture, for one role."""

    text: str  # what it is made of: "demo:c4", or "75% demo:c4 + 25% mine.txt"
    role: Role  # "calibration", "search" or "report"
    parts: tuple[SplitPart, ...]  # what it has of each corpus
    # token ids, shape (windows, window), int64. Each window predicts window - 1 tokens.
    windows: torch.Tensor = field(repr=False)
    digest: str  # sha256 of the windows: their shape, then the ids row by row
    bos: Bos  # which windows begin with BOS; "first" is its own first one, where the text begins there

    @property
    def name(self) -> str:
        """``"demo:c4/search"``: text and role."""
        return f"{self.text}/{self.role}"

    @property
    def predicted_tokens(self) -> int:
        """How many tokens are predicted: of every window all but the first."""
        return self.windows.shape[0] * (self.windows.shape[1] - 1)


class Splits(NamedTuple):
    """The three splits of a run."""

    calibration: Split
    search: Split
    report: Split


def make_splits(
    corpora: Mapping[Role, Corpora],
    tokens: Mapping[Role, int],
    window: int,
    tokenizer: Any,
    *,
    context_limit: int,
    bos: Literal["every", "first"] = "every",
) -> Splits:
    """Load the corpora that a run names, tokenise no more than is needed, and cut the three splits.

    Roles that name the same text get consecutive windows of it, in the order calibration, search, report. Asked
    tokens are rounded up to whole windows. Of a mixture, every corpus gives its share to less than one window.

    Args:
        corpora: the corpus of each role, or its mixture.
        tokens: how many are wanted for each role.
        context_limit: the longest window that the model takes, in tokens.
        bos: which windows begin with BOS where the tokenizer adds one.

    Raises:
        DataError: a window shorter than 2 tokens or longer than the context, fewer than 1 token asked for, a corpus
            that is missing, too short or repeats itself, or two that hold the same text.
    """
    import torch

    check_window(window, context_limit)
    turns = {role: interleaved([*shares(corpora[role]).values()], -(-tokens[role] // window)) for role in ROLES}
    loaded = _load_corpora(corpora)
    demands = [
        _Demand(role, corpus, share, turns[role].count(place))
        for role in ROLES
        for place, (corpus, share) in enumerate(zip(loaded[role], shares(corpora[role]).values(), strict=True))
    ]
    _check_named_once(demands)
    parts: dict[Role, dict[str, SplitPart]] = {role: {} for role in ROLES}  # by the digest of the text
    added: Bos = bos if adds_bos(tokenizer) else "none"
    firsts: dict[str, Role] = {}
    for digest in dict.fromkeys(demand.corpus.digest for demand in demands):
        of_it = [demand for demand in demands if demand.corpus.digest == digest]
        firsts[digest] = of_it[0].role
        windows = _cut_windows(of_it, window, tokenizer, added)
        for demand in of_it:
            parts[demand.role][digest] = SplitPart(
                demand.corpus, demand.share, windows[: demand.count], added == "every"
            )
            windows = windows[demand.count :]

    def split(role: Role) -> Split:
        own = [parts[role][corpus.digest] for corpus in loaded[role]]
        following = [iter(part.windows) for part in own]
        windows = torch.stack([next(following[place]) for place in turns[role]])
        is_continued = firsts[own[turns[role][0]].corpus.digest] != role
        begins: Bos = "none" if added == "first" and is_continued else added
        return Split(described(corpora[role]), role, tuple(own), windows, windows_digest(windows), begins)

    splits = Splits(*map(split, ROLES))
    _check_apart(splits)
    return splits


def interleaved(shares: Sequence[Fraction], count: int) -> list[int]:
    """The order of the corpora: after any number of windows, each is less than one window away from its share.

    Of the corpora that are not ahead of their shares, the one whose next window is due first comes next (Baruah et al.
    1996, Proportionate progress).

    Args:
        shares: above 0, together 1.
        count: windows in all.

    Returns:
        indices into ``shares``, one for each window.
    """
    given, turns = [0] * len(shares), list[int]()
    for position in range(1, count + 1):
        behind = [i for i, share in enumerate(shares) if given[i] < share * position]
        turns.append(min(behind, key=lambda i: math.ceil((given[i] + 1) / shares[i])))
        given[turns[-1]] += 1
    return turns


@dataclass(frozen=True)
class _Demand:
    """How many windows a role wants of a corpus, which is a share of its mixture."""

    role: Role
    corpus: Corpus
    share: Fraction
    count: int

    def asked(self, window: int) -> str:
        """``"calibration 16,384 as its share of 50%"``."""
        share = f" as its share of {float(100 * self.share):.3g}%" if self.share < 1 else ""
        return f"{self.role} {self.count * window:,}{share}"


def _check_named_once(demands: Sequence[_Demand]) -> None:
    """Refuse a mixture of a text with itself, such as one file by two paths."""
    seen: dict[tuple[Role, str], str] = {}
    for demand in demands:
        name = demand.corpus.name
        if (other := seen.setdefault((demand.role, demand.corpus.digest), name)) != name:
            raise DataError(
                f"data.{demand.role} mixes a text with itself: {other!r} and {name!r} are the same",
                hint=f"Name it once, with a weight to have more of it, e.g. '2*{name}'.",
            )


def _check_apart(splits: Sequence[Split]) -> None:
    """Refuse two corpora that hold the same text, such as a copy in another format, and one that repeats itself.

    Within a mixture too, or windows for rewards could repeat those for the finals. Quotations and boilerplate that two
    real corpora share, or two parts of one, are far less than ``MOST_REPEATED`` of either.
    """
    members = [
        (split.role, part.corpus, run_hashes(part.text.numpy().reshape(1, -1), REPEATED_TOKENS))
        for split in splits
        for part in split.parts
    ]
    for (role, corpus, its), (other_role, other, others) in permutations(members, 2):
        repeated = float(np.isin(its, others).mean()) if its.size else 0.0
        if repeated <= MOST_REPEATED:
            continue
        if corpus.digest == other.digest:
            raise DataError(
                f"corpus {corpus.name!r} repeats itself: {repeated:.0%} of what data.{role} reads of it stands in "
                f"data.{other_role}'s part, too, in runs of {REPEATED_TOKENS} tokens or more",
                hint="Remove the duplicates, or name another text for one of the two.",
            )
        raise DataError(
            f"corpus {corpus.name!r} of data.{role} and corpus {other.name!r} of data.{other_role} hold the same "
            f"text: {repeated:.0%} of what is read of the first stands in the second too, in runs of "
            f"{REPEATED_TOKENS} tokens or more",
            hint="Name different texts, or one and the same for both: it is then divided between them.",
        )


def windows_digest(windows: torch.Tensor) -> str:
    """SHA-256 of windows, shape (windows, window): their shape, then the ids row by row."""
    digest = hashlib.sha256(f"{windows.shape[0]} x {windows.shape[1]};".encode())
    digest.update(windows.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def check_window(window: int, context_limit: int) -> None:
    """Refuse windows that the model cannot take."""
    if window > context_limit:
        raise DataError(
            f"data.window = {window} is longer than the model's context of {context_limit} tokens",
            hint=f"Set data.window to at most {context_limit}.",
        )


def _load_corpora(corpora: Mapping[Role, Corpora]) -> dict[Role, list[Corpus]]:
    """The corpora of each role; what both calibration and search name is one text, which is read once."""
    read: dict[tuple[str, bool], Corpus] = {}
    found: dict[Role, list[Corpus]] = {role: [] for role in ROLES}
    for role in ROLES:
        for name in shares(corpora[role]):
            key = (name, role == "report")
            if key not in read:
                read[key] = load_text(name, role=role)
            found[role].append(read[key])
    return found


def _cut_windows(demands: Sequence[_Demand], window: int, tokenizer: Any, bos: Bos) -> torch.Tensor:
    """The first windows of a text, as many as all want together, shape (windows, window), int64."""
    corpus, total = demands[0].corpus, sum(demand.count for demand in demands)
    windows, held = first_windows(corpus, total, window, tokenizer, bos)
    if held < window:
        raise DataError(
            f"corpus {corpus.name!r} ({corpus.split}) holds {held:,} tokens, less than one window of {window:,}",
            hint=f"Set data.window to at most {held}, or name a longer corpus."
            if held >= 2
            else "Name a longer corpus.",
        )
    if len(windows) < total:
        asked = " + ".join(demand.asked(window) for demand in demands)
        largest = max(demands, key=lambda demand: demand.count)
        left = len(windows) - (total - largest.count)
        advice = f"Lower data.{largest.role}_tokens to at most {int(left / largest.share) * window:,}"
        if left < 1:
            advice = "Lower " + " and ".join(f"data.{demand.role}_tokens" for demand in demands)
        less = ", give this corpus less weight" if any(demand.share < 1 for demand in demands) else ""
        raise DataError(
            f"corpus {corpus.name!r} ({corpus.split}) holds {held:,} tokens, but {total * window:,} were asked of"
            f" it ({asked}, in whole windows of {window:,})",
            hint=f"{advice}{less}, or name a longer corpus.",
        )
    return windows


def first_windows(corpus: Corpus, count: int, window: int, tokenizer: Any, bos: Bos) -> tuple[torch.Tensor, int]:
    """The first windows of a corpus, fewer where it holds fewer: shape (at most ``count``, window), int64.

    Returns:
        the windows, and how many tokens there are of the ``count * window``, with every BOS.
    """
    import torch

    own = window - (bos == "every")  # tokens of the text in a window
    ids = first_tokens(corpus, count * own, tokenizer, bos == "first")
    whole = len(ids) // own
    windows = torch.tensor(ids[: whole * own], dtype=torch.int64).view(whole, own)
    if bos == "every":
        windows = torch.nn.functional.pad(windows, (1, 0), value=tokenizer.bos_token_id)
    return windows, len(ids) + -(-len(ids) // own) * (bos == "every")


def first_tokens(corpus: Corpus, count: int, tokenizer: Any, bos: bool) -> list[int]:
    """The first ``count`` tokens of a corpus (fewer where it holds fewer), the same as if all of it were tokenised."""
    text = SEPARATOR.join(corpus.documents)
    head = [tokenizer.bos_token_id] if bos else []
    characters = TYPICAL_CHARACTERS * (count + SAFETY_TOKENS)
    while True:
        # verbose=False: a whole corpus is meant to be longer than the model's context.
        ids: list[int] = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        whole = characters >= len(text)
        if whole or len(head) + len(ids) >= count + SAFETY_TOKENS:
            return (head + ids)[:count]
        characters *= 2


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS in front of a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
