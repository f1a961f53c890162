"""One family of every structure, for tests of what does not depend on an architecture's name."""

from __future__ import annotations

# Plain, with biases, with norms of queries and keys, with scaled logits, with fused linears, not gated.
DISTINCT_FAMILIES = ("llama", "qwen2", "qwen3", "granite", "phi3", "opt")
