"""Find blocks that can be replaced by the identity: modules that add their input to their result."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from deploypipe.pruning.modules.count_macs import Macs
from deploypipe.pruning.modules.module_calls import ADDITIONS, Call, evaluating
from deploypipe.records import Block, Frozen
from deploypipe.task import forward

_Given = tuple[Tensor, tuple[Any, ...], dict[str, Any]]  # a module's input, and its other arguments


def find_blocks(
    model: nn.Module, inputs: Any, calls: Mapping[str, Call], macs: Macs
) -> tuple[tuple[Block, ...], tuple[Frozen, ...]]:
    """Removable blocks in execution order, and modules of the same classes that are not removable with the reason.

    A block is called once. Its first argument is a tensor. It returns a tensor of the same shape and dtype, alone or
    first in a tuple. It contains a layer with weights. It adds its unchanged input to something computed from it, or it
    is one of several layers in a list. Of nested blocks the smallest are taken, so a stage of residual blocks is not
    itself a block. `model` is a copy whose requires_grad flags may be changed.
    """
    candidates = [name for name, call in calls.items() if call.keeps_kind and call.count == 1]
    candidates = [name for name in candidates if name and _has_weights(model.get_submodule(name))]
    residual = _residual(model, inputs, candidates)
    residual += [name for name in _repeated(model, candidates) if name not in residual]
    smallest = [n for n in residual if not any(other.startswith(f"{n}.") for other in residual)]
    smallest.sort(key=lambda name: calls[name].place)
    blocks = tuple(_block(model, name, calls, macs) for name in smallest)
    classes = {type(model.get_submodule(name)) for name in smallest}
    frozen = [
        Frozen(name=name, kind="block", reason=_why_not(call))
        for name, call in sorted(calls.items(), key=lambda item: item[1].place)
        if name not in residual and type(model.get_submodule(name)) in classes - {nn.Sequential}
    ]
    return blocks, tuple(frozen)


def _repeated(model: nn.Module, candidates: Sequence[str]) -> list[str]:
    """Candidates in one `nn.ModuleList` with others of their class, as the layers of a transformer are."""
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    kinds = Counter((name.rpartition(".")[0], type(model.get_submodule(name))) for name in candidates)
    return [
        name
        for name in candidates
        if (home := name.rpartition(".")[0]) in lists and kinds[home, type(model.get_submodule(name))] > 1
    ]


def _block(model: nn.Module, name: str, calls: Mapping[str, Call], macs: Macs) -> Block:
    params = sum(p.numel() for p in model.get_submodule(name).parameters())
    return Block(name=name, params=params, macs=macs.within(name), returns=calls[name].returns)


def _has_weights(module: nn.Module) -> bool:
    return any(_is_linear_like(m) for m in module.modules() if m is not module)


def _is_linear_like(module: nn.Module) -> bool:
    """Whether a module is a convolution or linear layer, of torch or another library (`Conv1D` of GPT-2)."""
    has_matrix = any(p.dim() > 1 and p.is_floating_point() for p in module.parameters(recurse=False))
    return isinstance(module, nn.Linear | _ConvNd) or (has_matrix and not isinstance(module, nn.Embedding))


def _why_not(call: Call) -> str:
    if call.count > 1:
        return f"is called {call.count} times"
    if call.shape_in is None or call.shape_out is None:
        return "its first argument or its first output is not a tensor"
    if call.shape_in != call.shape_out:
        return f"changes the shape from {call.shape_in} to {call.shape_out}"
    return "does not add its input to its output"


def _residual(model: nn.Module, inputs: Any, candidates: list[str]) -> list[str]:
    """Candidates that add their input to a tensor computed from it. Each runs alone on its recorded input."""
    seen: dict[str, _Given] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_keep(seen, name), with_kwargs=True) for name in candidates
    ]
    model.requires_grad_(False)
    with evaluating(model):
        try:
            with torch.no_grad():
                forward(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        return [name for name in candidates if _adds_its_input(model.get_submodule(name), *seen[name])]


def _keep(seen: dict[str, "_Given"], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = args[0].detach().clone(), args[1:], kwargs

    return hook


class _InputWatch(TorchFunctionMode):
    """Detect whether `tensor` itself is added to another tensor of its shape that depends on it.

    Additions inside a child that contains layers (`depth` > 0) are that child's shortcut, not the module's.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.is_added = False
        self.depth = 0

    def step(self, by: int) -> None:
        self.depth += by

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.depth and getattr(func, "__name__", "") in ADDITIONS and any(a is self.tensor for a in args):
            others = [a for a in args if isinstance(a, Tensor) and a is not self.tensor]
            self.is_added |= any(o.requires_grad and o.shape == self.tensor.shape for o in others)
        return func(*args, **(kwargs or {}))


def _adds_its_input(module: nn.Module, tensor: Tensor, others: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Parameters are frozen here, so a tensor requires a gradient exactly if it depends on the module's input."""
    if not tensor.is_floating_point():
        return False
    watched = tensor.requires_grad_(True) * 1  # not a leaf: the module may work in place
    watch = _InputWatch(watched)
    handles = []
    for child in module.modules():
        if child is not module and _has_weights(child):
            handles.append(child.register_forward_pre_hook(lambda *_: watch.step(1)))
            handles.append(child.register_forward_hook(lambda *_: watch.step(-1)))
    try:
        with watch:
            module(watched, *others, **named)
    finally:
        for handle in handles:
            handle.remove()
    return watch.is_added
