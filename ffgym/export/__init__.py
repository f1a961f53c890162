"""How a pruned model is saved: one file a target format."""
