"""A tiny language model that has really been trained, converted from another package's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ffgym.data.assets import Asset, fetch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

GLASSLLM = Asset(
    name="glassllm-en",
    package="glassllm",
    version="0.1.0",
    sha256="1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
    size=3_196_628,
    members=("glassllm/weights/en.*", "*.dist-info/licenses/LICENSE"),
    license="MIT",
    source="glassllm's English model, 852,608 trained parameters",
)


def glass_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A really trained tiny Llama (4 layers, 852,608 parameters, 128 positions) and its tokenizer of 1,024 tokens.

    These are the English weights of the package glassllm 0.1.0 (MIT), trained on "Alice's Adventures in Wonderland"
    and similar prose, and converted: it knows English a little, so that pruning it costs something. Trained without a
    BOS token.
    """
    folder = fetch(GLASSLLM)
    with np.load(folder / "en.npz", allow_pickle=False) as arrays:
        model = llama_from_glass(arrays)
    return model, glass_tokenizer(folder / "en.tokenizer.json")


def llama_from_glass(arrays: Mapping[str, np.ndarray]) -> LlamaForCausalLM:
    """Convert glassllm's arrays to a stock Llama.

    glassllm multiplies from the left (``x @ W``), so weights are transposed, and it rotates channel 2i of a head with
    channel 2i + 1, where Hugging Face rotates channel i with channel i + head_dim / 2, so query and key rows are
    reordered.

    Args:
        arrays: what its ``.npz`` file holds: ``__config__`` (JSON), ``E`` (vocabulary, hidden), ``norm_f.gamma`` and
            per block ``norm1.gamma``, ``attn.W_Q`` (in, out) ..., ``ffn.W2``.

    Returns:
        The model in float32, in evaluation mode.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = json.loads(str(arrays["__config__"]))
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["d_model"],
        intermediate_size=arrays["blocks.0.ffn.W1"].shape[1],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        max_position_embeddings=sizes["max_len"],
        rms_norm_eps=sizes["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_base"]},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    model = LlamaForCausalLM(config)
    weights = {"model.embed_tokens.weight": arrays["E"], "model.norm.weight": arrays["norm_f.gamma"]}
    for layer in range(sizes["n_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blocks.{layer}"
        weights |= {
            f"{ours}.input_layernorm.weight": arrays[f"{theirs}.norm1.gamma"],
            f"{ours}.post_attention_layernorm.weight": arrays[f"{theirs}.norm2.gamma"],
            f"{ours}.self_attn.q_proj.weight": _half_split(arrays[f"{theirs}.attn.W_Q"].T, config.head_dim),
            f"{ours}.self_attn.k_proj.weight": _half_split(arrays[f"{theirs}.attn.W_K"].T, config.head_dim),
            f"{ours}.self_attn.v_proj.weight": arrays[f"{theirs}.attn.W_V"].T,
            f"{ours}.self_attn.o_proj.weight": arrays[f"{theirs}.attn.W_O"].T,
            f"{ours}.mlp.gate_proj.weight": arrays[f"{theirs}.ffn.W1"].T,
            f"{ours}.mlp.up_proj.weight": arrays[f"{theirs}.ffn.W3"].T,
            f"{ours}.mlp.down_proj.weight": arrays[f"{theirs}.ffn.W2"].T,
        }
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict({name: torch.from_numpy(w.astype(np.float32)) for name, w in weights.items()})
    return model.eval()


def _half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of each head from (0, 1, 2, 3, ...) to (0, 2, ..., 1, 3, ...); shape (heads * head_dim, in)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return pairs.transpose(0, 2, 1, 3).reshape(rows.shape)


def glass_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Read glassllm's byte-pair vocabulary as a stock fast tokenizer; it adds no special tokens.

    Args:
        path: its ``en.tokenizer.json``: an alphabet and the merges, in order.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    content = json.loads(path.read_text(encoding="utf-8"))
    merges = [(left, right) for left, right in content["merges"]]
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    vocabulary = [*special, *content["alphabet"], *(left + right for left, right in merges)]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n|▁*[^▁\n]+|▁+"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=128,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
