"""How good a model is: losses, divergences, task accuracy, slopes; and the evaluator that measures allocations."""
