"""Prune a model from Python: python examples/search.py [run.toml]."""

import sys

import ffgym

result = ffgym.run(ffgym.load_config(*sys.argv[1:]))
for row in result.table.rows:
    print(f"{row.label:40} perplexity {row.perplexity:8.2f}, {row.sparsity_model:.0%} smaller")
print("units kept:", result.allocation["kept"])
if result.saved:  # unless output.save_model = false
    print("saved in", result.saved.path)
