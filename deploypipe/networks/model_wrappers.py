"""Remove wrappers around networks, such as DataParallel and torch.compile, and reject networks that cannot be pruned.

A wrapper adds a prefix to every name of the state dict, hides the layers from hooks, or runs code that was compiled for
the earlier sizes. Every function that accepts a network calls `unwrapped` first.
"""

from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from deploypipe.errors import ModelError
from deploypipe.networks.model_copies import copied

_SHARDED = ("torch.distributed.fsdp",)
_QUANTISED = (
    "torch.ao.quantization",
    "torch.ao.nn.qat",
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.nn.intrinsic.quantized",
    "torchao",
)
_STUBS = "torch.ao.quantization.stubs"  # mark where a float network will be quantised, and do nothing


def unwrapped(model: nn.Module) -> nn.Module:
    """The network without nn.DataParallel, DistributedDataParallel, AveragedModel and torch.compile, wherever they are.

    It shares parameters and buffers with `model`, which does not change. ModelError, with the part and the remedy, if
    it is not a network, or is a TorchScript, exported, quantised or sharded one.
    """
    if isinstance(model, torch.export.ExportedProgram):
        raise ModelError("the network is a torch.export program; give the torch.nn.Module that it was exported from")
    if not isinstance(model, nn.Module):
        raise ModelError(f"a network must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if reason := _refusal(module):
            where = f"{name!r} is" if name else "the network is"
            raise ModelError(f"{where} {reason}")
    while (inner := _inside(model)) is not None:
        model = inner
    if not any(_is_compiled(module) or _inside(module) is not None for module in model.modules()):
        return model
    return _without_wrappers(model)


def _without_wrappers(model: nn.Module) -> nn.Module:
    """Copy the modules, but not their tensors. Copies do not have the code compiled by `module.compile()`."""
    known: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for _, module in sorted(model.named_modules(), key=lambda item: -item[0].count(".")):  # innermost first
        inner = _inside(module)
        if inner is not None:  # wrappers around wrappers come later, and find it among those known
            known[id(module)] = copied(inner, known)
    return copied(model, known)


def _inside(module: nn.Module) -> nn.Module | None:
    """The network inside a wrapper; None for any other module."""
    if isinstance(module, DataParallel | DistributedDataParallel | torch.optim.swa_utils.AveragedModel):
        inner: nn.Module = module.module
        return inner
    if any(cls.__name__ == "OptimizedModule" for cls in type(module).__mro__):  # its import takes seconds
        return module._modules["_orig_mod"]
    return None


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


def _refusal(module: nn.Module) -> str:
    """Why a network with this part cannot be pruned; "" if it can."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module (torch.jit.script or trace); give the Python network that it was made from"
    if _is_of(module, ("torch.export._unlift",)):
        return "the module of a torch.export program; give the torch.nn.Module that it was exported from"
    if _is_of(module, _SHARDED):
        return f"sharded over several processes ({kind}); gather its weights into the plain network first"
    if _is_of(module, _QUANTISED) and not _is_of(module, (_STUBS,)):
        return f"prepared for quantisation or quantised ({kind}); prune the float network first"
    if isinstance(module, fx.GraphModule) and any("quantize" in str(node.target) for node in module.graph.nodes):
        return "a graph that quantises its values; prune the float network first"
    weights = [tensor for tensor in module._parameters.values() if tensor is not None]
    if any(is_lazy(tensor) for tensor in weights):
        return f"a {kind} whose weights have no shape yet; call the network on one batch first"
    odd = [type(tensor.data).__name__ for tensor in weights if not _is_plain(tensor)]
    return f"a {kind} whose weights are of the type {odd[0]}; give the network with plain float weights" if odd else ""


def _is_of(module: nn.Module, packages: tuple[str, ...]) -> bool:
    kind: Any = type(module)  # mypy believes that classes of modules are unhashable
    return _comes_from(kind, packages)


@cache
def _comes_from(kind: type, packages: tuple[str, ...]) -> bool:
    return any(f"{cls.__module__}.".startswith(f"{name}.") for cls in kind.__mro__ for name in packages)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is not quantised and not of a subclass that computes in its own way (torchao, DTensor)."""
    return not tensor.is_quantized and type(tensor.data) is torch.Tensor
