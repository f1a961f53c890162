"""Gaussian noise over sublayers: smooth over depth within each kind, plus a private part.

Sixty or more importances and a few hundred episodes: independent noise per sublayer spends most of them on directions
that cancel out. Neighbouring layers of one kind are worth about the same, so most of the noise is shared among them.

The kernel is the squared exponential of Gaussian processes (Rasmussen and Williams 2006, eq. 4.9).
"""

from __future__ import annotations

import numpy as np

LENGTH = 0.15  # over which share of the depth layers share their noise


def depth_covariance(dimensions: int, *, smooth: float) -> np.ndarray:
    """Covariance of unit-variance noise over 2L sublayers (attention and MLP alternate).

    ``smooth`` of the variance is a Gaussian-process component per kind, exp(-(i - j)^2 / (2 (0.15 L)^2)) over layers
    i, j; the rest is private. What would move all sublayers alike is taken out: the projection undoes it.

    Args:
        dimensions: 2L.
        smooth: share of variance that is smooth over depth, in [0, 1].

    Returns:
        shape (2L, 2L), float64, positive semi-definite.
    """
    layer = np.arange(dimensions) // 2
    kind = np.arange(dimensions) % 2
    distance = (layer[:, None] - layer[None, :]) / (LENGTH * max(1, dimensions // 2))
    shared = np.exp(-0.5 * distance**2) * (kind[:, None] == kind[None, :])
    covariance = smooth * shared + (1 - smooth) * np.eye(dimensions)
    centre = np.eye(dimensions) - 1.0 / dimensions
    result: np.ndarray = centre @ covariance @ centre
    return result


def square_root(covariance: np.ndarray) -> np.ndarray:
    """A symmetric S with S S = covariance; shape (d, d), float64."""
    values, vectors = np.linalg.eigh(covariance)
    result: np.ndarray = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return result
