"""Text that occurs twice, found by the hashes of its runs of tokens.

A run of 50 tokens is what Lee et al. (arXiv 2107.06499) call a duplicate.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

REPEATED_TOKENS = 50
HASH_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token is multiplied away


def run_hashes(ids: np.ndarray, run: int) -> np.ndarray:
    """A 64-bit hash of every run of tokens: sum over j of (id_j + 1) * base^j.

    Args:
        ids: shape (rows, length), int64.
        run: tokens in a run, >= 1.

    Returns:
        shape (rows, length - run + 1), uint64; no columns where a row is shorter than a run.
    """
    if ids.shape[1] < run:
        return np.empty((len(ids), 0), dtype=np.uint64)
    powers = HASH_BASE ** np.arange(run, dtype=np.uint64)  # all arithmetic is modulo 2^64
    hashes: np.ndarray = sliding_window_view(ids.astype(np.uint64) + np.uint64(1), run, axis=1) @ powers
    return hashes
