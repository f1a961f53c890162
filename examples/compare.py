"""Run two agents and a rule on equal terms: python examples/compare.py [run.toml].

All have the same model, text and refit. `ffgym compare` says how sure the differences of these runs are.
"""

import sys

import ffgym

for agent in ("reinforce", "pathwise", "mlp-first"):
    result = ffgym.run(ffgym.load_config(*sys.argv[1:], agent={"name": agent}, search={"random_baseline": False}))
    dense, found = result.table.rows[0], result.table.saved
    print(f"{agent:10} perplexity {found.perplexity:.2f}, {found.perplexity / dense.perplexity:.2f} x dense")
