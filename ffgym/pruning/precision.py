"""float64 on every device: what Apple's mps lacks is computed on the CPU instead."""

import torch

WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices


def float64_device(device: torch.device) -> torch.device:
    """``device`` itself, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, float64, on :func:`float64_device` of where they lie."""
    return tensor.to(float64_device(tensor.device)).double()  # moved first: the other way round makes one over there


def sum_in_float64(x: torch.Tensor) -> torch.Tensor:
    """The sum over rows, shape (n,), float64, on :func:`float64_device`, to be added to those of other batches.

    Args:
        x: shape (tokens, n). These rows are added up in its own dtype, pairwise.
    """
    return in_float64(x.sum(dim=0))
