"""How good and how large a model is: perplexity and size."""
