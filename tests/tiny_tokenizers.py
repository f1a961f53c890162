"""Small tokenizers of the kinds that models really have, for files that carry one."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ffgym.export.gguf.vocabulary import BYTES, LLAMA_3, QWEN_2, TEKKEN

SPECIAL = ["<pad>", "<bos>", "<eos>"]
MERGES = (
    "t h|th e|Ġ the|i n|e r|Ġ a|a n|o u|r e|o n|e n|s t|n d|Ġ w|Ġ s|1 2|12 3|Ġ Ġ|ĠĠ Ġ|' s|Ċ Ċ|in g|. .|an d|Ġ and|"
    "e d|o r|e s"
)
PRE_TOKENIZERS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA_3), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN_2), "isolated")],
    "tekken": [pre_tokenizers.Split(Regex(TEKKEN), "isolated")],
}


def byte_level(pre: str = "gpt-2", *, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte pairs over ASCII: 128 tokens, the rows that tiny models have; ``pre`` is llama.cpp's name for the splits."""
    merges = [tuple(pair.split(" ")) for pair in MERGES.split("|")]
    alphabet = [c for c in string.printable if c.isprintable() and c != " "] + ["Ġ", "Ċ"]
    tokens = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges), "<tool>"]
    assert len(tokens) == 128
    rules = models.BPE(
        {token: index for index, token in enumerate(tokens)}, merges, ignore_merges=pre in ("llama-bpe", "tekken")
    )
    tokenizer = Tokenizer(rules)
    words = pre in ("gpt-2", "smollm")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*PRE_TOKENIZERS[pre], last])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return _finished(tokenizer, add_bos)


def sentencepiece(*, legacy: bool = False, space_prefix: bool = True, add_bos: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2's, Mistral's (``legacy``: as they were written first) and Gemma's (no ``space_prefix``) work."""
    pieces = [
        "▁t",
        "he",
        "▁the",
        "in",
        "er",
        "▁a",
        "an",
        "▁an",
        "nd",
        "and",
        "▁and",
        "ing",
        "▁w",
        "▁s",
        "12",
        "▁▁",
        "st",
    ]
    letters = [*string.ascii_lowercase, *string.digits, "▁", ".", ",", "'", "A", "T"]
    tokens = ["<unk>", "<bos>", "<eos>", *sorted(BYTES), *pieces, *letters]
    known = {*pieces, *letters}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    if not space_prefix:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<tool>", "   ")])
    return _finished(tokenizer, add_bos)


def _finished(tokenizer: Tokenizer, add_bos: bool) -> PreTrainedTokenizerFast:
    names = {f"{name[1:-1]}_token": name for name in (*SPECIAL, "<unk>") if tokenizer.token_to_id(name) is not None}
    tokenizer.add_special_tokens(list(names.values()))
    if add_bos:
        bos = tokenizer.token_to_id("<bos>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
