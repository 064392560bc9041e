"""Record one forward pass: which modules are called, in which order, on which shapes."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe import task
from deploypipe.records import Names
from deploypipe.task import forward, repeat_samples, take


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """How one module took part in the forward pass."""

    place: int  # in execution order, by first call
    count: int
    shape_in: tuple[int, ...] | None  # without the batch; None unless a tensor came first and went out (first)
    shape_out: tuple[int, ...] | None
    keeps_kind: bool  # input and output have the same dtype and shape, batch included
    returns: Names | None  # what follows the output tensor in a tuple, as in `Block`


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without fused attention kernels, which call no modules. All flags are restored afterwards."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with task.evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def one_thread_if_small(macs: int) -> Iterator[None]:
    """Use one CPU thread for passes of less than a billion MACs: on a busy machine these mostly wait for threads."""
    before = torch.get_num_threads()
    if macs < 1_000_000_000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def record_calls(model: nn.Module, inputs: Any) -> dict[str, Call]:
    """Run `model` once on `inputs` without gradients; the model is as before afterwards."""
    calls: dict[str, Call] = {}
    places: dict[str, int] = {}

    def enter(name: str) -> None:
        places.setdefault(name, len(places))

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = calls.get(name)
        first = first_tensor(output)
        is_plain = bool(args) and isinstance(args[0], Tensor) and first is not None  # masks may follow it
        is_known = is_plain and (before is None or before.shape_in is not None)
        calls[name] = Call(
            place=places[name],
            count=1 + (before.count if before else 0),
            shape_in=tuple(args[0].shape[1:]) if is_known else None,
            shape_out=tuple(first.shape[1:]) if first is not None and is_known else None,
            keeps_kind=first is not None and is_known and (args[0].shape, args[0].dtype) == (first.shape, first.dtype),
            returns=None if first is None or first is output else _returns(module, args, kwargs, output[1:]),
        )

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: enter(name)))
        handles.append(
            module.register_forward_hook(lambda m, a, k, o, name=name: leave(name, m, a, k, o), with_kwargs=True)
        )
    try:
        with evaluating(model), torch.no_grad():
            forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}  # names of PyTorch's functions


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a network's output, however they are nested."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        return [t for value in outputs.values() for t in output_tensors(value)]
    if isinstance(outputs, Iterable) and not isinstance(outputs, str):
        return [t for value in outputs for t in output_tensors(value)]
    return []


def first_tensor(output: Any) -> Tensor | None:
    """A module's output, or the first item of a tuple or list, if it is a tensor."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def _returns(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rest: Sequence[Any]) -> Names:
    """For each of `rest`, the parameter of forward() whose argument it is, or ""."""
    given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
    return tuple(
        next((name for name, value in given.items() if value is each and each is not None), "") for each in rest
    )


def two_samples(model: nn.Module, inputs: Any) -> Any:
    """Two samples: enough to see shapes, and batch 1 would hide mistakes in the batch axis."""
    return take(repeat_samples(model, inputs, 2), 2)
