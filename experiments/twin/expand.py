"""Write a model with a key and a value head for every query head: the same function, with more heads to prune.

    python experiments/twin/expand.py demo twins/demo
    ffgym run --model twins/demo --agent reinforce --criterion wanda

A model with grouped queries shares each key/value head among several query heads, which stay or go together. In its
twin every query head has a copy of its own, so heads are pruned one by one. The demo model's three groups a layer
become nine heads, with 13 million parameters more.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ffgym.models.loading import load


def expand(name: str, folder: Path) -> None:
    """Save the twin of a model of a Llama-like family, whose key and value projections are linears of their own."""
    loaded = load(name, dtype="float32", device="cpu")
    model, config = loaded.model, loaded.model.config
    queries = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.k_proj, attention.v_proj):
                for parameter in projection.parameters():
                    heads = parameter.unflatten(0, (config.num_key_value_heads, -1))
                    parameter.data = heads.repeat_interleave(queries, dim=0).flatten(0, 1)
                projection.out_features *= queries
            attention.num_key_value_groups = 1
    config.num_key_value_heads = config.num_attention_heads
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    expand(sys.argv[1], Path(sys.argv[2]))
