"""Corpora, splits and pinned assets: where text and the embedded default come from."""
