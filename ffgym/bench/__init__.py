"""Many searches on equal terms: the bench, one cell of it, its table."""
