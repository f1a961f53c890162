"""A GGUF file splits text as the tokenizer beside the weights does, or is not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gguf
import pytest
from glass_model import glass_model
from tiny_tokenizers import PRE_TOKENIZERS, byte_level, sentencepiece
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ffgym.errors import ModelError
from ffgym.export.gguf.vocabulary import read_vocabulary

ROWS = 400


def changed(tokenizer: PreTrainedTokenizerFast, change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerFast:
    """The tokenizer with its rules edited as JSON."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    change(rules)
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), **special)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_splits_have_llama_cpps_name(pre: str) -> None:
    vocabulary = read_vocabulary(byte_level(pre), 128)
    assert (vocabulary.model, vocabulary.pre, vocabulary.scores) == ("gpt2", pre, None)
    assert vocabulary.merges[:2] == ["t h", "th e"]
    assert vocabulary.space_prefix is False


@pytest.mark.parametrize(
    ("options", "prefix"), [({}, True), ({"legacy": True}, True), ({"space_prefix": False}, False)]
)
def test_sentencepiece_is_recognised(options: dict[str, bool], prefix: bool) -> None:
    vocabulary = read_vocabulary(sentencepiece(**options), ROWS)
    assert (vocabulary.model, vocabulary.pre, vocabulary.merges) == ("llama", "default", [])
    assert vocabulary.space_prefix is prefix


def test_scores_rank_tokens_as_their_merges_do() -> None:
    vocabulary = read_vocabulary(sentencepiece(), ROWS)
    assert vocabulary.scores is not None
    score = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert score["▁t"] > score["he"] > score["▁the"] > score["st"] > score["x"]


def test_every_token_has_its_kind() -> None:
    kind = gguf.TokenType
    pieces = read_vocabulary(sentencepiece(), ROWS)
    types = dict(zip(pieces.tokens, pieces.types, strict=True))
    assert (types["<unk>"], types["<bos>"], types["<0x41>"]) == (kind.UNKNOWN, kind.CONTROL, kind.BYTE)
    assert (types["<tool>"], types["   "], types["he"]) == (
        kind.USER_DEFINED,
        kind.USER_DEFINED,
        kind.NORMAL,
    )
    assert len(pieces.tokens) == ROWS
    assert (pieces.tokens[-1], pieces.types[-1]) == (f"[PAD{ROWS - 1}]", kind.UNUSED)
    bytes_ = read_vocabulary(byte_level(), 130)
    assert dict(zip(bytes_.tokens, bytes_.types, strict=True))["<eos>"] == kind.CONTROL
    assert bytes_.types[-3:] == [kind.USER_DEFINED, kind.UNUSED, kind.UNUSED]


def test_special_tokens_and_what_is_put_around_a_text() -> None:
    vocabulary = read_vocabulary(byte_level(add_bos=True), 128, ends=[2, 7, 9])
    assert vocabulary.special == {"bos": 1, "eos": 2, "pad": 0, "eot": 7, "eom": 9}
    assert (vocabulary.add_bos, vocabulary.add_eos) == (True, False)
    assert read_vocabulary(byte_level(), 128).add_bos is False


def test_the_chat_template_comes_along() -> None:
    tokenizer = byte_level()
    assert read_vocabulary(tokenizer, 128).chat_template is None
    tokenizer.chat_template = "{{ messages }}"
    assert read_vocabulary(tokenizer, 128).chat_template == "{{ messages }}"


# --- refusals ---------------------------------------------------------------------------------------------------------


def word_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<bos>": 0, "<eos>": 1}, unk_token="<bos>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def with_step(step: dict[str, Any]) -> PreTrainedTokenizerFast:
    return changed(byte_level(), lambda rules: rules["pre_tokenizer"]["pretokenizers"].insert(0, step))


def with_token(tokenizer: PreTrainedTokenizerFast, **flags: bool) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<call>", **flags)])
    return tokenizer


def lower_case() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def without_eos() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)


def twice_bos() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <bos> $A", special_tokens=[("<bos>", 1)]
    )
    return tokenizer


def words_first(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return changed(tokenizer, lambda rules: rules["model"].update(ignore_merges=True))


def with_spaces_kept() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", split=True)
    return tokenizer


def without_a_merge() -> PreTrainedTokenizerFast:
    return changed(sentencepiece(), lambda rules: rules["model"]["merges"].remove(["a", "nd"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (word_level, "WordLevel model"),
        (lambda: glass_model()[1], "neither byte-level nor has it the 256 bytes"),
        (lambda: with_step({"type": "Digits", "individual_digits": False}), "no counterpart of its step.*Digits"),
        (lambda: with_step({"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}),
         r"no name that ffgym knows.*x\+, then ByteLevel"),
        (lambda: words_first(byte_level()), "whole words first"),
        (lower_case, "normalizer Lowercase"),
        (with_spaces_kept, "way to treat spaces"),
        (without_a_merge, "'a' \\+ 'nd' is a token"),
        (lambda: with_token(byte_level(), lstrip=True), "token '<call>' where it does not"),
        (lambda: with_token(sentencepiece(legacy=True), normalized=True), "token '<call>' where it does not"),
        (twice_bos, "other tokens than bos and eos"),
        (without_eos, "no token that ends a text"),
    ],
    ids=lambda value: None if callable(value) else value[:20],
)  # fmt: skip
def test_what_llama_cpp_would_do_otherwise_is_refused(
    make: Callable[[], PreTrainedTokenizerFast], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        read_vocabulary(make(), 4096)
    assert raised.value.hint


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ModelError, match="'<tool>' has none"):
        read_vocabulary(byte_level(), 127)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="no fast tokenizer"):
        read_vocabulary(Slow(), 128)
