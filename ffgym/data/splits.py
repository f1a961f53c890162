"""The three splits: windows of tokens for calibration, search and report, which never share a token.

Documents are joined by a blank line and tokenised as one stream, the way WikiText perplexities are usually taken; the
stream begins with BOS where the tokenizer adds one. It is cut into windows that do not overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from ffgym.data.corpora import Corpus, Role, load_text
from ffgym.data.repeats import REPEATED_TOKENS, run_hashes
from ffgym.errors import DataError

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
class Split:
    """Windows of one corpus for one role.

    Attributes:
        name: ``"demo:c4/search"``: corpus and role.
        role: ``"calibration"``, ``"search"`` or ``"report"``.
        corpus: where its text came from.
        windows: token ids, shape (windows, window), int64. Each window predicts ``window - 1`` tokens.
        digest: sha256 of the windows: their shape, then the ids row by row.
        bos: its first window begins with a BOS token; where splits share a text, only that of the first one does.
    """

    name: str
    role: Role
    corpus: Corpus
    windows: torch.Tensor = field(repr=False)
    digest: str
    bos: bool

    @property
    def predicted_tokens(self) -> int:
        """How many tokens are predicted: of every window all but the first."""
        return self.windows.shape[0] * (self.windows.shape[1] - 1)


@dataclass(frozen=True)
class Splits:
    """The three splits of a run."""

    calibration: Split
    search: Split
    report: Split


def make_splits(
    names: Mapping[Role, str], tokens: Mapping[Role, int], window: int, tokenizer: Any, *, context_limit: int
) -> Splits:
    """Load the corpora that a run names, tokenise no more than is needed, and cut the three splits.

    Roles that name the same text get consecutive windows of it, in the order calibration, search, report. Asked
    tokens are rounded up to whole windows.

    Args:
        names: the corpus of each role.
        tokens: how many are wanted for each role.
        window: length of a window in tokens.
        tokenizer: a Hugging Face tokenizer.
        context_limit: the longest window that the model takes, in tokens.

    Raises:
        DataError: a window shorter than 2 tokens or longer than the context, fewer than 1 token asked for, a corpus
            that is missing or too short, or two that hold the same text.
    """
    _check_window(window, context_limit)
    wanted = {role: -(-tokens[role] // window) for role in ROLES}
    corpora = _load_corpora(names)
    taken: dict[Role, torch.Tensor] = {}
    bos, firsts = adds_bos(tokenizer), {}
    for digest in dict.fromkeys(corpus.digest for corpus in corpora.values()):
        roles = [role for role in ROLES if corpora[role].digest == digest]
        firsts[digest] = roles[0]
        windows = _cut_windows(corpora[roles[0]], {role: wanted[role] for role in roles}, window, tokenizer, bos)
        for role in roles:
            taken[role], windows = windows[: wanted[role]], windows[wanted[role] :]

    def split(role: Role) -> Split:
        corpus, windows = corpora[role], taken[role]
        return Split(
            f"{corpus.name}/{role}",
            role,
            corpus,
            windows,
            windows_digest(windows),
            bos and firsts[corpus.digest] == role,
        )

    splits = Splits(split("calibration"), split("search"), split("report"))
    _check_apart((splits.calibration, splits.search, splits.report))
    return splits


def _check_apart(splits: Sequence[Split]) -> None:
    """Refuse two corpora that hold the same text, such as a copy in another format; one text is cut apart anyway.

    Quotations and boilerplate that two real corpora share are far less than ``MOST_REPEATED`` of either.
    """
    runs = {split.role: run_hashes(split.windows.numpy().reshape(1, -1), REPEATED_TOKENS) for split in splits}
    for split, other in permutations(splits, 2):
        its = runs[split.role]
        if split.corpus.digest == other.corpus.digest or not its.size:
            continue
        repeated = float(np.isin(its, runs[other.role]).mean())
        if repeated > MOST_REPEATED:
            raise DataError(
                f"data.{split.role} = {split.corpus.name!r} and data.{other.role} = {other.corpus.name!r} hold the "
                f"same text: {repeated:.0%} of the {split.role} split stands in the other one too, in runs of "
                f"{REPEATED_TOKENS} tokens or more",
                hint="Name one text once for both, which is then cut apart, or two different ones.",
            )


def windows_digest(windows: torch.Tensor) -> str:
    """SHA-256 of windows, shape (windows, window): their shape, then the ids row by row."""
    digest = hashlib.sha256(f"{windows.shape[0]} x {windows.shape[1]};".encode())
    digest.update(windows.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _check_window(window: int, context_limit: int) -> None:
    if window > context_limit:
        raise DataError(
            f"data.window = {window} is longer than the model's context of {context_limit} tokens",
            hint=f"Set data.window to at most {context_limit}.",
        )


def _load_corpora(names: Mapping[Role, str]) -> dict[Role, Corpus]:
    calibration = load_text(names["calibration"], role="calibration")
    # One name means one text for both of these roles, so it is read once.
    same = names["search"] == names["calibration"]
    search = calibration if same else load_text(names["search"], role="search")
    return {"calibration": calibration, "search": search, "report": load_text(names["report"], role="report")}


def _cut_windows(corpus: Corpus, wanted: dict[Role, int], window: int, tokenizer: Any, bos: bool) -> torch.Tensor:
    """The first ``sum(wanted)`` windows of a corpus, shape (windows, window), int64."""
    import torch

    total = sum(wanted.values())
    ids = first_tokens(corpus, total * window, tokenizer, bos)
    if len(ids) < window:
        raise DataError(
            f"corpus {corpus.name!r} ({corpus.split}) holds {len(ids):,} tokens, less than one window of {window:,}",
            hint=f"Set data.window to at most {len(ids)}, or name a longer corpus."
            if len(ids) >= 2
            else "Name a longer corpus.",
        )
    if len(ids) < total * window:
        asked = " + ".join(f"{role} {count * window:,}" for role, count in wanted.items())
        largest = max(wanted, key=lambda role: wanted[role])
        left = len(ids) // window - (total - wanted[largest])
        advice = f"Lower data.{largest}_tokens to at most {left * window:,}"
        if left < 1:
            advice = "Lower " + " and ".join(f"data.{role}_tokens" for role in wanted)
        raise DataError(
            f"corpus {corpus.name!r} ({corpus.split}) holds {len(ids):,} tokens, but {total * window:,} were asked of"
            f" it ({asked}, in whole windows of {window:,})",
            hint=f"{advice}, or name a longer corpus.",
        )
    return torch.tensor(ids[: total * window], dtype=torch.int64).view(total, window)


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
