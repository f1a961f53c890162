"""Text that occurs twice, found by the hashes of its runs of tokens.

A run of 50 tokens is what Lee et al. (arXiv 2107.06499) call a duplicate.
"""

from __future__ import annotations

import numpy as np

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
    columns = max(0, ids.shape[1] - run + 1)
    hashes = np.zeros((ids.shape[0], columns), dtype=np.uint64)
    power = np.uint64(1)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for offset in range(run):
            hashes += (ids[:, offset : offset + columns].astype(np.uint64) + np.uint64(1)) * power
            power = power * HASH_BASE
    return hashes
