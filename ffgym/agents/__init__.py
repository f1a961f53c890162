"""Searchers. Each sees a vector environment and nothing else: importances go in, rewards come out."""
