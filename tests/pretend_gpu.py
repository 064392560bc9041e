"""A GPU for machines without one: tensors that say they are on `GPU` and hold their values on the CPU.

As on a real one, an operation that mixes them with tensors of the CPU fails, except for those without dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# PyTorch takes this for another device than the CPU ("cpu" without a number), and autograd accepts it.
GPU = torch.device("cpu", 0)
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
# Whatever they get, PyTorch lets these indices be on the CPU.
_TAKES_CPU_INDICES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class GpuTensor(Tensor):
    """A tensor whose values are in `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "GpuTensor":
        made: GpuTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=GPU,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"GpuTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _OnGpu(TorchDispatchMode):
    """Makes tensors on the GPU where one is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in given if isinstance(tensor, GpuTensor)]
    asked = kwargs.get("device")
    is_there = bool(there) if asked is None else torch.device(asked) == GPU
    if func is torch.ops.aten.copy_.default:
        is_there = isinstance(args[0], GpuTensor)
    elif there and func not in _MOVES:
        must_be_there = args[:1] if func in _TAKES_CPU_INDICES else given
        strays = [tensor for tensor in must_be_there if not isinstance(tensor, GpuTensor) and tensor.dim()]
        if strays:
            raise RuntimeError(
                f"{func}: expected all tensors on one device, got one of {tuple(strays[0].shape)} on cpu"
            )
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(_unwrapped, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    originals = {id(tensor.inner): tensor for tensor in there}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in originals:  # an operation in place
            return originals[id(value)]
        return GpuTensor(value) if is_there else value

    return tree_map(wrapped, result)


def _unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, GpuTensor) else value


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """Within the block, `GPU` can be computed on."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter has to change its class
    try:
        with _OnGpu():
            yield GPU
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
