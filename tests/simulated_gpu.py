"""A GPU that does not exist: tensors that say they lie on it compute on the CPU, and refuse to meet those that do not.

What a GPU refuses is refused here, too: tensors of two devices in one operation, ``.numpy()`` of a tensor that is not
on the CPU. Kernels, streams, memory and speed are not simulated. As a program it runs ffgym's command line on it:

    python tests/simulated_gpu.py run --model ./tiny --set model.device=cuda

It changes torch for the whole process, so tests start it as one of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CPU = torch.device("cpu")
NAME = "simulated"  # what torch calls the device; ffgym sees cuda
GIB = 2**30
# A GPU takes indices from the CPU; and copies are how tensors change their device.
MIXED = ("aten.index", "aten._index_put_impl_", "aten._unsafe_index", "aten._to_copy", "aten.copy_")
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)


def named(device: Any) -> torch.device:
    """A device by its name; the GPU with its index."""
    with torch._C.DisableTorchFunction():
        device = torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type in ("cuda", NAME) else device


class OnGpu(torch.Tensor):
    """A tensor on the GPU.

    Attributes:
        held: its values, on the CPU.
    """

    held: torch.Tensor
    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, place: torch.device) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: torch.Tensor, place: torch.device) -> None:
        self.held, self.place = held, place

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return self.place

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held!r}, device={self.place})"

    def __deepcopy__(self, memo: Any) -> OnGpu:
        copied = OnGpu(self.held.detach().clone(), self.place).requires_grad_(self.requires_grad)
        copied._is_param = isinstance(self, torch.nn.Parameter)
        return copied

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {self.place} device type tensor to numpy")
        return self.held.detach().numpy()

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()


def computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives, on the device that it belongs to.

    Raises:
        RuntimeError: its tensors are on several devices.
    """
    flat, spec = tree_flatten((args, kwargs))
    tensors = [each for each in flat if isinstance(each, torch.Tensor)]
    places = {each.device for each in tensors if isinstance(each, OnGpu) or (each.dim() > 0 and not each.is_meta)}
    if len(places) > 1 and not str(func).startswith(MIXED):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {places} in {func}")
    wanted = kwargs.get("device")
    own = [each.place for each in tensors if isinstance(each, OnGpu)]
    place = named(wanted) if wanted is not None else own[0] if own else CPU
    if str(func).startswith("aten.copy_"):
        place = args[0].device
    if place.type == "cuda" and wanted is not None:
        flat, spec = tree_flatten((args, {**kwargs, "device": CPU}))
    known = {id(each.held): each for each in flat if isinstance(each, OnGpu)}
    inner, options = tree_unflatten([each.held if isinstance(each, OnGpu) else each for each in flat], spec)
    result = func(*inner, **options)
    if place.type != "cuda":
        return result

    def placed(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        return known[id(each)] if id(each) in known else OnGpu(each, place)  # in place: the tensor itself

    return tree_map(placed, result)


class _Factories(TorchDispatchMode):
    """Tensors that are made on the GPU, or brought there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wanted = (kwargs or {}).get("device")
        is_ours = any(issubclass(each, OnGpu) for each in types)
        if is_ours or (wanted is not None and named(wanted).type == "cuda"):
            return computed(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _is_cuda(argument: Any) -> bool:
    return isinstance(argument, str | torch.device) and str(argument) == "cuda"


class _Names(TorchFunctionMode):
    """``"cuda"`` means the GPU, also for what makes tensors of Python's numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return named(func(*args, **kwargs))
        args = [named(each) if _is_cuda(each) else each for each in args]
        if kwargs.get("device") is not None:
            kwargs["device"] = named(kwargs["device"])
            if func in FROM_DATA and kwargs["device"].type == "cuda":
                return func(*args, **{**kwargs, "device": CPU}).to(kwargs["device"])
        return func(*args, **kwargs)


class _Nothing(nullcontext[None], ContextDecorator):
    """Changes nothing, also as a decorator."""


class _Ready:
    """A stream or an event on which nothing is ever waited for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: _Ready()


def install() -> None:
    """Give this process its GPU."""
    answers = {
        "_lazy_init": None,
        "current_device": 0,
        "device_count": 1,
        "empty_cache": None,
        "get_device_capability": (9, 0),
        "get_device_name": "simulated",
        "is_available": True,
        "is_bf16_supported": True,
        "is_initialized": True,
        "max_memory_allocated": GIB,
        "mem_get_info": (70 * GIB, 80 * GIB),
        "memory_allocated": GIB,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "synchronize": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in ("device", "stream"):
        setattr(torch.cuda, name, nullcontext)
    for name in ("Event", "Stream", "current_stream"):
        setattr(torch.cuda, name, _Ready)
    torch.accelerator.synchronize = lambda *_: None
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    torch.cuda.manual_seed_all = lambda *_: None
    backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=torch.cuda)
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else _Nothing()
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.Tensor.record_stream = lambda self, *_: None
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    plain = threading.Thread.run

    def run(self: threading.Thread) -> None:  # modes hold for one thread
        with _Factories(), _Names():
            plain(self)

    threading.Thread.run = run
    _Factories().__enter__()
    _Names().__enter__()


def check() -> None:
    """It refuses what a GPU refuses."""
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert (there + here.to(there.device) + 1).sum().item() == 9
    for mix in (lambda: there + here, lambda: here @ there, lambda: torch.cat([here, there]), lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError), match="cuda"):
            mix()


if __name__ == "__main__":
    install()
    check()
    from ffgym.cli.app import main

    main()
