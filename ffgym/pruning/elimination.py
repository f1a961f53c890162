"""Backward elimination: which units go first where all that are left are refitted after each.

A consumer W (m x n) with inputs x of second moment A (damped) keeps some channels K. The best refit is W' = W A_:K
(A_KK)^-1. Taking the channels S of one more unit away, and refitting again, adds the output error

    tr(W'_S (P_SS)^-1 W'_S^T),  P = (A_KK)^-1,

the optimal brain surgeon's (Hassibi and Stork 1993) for a block of channels, as ZipLM (Kurtic et al. 2023, arXiv
2302.04089) removes heads and neurons. The unit that adds least goes, W' and P are brought up to date, and so on.
"""

from __future__ import annotations

import torch

from ffgym.pruning.ordering import expand_order

ROUNDS = 64  # units go in about so many rounds: each takes products of the size of what is left


def elimination_errors_(weight: torch.Tensor, inverse: torch.Tensor, channels_per_unit: int) -> torch.Tensor:
    """The output error once a unit is gone with all those that go before it; the first to go has the least.

    Within a round, the errors that units add one by one are summed up.

    Args:
        weight: dense W, shape (m, n), float64; it is overwritten.
        inverse: P of all channels, shape (n, n), float64; it is overwritten.
        channels_per_unit: each unit owns so many contiguous channels.

    Returns:
        shape (units,), float64, E||(W - W') x||^2 with the ridge term.
    """
    block = channels_per_unit
    units = weight.shape[1] // block
    at_once = -(-units // ROUNDS)
    left = torch.arange(units, device=weight.device)  # the units that the columns belong to
    errors = weight.new_zeros(units)
    total = weight.new_zeros(())
    while len(left):
        gone = torch.zeros(len(left), dtype=torch.bool, device=left.device)
        for _ in range(-(-len(left) // (2 * at_once))):  # half of them go, then the matrices shrink: that copies them
            added = _added(weight, inverse, block).masked_fill(gone, torch.inf)
            going = torch.argsort(added, stable=True)[:at_once]
            errors[left[going]] = total + added[going].cumsum(0)
            total = errors[left[going[-1]]]
            gone[going] = True
            channels = expand_order(going, block)
            share = torch.linalg.solve(inverse[channels][:, channels], inverse[channels])
            weight.addmm_(weight[:, channels], share, alpha=-1)
            inverse.addmm_(inverse[:, channels], share, alpha=-1)
            inverse[channels, channels] = 1.0  # for what is gone the rest is 0 up to rounding
        staying = (~gone).nonzero().flatten()
        channels = expand_order(staying, block)
        weight, inverse, left = weight[:, channels], inverse[channels], left[staying]
        inverse = inverse[:, channels]  # in two steps, each of which lets go of the matrix before
    return errors


def _added(weight: torch.Tensor, inverse: torch.Tensor, block: int) -> torch.Tensor:
    """The error that each unit adds if it goes alone; shape (units,)."""
    columns = weight.T.reshape(-1, block, weight.shape[0])
    units = len(columns)
    own = inverse.view(units, block, units, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    refitted: torch.Tensor = torch.linalg.solve(own, columns)
    return (columns * refitted).sum(dim=(1, 2))
