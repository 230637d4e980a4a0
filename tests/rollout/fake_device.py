"""A device that does not exist: its tensors are computed on the CPU, but do not mix with others.

What forgets to name the device of a new tensor fails here as it would on a GPU, and every wait for
the device is counted: on a GPU each one lets it run dry.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FAKE = torch.device("lazy", 0)
_WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero")


class FakeTensor(Tensor):
    """A tensor on the device; ``inner`` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> FakeTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=FAKE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].inner = args[1].inner
            return None
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of FakeDevice")


def _inner(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        return value.inner
    return torch.device("cpu") if value == FAKE and isinstance(value, torch.device) else value


def _wrapped(value: Any) -> Any:
    return FakeTensor(value) if type(value) is Tensor else value


class FakeDevice(TorchDispatchMode):
    """Inside, tensors can be on :data:`FAKE`.

    Attributes:
        waits: how often the host waited for the device, by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        on_device = [v for v in flat if isinstance(v, FakeTensor)]
        on_host = [v for v in flat if type(v) in (Tensor, nn.Parameter) and v.ndim]
        named = [v for v in flat if isinstance(v, torch.device)]
        name = func.overloadpacket.__name__
        target = named[-1] if named else FAKE if on_device else None
        if on_device and (name in _WAITS or (target is not None and target != FAKE)):
            self.waits[name] += 1
        if on_device and on_host and name != "copy_":
            raise RuntimeError(f"{func} of tensors on {FAKE} and in host memory")
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name.endswith("_") and not name.endswith("__"):
            return args[0]
        if target != FAKE:
            return out.clone() if on_device and isinstance(out, Tensor) else out
        if not on_device and on_host and isinstance(out, Tensor):
            out = out.clone()
        return tree_map(_wrapped, out)


def moved(model: nn.Module) -> nn.Module:
    """Put parameters and buffers of ``model`` on the device, in place; inside of FakeDevice."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tensor = FakeTensor(parameter.data.clone())
                new = nn.Parameter(tensor, requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(buffer.clone())
    return model
