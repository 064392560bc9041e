"""Rules for operations on single elements and for reductions: what they do to axes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deploypipe.pruning.modules.axis_reductions import all_tensors
from deploypipe.pruning.tracing.index_algebra import Axes, Axis, fixed
from deploypipe.pruning.tracing.trace_record import Arguments, AxisTrace, Rule


def pointwise(t: AxisTrace, a: Arguments, result: Any) -> Any:
    """Operands are broadcast against each other."""
    operands = all_tensors(a.values())
    return [broadcast(t, operands, each.dim(), each.shape) for each in all_tensors([result])]


def broadcast(t: AxisTrace, operands: Sequence[Tensor], rank: int, shape: Sequence[int]) -> Axes:
    axes: list[Axis] = [()] * rank
    for operand in operands:
        for back, axis in enumerate(reversed(t.of(operand)), start=1):
            if back <= rank:
                axes[rank - back] = t.broadcast(axes[rank - back], axis)
    return tuple(axis if axis or size == 1 else fixed(size) for axis, size in zip(axes, shape, strict=True))


def same(t: AxisTrace, a: Arguments, result: Any) -> Any:
    first = t.of(next(v for v in a.values() if isinstance(v, Tensor)))
    return [first for _ in all_tensors([result])]


def dims(value: Any, rank: int) -> list[int]:
    if value is None or value == []:
        return list(range(rank))
    return [d % rank for d in (value if isinstance(value, (list, tuple)) else [value])]


def reduce(name: str) -> Rule:
    def rule(t: AxisTrace, a: Arguments, result: Any) -> Any:
        operand = a["self"] if "self" in a else a["input"]
        axes = t.of(operand)
        gone = dims(a.get("dim"), len(axes))
        for d in gone:
            t.reduce_over(operand, d, name)
        left = tuple(() if d in gone else axis for d, axis in enumerate(axes))
        if not a.get("keepdim"):
            left = tuple(axis for d, axis in enumerate(left) if d not in gone)
        return [left for _ in all_tensors([result])]

    return rule


def along(name: str) -> Rule:
    """Rule for an operation such as softmax: the shape stays, and every value depends on a whole axis."""

    def rule(t: AxisTrace, a: Arguments, result: Any) -> Any:
        axes = t.of(a["self"])
        for d in dims(a.get("dim"), len(axes)):
            t.reduce_over(a["self"], d, name)
        return [axes for _ in all_tensors([result])]

    return rule
