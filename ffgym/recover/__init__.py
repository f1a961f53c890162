"""Training a pruned model: one file a method."""
