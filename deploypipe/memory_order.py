"""The memory order of images: channels last if a network runs in it, with a workaround for one unsafe convolution."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from deploypipe.task import channels_last, evaluating, forward, take

Arrange: TypeAlias = Callable[[Any], Any]  # a batch of inputs -> the same batch in the order to compute in


def as_given(inputs: Any) -> Any:
    """Keep a batch of inputs in its memory order."""
    return inputs


def find_order(model: nn.Module, inputs: Any) -> Arrange:
    """`channels_last` for a network of images that runs in it, else `as_given`.

    A network that calls `view` on its activations runs in the plain order only: two samples are passed to see it.
    """
    few = take(inputs, 2)
    arranged = channels_last(few)
    if arranged is few:
        return as_given
    try:
        with evaluating(model), torch.no_grad():
            forward(model, arranged)
    except RuntimeError:  # if the plain order fails as well, the caller's own pass says so
        return as_given
    return channels_last


def find_order_(model: nn.Module, inputs: Any) -> Arrange:
    """Like `find_order`, and put the weights of the model in the same order: faster for many passes."""
    if channels_last(inputs) is inputs:
        return as_given
    _order_weights_(model, torch.channels_last)
    arrange = find_order(model, inputs)
    if arrange is as_given:
        _order_weights_(model, torch.contiguous_format)
    return arrange


def _order_weights_(model: nn.Module, order: torch.memory_format) -> None:
    """Set the order of 4-d parameters only: `model.to(memory_format=...)` fails for 3-d convolutions."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=order)


class SafeConvolutions(TorchFunctionMode):
    """Around forward passes with a backward pass: narrow convolutions of one tap and a stride become ones of stride 1.

    The positions that they skip are dropped first; the result is the same. Without it, on processors without AVX-512,
    the weight gradient of such a layer with fewer than eight inputs in channels-last order writes outside its buffer:
    oneDNN's `jit_avx2_1x1_convolution_bwd_weights`. Valgrind sees it with torch 2.13 at 3 and 6 inputs, and not at 7 to
    23, with more taps, at stride 1, in the plain order, in groups, in one or three dimensions, or transposed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CONVOLUTIONS:
            return _without_stride(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_SAFE_WIDTH = 8  # floats in a register of AVX2
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def _without_stride(
    convolve: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    steps = _each(stride, weight.dim() - 2)
    is_narrow = weight.shape[1] < _SAFE_WIDTH and all(size == 1 for size in weight.shape[2:])
    if input.device.type != "cpu" or not is_narrow or set(steps) == {1} or padding == "same":
        return convolve(input, weight, bias, stride, padding, dilation, groups)
    edges = _each(0 if padding == "valid" else padding, len(steps))
    if any(edges):
        input = F.pad(input, [edge for edge in reversed(edges) for _ in range(2)])
    read: Any = (..., *(slice(None, None, step) for step in steps))
    return convolve(input[read], weight, bias, 1, 0, dilation, groups)


def _each(value: Any, count: int) -> tuple[int, ...]:
    """One number for each axis, as torch's convolutions read it."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values
