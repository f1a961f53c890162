"""What an allocation may cost: one file a resource, and the size and time of a model."""
