"""A tokenizer as a GGUF file carries it, or a refusal.

A file holds the tokens, their kinds, and merges or scores; how text is split before that is code in llama.cpp
(``src/llama-vocab.cpp``), chosen by a name. So a tokenizer is taken apart here, and one whose rules have no name there
is refused: a file that splits text otherwise would be another model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import gguf

from ffgym.errors import ModelError

WORDS = "ByteLevel's own expression"
DIGITS = "single digits"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = _CONTRACTIONS + r"\p{N}{1,3}|" + _REST
QWEN_2 = _CONTRACTIONS + r"\p{N}|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What splits the text, in order, and whether whole words of the vocabulary are taken without merging -> llama.cpp's
# name for it. Several names there stand for one rule; each of these is the best known of them.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((WORDS,), False): "gpt-2",
    ((DIGITS, WORDS), False): "smollm",
    ((LLAMA_3,), True): "llama-bpe",
    ((QWEN_2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
}
SPACE = "▁"
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about its tokenizer.

    Attributes:
        model: ``"gpt2"`` (byte-level pairs) or ``"llama"`` (SentencePiece pairs with bytes to fall back on).
        pre: llama.cpp's name for how text is split first.
        tokens: as many as the embedding has rows.
        types: ``gguf.TokenType`` of each.
        scores: of each, higher merges earlier; SentencePiece only.
        merges: pairs with a space between, first merges earlier; byte-level only.
        space_prefix: whether text gets a space in front.
        special: ids by role: bos, eos, unk, pad, and eot, eom for further tokens that end a text.
        add_bos, add_eos: whether the tokenizer puts these around a text by itself.
        chat_template: Jinja, or several by name, or ``None``.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str]
    space_prefix: bool
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | dict[str, str] | None

    def add_to(self, writer: Any) -> None:
        """Put it among the metadata of a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        writer.add_add_space_prefix(self.space_prefix)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if isinstance(self.chat_template, dict):
            named = self.chat_template.items()
            writer.add_chat_template([{"name": name, "template": template} for name, template in named])
        elif self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, rows: int, ends: Sequence[int] = ()) -> Vocabulary:
    """Take a tokenizer apart.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        rows: of the embedding; ids without a token become unused ones.
        ends: token ids that end a text, as the generation config lists them.

    Raises:
        ModelError: llama.cpp has no name for how it works, it names no end of text, or it has more tokens than rows.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _refusal("it is no fast tokenizer")
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise _refusal(f"it is a {model['type']} model, not byte-pair encoding")
    added = {token["id"]: token for token in rules["added_tokens"]}
    tokens, types = _tokens(tokenizer.get_vocab(), added, rows)
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    scores: list[float] | None = None
    if BYTES.issubset(tokens):
        name, pre, space_prefix = "llama", "default", _space_prefix(rules)
        scores = _scores(tokens, types, merges)
        types = [
            _sentencepiece_type(kind, token, model["unk_token"]) for token, kind in zip(tokens, types, strict=True)
        ]
        tokens = [_spaced(token, kind) for token, kind in zip(tokens, types, strict=True)]
        merges = []
    else:
        name, pre, space_prefix = "gpt2", _pre_tokenizer(rules), False
    _refuse_odd_tokens(added, rules)
    add_bos, add_eos = _added_around(tokenizer)
    return Vocabulary(
        model=name,
        pre=pre,
        tokens=tokens,
        types=[int(kind) for kind in types],
        scores=scores,
        merges=[" ".join(pair) for pair in merges],
        space_prefix=space_prefix,
        special=_special(tokenizer, ends),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=tokenizer.chat_template,
    )


def _refusal(why: str) -> ModelError:
    return ModelError(
        f"a GGUF file cannot carry this tokenizer: {why}",
        hint="docs/models.md lists the tokenizers that can be written. The folder itself loads with transformers.",
    )


def _refuse_odd_tokens(added: dict[int, Any], rules: dict[str, Any]) -> None:
    """llama.cpp finds added tokens in the text as it is, wherever they stand, and leaves the spaces around them."""
    normalizers = _parts(rules["normalizer"], "normalizers")
    prepends = any(step["type"] == "Prepend" for step in normalizers)
    for token in added.values():
        moved = prepends and token["normalized"] and not token["special"]
        if token["lstrip"] or token["rstrip"] or token["single_word"] or moved:
            raise _refusal(f"llama.cpp would find its token {token['content']!r} where it does not")


def _tokens(vocabulary: dict[str, int], added: dict[int, Any], rows: int) -> tuple[list[str], list[Any]]:
    """Text and kind of every token, in the order of their ids."""
    kinds = gguf.TokenType
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [kinds.UNUSED] * rows
    beyond = [token for token, index in vocabulary.items() if index >= rows]
    if beyond:
        raise _refusal(f"it has {len(vocabulary)} tokens, the embedding {rows} rows; {beyond[0]!r} has none")
    for token, index in vocabulary.items():
        tokens[index] = token
        types[index] = kinds.NORMAL
        if index in added:
            types[index] = kinds.CONTROL if added[index]["special"] else kinds.USER_DEFINED
    if len(set(tokens)) < rows:  # llama.cpp would loop forever
        raise _refusal("two of its tokens have the same text")
    return tokens, types


# --- byte-level -------------------------------------------------------------------------------------------------------


def _pre_tokenizer(rules: dict[str, Any]) -> str:
    """llama.cpp's name for how text is split before pairs are merged."""
    steps = _parts(rules["pre_tokenizer"], "pretokenizers")
    if not any(step["type"] == "ByteLevel" for step in steps):
        raise _refusal("it is neither byte-level nor has it the 256 bytes to fall back on")
    normalizer = (rules["normalizer"] or {"type": "NFC"})["type"]
    if normalizer != "NFC":
        raise _refusal(f"its normalizer {normalizer} has no counterpart in llama.cpp")
    splits = tuple(split for split in map(_split, steps) if split)
    whole_words = bool(rules["model"].get("ignore_merges"))
    if (splits, whole_words) not in PRE_TOKENIZERS:
        how = ", then ".join(splits) or "nothing"
        raise _refusal(
            f"llama.cpp has no name that ffgym knows for its way to split text: {how}"
            f"{', whole words first' if whole_words else ''}"
        )
    return PRE_TOKENIZERS[splits, whole_words]


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[name]) if step["type"] == "Sequence" else [step]


def _split(step: dict[str, Any]) -> str:
    """What one step splits by; nothing for the step that only turns bytes into characters."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return WORDS if regex else ""
        case {"type": "Digits", "individual_digits": True}:
            return DIGITS
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return regex
    raise _refusal(f"llama.cpp has no counterpart of its step {json.dumps(step, ensure_ascii=False)}")


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def _space_prefix(rules: dict[str, Any]) -> bool:
    """Whether text gets a space in front; the one thing in which tokenizers made from SentencePiece differ here."""
    normalizers = _parts(rules["normalizer"], "normalizers")
    steps = _parts(rules["pre_tokenizer"], "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    match normalizers, steps:
        case [[{"type": "Prepend", "prepend": "▁"}, last], []] if last == replace:
            return True
        case [[only], [] | [{"type": "Split", "pattern": {"String": " "}}]] if only == replace:
            return False  # a split at spaces, after which there are none
        case [[], [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]]:
            # Differences remain: unlike SentencePiece and llama.cpp, "first" puts no space behind a special token, and
            # no scheme puts one before a space.
            return bool(scheme != "never")
    raise _refusal("llama.cpp has no counterpart of its way to treat spaces")


def _scores(tokens: list[str], types: list[Any], merges: Sequence[Iterable[str]]) -> list[float]:
    """A score for every token that merges them in the order of the list.

    SentencePiece merges whichever neighbours form the token of the highest score; a list of merges names the pairs. The
    two agree where the list has every pair that forms a token of the vocabulary, as one made from SentencePiece has.
    """
    rank: dict[str, int] = {}
    pairs = set()
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
        pairs.add((left, right))
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.NORMAL} - BYTES
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal and (left, right) not in pairs:
                raise _refusal(f"its merges are no SentencePiece's: {left!r} + {right!r} is a token, and none of them")
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _sentencepiece_type(kind: Any, token: str, unknown: str | None) -> Any:
    if token == unknown:
        return gguf.TokenType.UNKNOWN
    return gguf.TokenType.BYTE if token in BYTES else kind


def _spaced(token: str, kind: Any) -> str:
    """llama.cpp looks for tokens of the user's in the text as it is, before spaces are replaced."""
    return token.replace(SPACE, " ") if kind == gguf.TokenType.USER_DEFINED else token


# --- special tokens ---------------------------------------------------------------------------------------------------


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets a first and a last token; found by trying, because there are many ways to say it."""
    text = "a"
    plain = list(tokenizer(text, add_special_tokens=False).input_ids)
    around = list(tokenizer(text).input_ids)
    for bos, eos in product((False, True), repeat=2):
        if around == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
            return bos, eos
    raise _refusal(f"it puts other tokens than bos and eos around a text: {tokenizer.convert_ids_to_tokens(around)}")


def _special(tokenizer: Any, ends: Sequence[int]) -> dict[str, int]:
    if tokenizer.eos_token_id is None:  # llama.cpp would take the id that its first models had
        raise ModelError(
            "the tokenizer names no token that ends a text, and llama.cpp would make one up",
            hint="Set eos_token in tokenizer_config.json.",
        )
    found = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    further = [end for end in ends if end != tokenizer.eos_token_id]
    found |= dict(zip(("eot", "eom"), further, strict=False))
    return {role: int(token) for role, token in found.items() if token is not None}
