"""Factors of a consumer's moment A = C C^T: their precision, the inverse of C, and how D = C^-1 is kept.

Up to `WIDE` channels factors are computed in float64 and kept in float32, above in float32 and bfloat16: a refit is
rounded to the model's dtype anyway, and the factors of a wide consumer take more memory than its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ffgym.pruning.precision import in_float64

WIDE = 2048  # channels
ROWS = 128  # of a block of the triangle
SOLVED = 512  # rows that are factorised, multiplied or inverted at once
LEVELS = 16  # about as many refits on the grid, evenly spread


def factor_dtype(channels: int) -> torch.dtype:
    """The dtype in which the factors of a consumer with so many channels are kept."""
    return torch.float32 if channels <= WIDE else torch.bfloat16


def factor_bytes(outputs: int, channels: int) -> int:
    """Bytes that the factors of a consumer of shape (outputs, channels) take, in memory and on disk."""
    return (outputs * channels + packed_size(channels)) * factor_dtype(channels).itemsize


def as_factor(matrix: torch.Tensor, channels: int) -> torch.Tensor:
    """A moment or weight in the precision that factors of so many channels are computed in."""
    return in_float64(matrix) if channels <= WIDE else matrix.float()


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Within it, float32 products round their factors to the model's dtype; sums stay float32.

    For a bfloat16 model a CPU then uses its bfloat16 units. A CUDA device uses TF32 for either half precision.
    """
    backends: Any = torch.backends  # whose attributes the stubs do not know
    cpu, cuda = backends.mkldnn.matmul, backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision = "bf16" if dtype is torch.bfloat16 else "ieee"
    cuda.fp32_precision = "ieee" if dtype is torch.float32 else "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


def as_multiplied_(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 numbers, in place, as `products_in` the dtype rounds them, so that sums agree with products."""
    return x.copy_(x.bfloat16()) if dtype is torch.bfloat16 else x


def factorise_(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C with C C^T = matrix, shape (n, n), and whether that failed: 0-dim, not 0 where it is not positive definite.

    A wide matrix is overwritten, block column by block column. LAPACK takes another one's memory, and torch a third of
    the time to clear what lies above the diagonal.
    """
    n = len(matrix)
    if n <= WIDE:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return lower, failed
    failures = []
    for i in range(0, n, SOLVED):
        end = min(i + SOLVED, n)
        matrix[i:, i:end].addmm_(matrix[i:, :i], matrix[i:end, :i].T, alpha=-1)
        own, failed = torch.linalg.cholesky_ex(matrix[i:end, i:end])
        failures.append(failed)
        matrix[i:end, i:end] = own
        matrix[end:, i:end] = torch.linalg.solve_triangular(own.T, matrix[end:, i:end], upper=True, left=False)
        matrix[i:end, end:] = 0
    return matrix, torch.stack(failures).sum()


def times_lower(weight: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """W C, shape (m, n), without most of what is zero in a wide C."""
    n = len(lower)
    if n <= WIDE:
        return weight @ lower
    product = weight.new_empty(weight.shape)
    for i in range(0, n, SOLVED):
        end = min(i + SOLVED, n)
        torch.mm(weight[:, i:], lower[i:, i:end], out=product[:, i:end])
    return product


def inverse_(lower: torch.Tensor) -> torch.Tensor:
    """D = C^-1, written over C, shape (n, n), row block by row block: D[i, :i] = -D[i, i] C[i, :i] D[:i, :i]."""
    n = len(lower)
    eye = torch.eye(min(SOLVED, n), dtype=lower.dtype, device=lower.device)
    for i in range(0, n, SOLVED):
        end = min(i + SOLVED, n)
        own = torch.linalg.solve_triangular(lower[i:end, i:end], eye[: end - i, : end - i], upper=False)
        left = own @ lower[i:end, :i]
        for j in range(0, i, SOLVED):
            lower[i:end, j : j + SOLVED] = -(left[:, j:] @ lower[j:i, j : j + SOLVED])
        lower[i:end, i:end] = own
    return lower


def packed_size(n: int) -> int:
    """Numbers in the row blocks of a triangle of n rows."""
    return sum((end - start) * end for start, end in _blocks(n))


def packed(lower: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The row blocks of a lower triangle, each as wide as its last row: shape (packed_size(n),)."""
    return torch.cat([lower[start:end, :end].to(dtype).flatten() for start, end in _blocks(len(lower))])


def unpacked(blocks: torch.Tensor, n: int, start: int, end: int) -> torch.Tensor:
    """Rows start .. end of a packed triangle of n rows, shape (end - start, end), float32."""
    rows = torch.zeros(end - start, end, dtype=torch.float32, device=blocks.device)
    for first in range(start // ROWS * ROWS, end, ROWS):
        last = min(first + ROWS, n)
        at, low, high = first * (first + ROWS) // 2, max(first, start), min(last, end)
        width = min(last, end)
        block = blocks[at : at + (last - first) * last].view(last - first, last)
        rows[low - start : high - start, :width] = block[low - first : high - first, :width]
    return rows


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n, ROWS):
        yield start, min(start + ROWS, n)


def grid(n: int) -> range:
    """The levels that other refits start from: about `LEVELS` multiples of a block, highest first."""
    step = ROWS * -(-n // (ROWS * LEVELS))
    return range((n - 1) // step * step, 0, -step)
