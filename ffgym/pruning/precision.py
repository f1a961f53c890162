"""float64 on every device: what Apple's mps lacks is computed on the CPU instead."""

import torch

WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices


def float64_device(device: torch.device) -> torch.device:
    """``device`` itself, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in float64, on `float64_device` of the tensor's device."""
    return tensor.to(float64_device(tensor.device)).double()  # moved first: the device may have no float64


def copy_in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """As `in_float64`, new even if the tensor is in float64 already: to be overwritten."""
    return tensor.to(float64_device(tensor.device)).to(torch.float64, copy=True)
