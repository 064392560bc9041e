"""Follow indices of axes through every tensor operation of one forward pass.

The pass runs in inference mode, where PyTorch shows the operations as the network's author wrote them (linear, matmul,
layer_norm, scaled_dot_product_attention) and not their parts. Each has a rule that says which axes of its operands are
the same and what the axes of its result are. PyTorch decomposes an operation without a rule. If it cannot, all indices
that reach the operation must stay, with the reason. So every trace ends, and nothing is assumed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.pruning.modules.axis_reductions import all_tensors
from deploypipe.pruning.modules.recurrent_sizes import without_fused_kernels
from deploypipe.pruning.tracing.elementwise_rules import pointwise
from deploypipe.pruning.tracing.index_algebra import Axes, fixed, size_of
from deploypipe.pruning.tracing.operator_rules import RULES
from deploypipe.pruning.tracing.trace_record import Arguments, AxisTrace, Rule
from deploypipe.pruning.tracing.unread_parts import SLICING

_FACTORIES = {"new_zeros", "new_ones", "new_full", "new_empty"}  # the result does not have the operand's axes


class Propagation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`with Propagation(trace): forward(model, inputs)`, in inference mode; then read the trace."""

    def __init__(self, trace: AxisTrace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = all_tensors([*args, *kwargs.values()])
        self.trace.note_use(operands)
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        rule = RULES.get(name) or RULES.get(name.rstrip("_"))
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        if rule is None and func.namespace == "aten" and any(self.trace.may_shrink(t) for t in operands):
            with self, without_fused_kernels():
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        results = all_tensors([result])
        if not operands or name in _FACTORIES:
            axes = [self.trace.created(t.shape) for t in results]
        elif name == "set_":  # the code replaces a tensor's memory
            axes = [tuple(fixed(size) for size in t.shape) for t in results]
        elif rule is None or any(0 in t.shape for t in (*operands, *results)):
            axes = self.trace.freeze_operands(name, operands, results)
        else:
            arguments = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
            arguments |= {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
            axes = self.apply_rule(name, rule, arguments, result, operands)
        if name not in SLICING:
            self.trace.partial.consume(
                (axis for t in operands for axis in self.trace.of(t)), (a for each in axes for a in each)
            )
        for tensor, each in zip(results, axes, strict=True):
            self.trace.axes[tensor] = each
        return result

    def apply_rule(
        self, name: str, rule: Rule, arguments: Arguments, result: Any, operands: Sequence[Tensor]
    ) -> list[Axes]:
        """Apply a rule. If it fails, the mistake is ours: the axes must stay, and the trace goes on."""
        results = all_tensors([result])
        try:
            found = rule(self.trace, arguments, result)
            axes = [found] if isinstance(result, Tensor) and isinstance(found, tuple) else list(found)
            if [tuple(map(size_of, each)) for each in axes] != [tuple(tensor.shape) for tensor in results]:
                raise AssertionError(f"returns axes of other sizes than {[tuple(tensor.shape) for tensor in results]}")
        except Exception as error:  # whatever mistake a rule has
            raise_if_exhausted(error)
            message = f"{type(error).__name__}: {error}"
            return self.trace.freeze_operands(
                name, operands, results, f"for which deploypipe's own rule fails ({message})"
            )
        return axes
