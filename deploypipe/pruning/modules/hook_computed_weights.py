"""Turn weights that are computed before each call (weight_norm, spectral_norm, ...) into plain parameters.

Surgery can cut only stored tensors. Parametrizations (`torch.nn.utils.parametrize`) become plain when they are cut.
PyTorch cannot copy modules with its older hooks (weight_norm, spectral_norm, prune), nor parametrized recurrent layers.
Those become plain wherever a network enters.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.prune import remove as remove_mask
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from deploypipe.networks.model_copies import copied


def with_plain_weights(model: nn.Module) -> nn.Module:
    """`model`, or a copy with plain weights if hooks compute some of them."""
    return plain_copy(model) if any(_hooks(module) for module in model.modules()) else model


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy with plain parameters that hold the values which hooks compute in evaluation mode."""
    copy = copied(model)
    for module in copy.modules():
        for kind, name in list(_hooks(module)):
            _fold_(module, kind, name)
    make_plain_(module for module in copy.modules() if isinstance(module, RNNBase))
    return copy


def describe_hooks(model: nn.Module) -> str:
    """List the weights that `plain_copy` makes plain, such as "weight_norm of a.weight"; "" for none."""
    found = [f"{kind} of {name}.{weight}" for name, module in model.named_modules() for kind, weight in _hooks(module)]
    return ", ".join(found)


def make_plain_(modules: Iterable[nn.Module]) -> None:
    """Replace parametrizations by the values they compute."""
    for module in modules:
        if not is_parametrized(module):
            continue
        values = {tensor: getattr(module, tensor).detach() for tensor in module.parametrizations}  # type: ignore
        # Not torch's remove_parametrizations(): it changes the module's class, which copies of the module share.
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        for tensor, value in values.items():
            setattr(module, tensor, nn.Parameter(value))  # recurrent layers keep a list of them


def _hooks(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(kind, tensor) of every computed weight that cannot be copied."""
    for hook in module._forward_pre_hooks.values():
        match hook:
            case WeightNorm():
                yield "weight_norm", hook.name
            case SpectralNorm():
                yield "spectral_norm", hook.name
            case BasePruningMethod():
                yield "prune", hook._tensor_name
    if isinstance(module, RNNBase) and is_parametrized(module):
        yield from (("parametrization", name) for name in module.parametrizations)  # type: ignore[union-attr]


def _fold_(module: nn.Module, kind: str, name: str) -> None:
    if kind == "parametrization":
        return  # make_plain_() does all tensors of a module at once
    remove: Any = {"weight_norm": remove_weight_norm, "spectral_norm": remove_spectral_norm, "prune": remove_mask}[kind]
    source = getattr(module, f"{name}_v" if kind == "weight_norm" else f"{name}_orig")
    with torch.no_grad():
        remove(module, name)
    loading: Any = module._load_state_dict_pre_hooks
    for key in [k for k, hook in loading.items() if isinstance(hook.hook, SpectralNormLoadStateDictPreHook)]:
        del loading[key]  # PyTorch 2.13 leaves it, and loading would fail on the missing key
    getattr(module, name).requires_grad_(source.requires_grad)
