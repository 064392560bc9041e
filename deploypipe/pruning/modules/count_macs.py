"""Count the multiply-accumulates (MACs) of one forward pass, operator by operator.

Counted: every product of matrices (linear, matmul, bmm, einsum, attention's two products), every convolution, the
kernels of recurrent layers and of `nn.Bilinear`; with weights or between activations, in modules or on bare parameters.
Not counted: additions, activation functions, norms, pooling, look-ups and interpolation.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.pruning.modules.hook_computed_weights import with_plain_weights
from deploypipe.pruning.modules.module_calls import evaluating, one_thread_if_small
from deploypipe.task import forward, take

_Product = tuple[int, Sequence[Tensor]]  # multiply-accumulates, and the tensors that are multiplied
_Formula = Callable[[Sequence[Any], Any], list[_Product]]  # of an operator's arguments and its result


@dataclass(frozen=True, kw_only=True, slots=True)
class Macs:
    """Multiply-accumulates of one sample, each counted once in `by_module` and at most once in `by_parameter`."""

    by_module: dict[str, int]  # the innermost module whose forward() was running; "" is the network itself
    by_parameter: dict[str, int]  # products of one parameter with activations, in proportion to its size

    @property
    def total(self) -> int:
        return sum(self.by_module.values())

    @property
    def of_activations(self) -> int:
        """All other products: attention, and weights that are computed from parameters."""
        return self.total - sum(self.by_parameter.values())

    def within(self, module: str) -> int:
        """MACs of a module and everything in it."""
        return sum(macs for name, macs in self.by_module.items() if name == module or name.startswith(f"{module}."))


def count_operations(model: nn.Module, inputs: Any) -> Macs:
    """Run `model` once on the first sample of `inputs` and count. The model is left unchanged."""
    counter = _Counter({name: parameter for name, parameter in model.named_parameters()})
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: counter.running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: counter.leave()))
    try:
        with evaluating(model), torch.no_grad(), counter:
            forward(model, take(inputs, 1))
    finally:
        for handle in handles:
            handle.remove()
    return Macs(by_module=dict(counter.by_module), by_parameter=dict(counter.by_parameter))


def count_macs(model: nn.Module, inputs: Any) -> tuple[int, int]:
    """(parameters, MACs of one sample). The model is left unchanged."""
    model = with_plain_weights(unwrapped(model))
    with one_thread_if_small(0):  # one sample is small work for any network
        macs = count_operations(model, inputs)
    return sum(p.numel() for p in model.parameters()), macs.total


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running = [""]
        self.by_module: Counter[str] = Counter()
        self.by_parameter: Counter[str] = Counter()
        self.names = {_memory(parameter): name for name, parameter in parameters.items()}  # views share it

    def leave(self) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._schema.name)
        if formula is None:
            with self:  # in inference mode an operator arrives whole
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        result = func(*args, **kwargs)
        for macs, factors in formula(_in_order(func, args, kwargs), result):
            self.by_module[self.running[-1]] += macs
            names = [self.names[_memory(factor)] for factor in factors if _memory(factor) in self.names]
            if len(names) == 1:
                self.by_parameter[names[0]] += macs
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _in_order(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    return [*args, *(kwargs.get(a.name, a.default_value) for a in func._schema.arguments[len(args) :])]


def _product(first: int) -> _Formula:
    """A product of argument `first` and the next one: (..., m, k) by (..., k, n), or by a vector (k)."""

    def formula(args: Sequence[Any], result: Any) -> list[_Product]:
        a, b = args[first], args[first + 1]
        return [(a.numel() * (b.shape[-1] if b.dim() > 1 else 1), (a, b))]

    return formula


def _grouped(args: Sequence[Any], result: Any) -> list[_Product]:
    """Experts: rows (or columns) of one operand are distributed over the matrices of the other."""
    a, b = args[:2]
    return [(a.numel() * b.shape[-1] // (len(a) if a.dim() > b.dim() else 1), (a, b))]


def _convolution(args: Sequence[Any], result: Any) -> list[_Product]:
    x, weight, is_transposed = args[0], args[1], args[6]
    return [((x if is_transposed else result).numel() * weight[0].numel(), (x, weight))]


def _attention(args: Sequence[Any], result: Any) -> list[_Product]:
    """Queries times keys, and weights times values. A mask saves no MACs."""
    query, key, value = args[:3]
    return [(query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]), (query, key, value))]


def _recurrent(weights: Callable[[Sequence[Any]], Sequence[Tensor]]) -> _Formula:
    """Every weight matrix is multiplied once per step of each sequence."""

    def formula(args: Sequence[Any], result: Any) -> list[_Product]:
        steps = args[0][..., 0].numel()
        return [(steps * weight.numel(), (weight,)) for weight in weights(args) if weight.dim() > 1]

    return formula


def _bilinear(args: Sequence[Any], result: Any) -> list[_Product]:
    return [(args[0][..., 0].numel() * args[1].numel(), (args[0], args[1]))]


_FORMULAS: Mapping[str, _Formula] = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot"), _product(0)),
    **dict.fromkeys(("aten::_int_mm", "aten::_scaled_mm"), _product(0)),
    **dict.fromkeys(("aten::addmm", "aten::addmv", "aten::baddbmm", "aten::addbmm"), _product(1)),
    "aten::_addmm_activation": _product(1),
    "aten::_grouped_mm": _grouped,
    "aten::convolution": _convolution,
    "aten::_trilinear": _bilinear,
    **{
        f"aten::_scaled_dot_product_{kernel}": _attention
        for kernel in (
            "flash_attention_for_cpu",
            "flash_attention",
            "efficient_attention",
            "cudnn_attention",
            "fused_attention_overrideable",
        )
    },
    "aten::mkldnn_rnn_layer": _recurrent(lambda args: args[1:3]),
    "aten::_cudnn_rnn": _recurrent(lambda args: args[1]),
    "aten::miopen_rnn": _recurrent(lambda args: args[1]),
}
