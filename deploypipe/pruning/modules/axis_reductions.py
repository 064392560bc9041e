"""Operations that reduce a whole axis to one number, such as the mean over channels in a spatial attention.

With fewer channels such an operation gives another number, as a norm does, and this is intended. The masked network is
the reference for the cut one, so there the operation must see only the channels that stay. An operation is identified
by the module whose forward() calls it and by the number of the call in that forward(). Both stay the same when channels
are removed.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from deploypipe.records import Side

_MARK = "~"  # side "~12.0.1": the 13th call, its first tensor, axis 1
_NORMS = (F.layer_norm, F.rms_norm)
_Narrow = dict[int, list[tuple[int, int, Tensor]]]  # call -> (operand, axis, removed indices)


def all_tensors(values: Any) -> list[Tensor]:
    """The tensors among the values and in the lists among them, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += all_tensors(value)
    return found


def _whole_numbers(values: Any) -> list[int | None]:
    found: list[int | None] = []
    for value in values:
        if isinstance(value, Tensor) and value.dim() == 0:
            found.append(None)
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _whole_numbers(value)
    return found


def side_of(call: int, operand: int, axis: int) -> Side:
    """The name of the side that stands for what one operation reads along one axis."""
    return f"{_MARK}{call}.{operand}.{axis}"


def is_statistic(side: Side) -> bool:
    """Whether a side stands for what an operation reads; nothing is stored there."""
    return side.startswith(_MARK)


class FunctionCalls(TorchFunctionMode):
    """Number the calls of PyTorch functions in each module's forward(), and narrow what some of them read."""

    def __init__(
        self,
        narrow: Mapping[str, _Narrow] | None = None,
        whole: Mapping[Callable[..., Any], Callable[[Tensor, Tensor], None]] | None = None,
    ) -> None:
        """whole: function -> callback. Operations inside such a function are not traced; the callback gets its first
        operand and its result."""
        super().__init__()
        self.narrow, self.whole = narrow or {}, whole or {}
        self.running: list[tuple[str, int]] = [("", 0)]  # modules whose forward() is running, and their calls so far
        self.operands: list[Tensor] = []  # of the current call
        self.numbers: list[int | None] = []  # the numbers among its arguments; None for one in a tensor

    def enter(self, module: str) -> None:
        self.running.append((module, 0))

    def leave(self) -> None:
        self.running.pop()

    @property
    def number(self) -> int:
        """The number of the current call."""
        return self.running[-1][1] - 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        module, count = self.running[-1]
        self.running[-1] = (module, count + 1)
        self.operands, self.numbers = all_tensors([*args, *kwargs.values()]), _whole_numbers([*args, *kwargs.values()])
        try:
            if parts := self.narrow.get(module, {}).get(count):
                return _narrowed(func, args, kwargs, parts, self.operands)
            if func not in self.whole:
                return func(*args, **kwargs)
            with _disable_current_modes():
                result = func(*args, **kwargs)
            self.whole[func](self.operands[0], result)
            return result
        finally:
            self.operands, self.numbers = [], []


def narrow_(model: nn.Module, removed: Mapping[str, Mapping[Side, Collection[int]]]) -> None:
    """Make operations of `model` read only what stays. removed: module -> side (see `side_of`) -> indices."""
    narrow = {module: _by_call(sides) for module, sides in removed.items()}
    calls = FunctionCalls(narrow)
    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(lambda _m, _a, name=name: calls.enter(name))
            module.register_forward_hook(lambda *_: calls.leave())
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.running = [("", 0)]
        with calls:
            return plain(*args, **kwargs)

    model.forward = forward


def _by_call(sides: Mapping[Side, Collection[int]]) -> _Narrow:
    found: _Narrow = defaultdict(list)
    for side, gone in sides.items():
        call, operand, axis = map(int, side.removeprefix(_MARK).split("."))
        found[call].append((operand, axis, torch.tensor(sorted(gone))))
    return dict(found)


def _narrowed(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], parts: Any, operands: Sequence[Tensor]
) -> Any:
    """Call the function on what stays. If its result still has the axis, removed places are filled with zeros."""
    full = func(*args, **kwargs)
    new: dict[int, Tensor] = {}
    scatter: list[tuple[int, Tensor]] = []
    for number, axis, gone in parts:
        operand = new.get(id(operands[number]), operands[number])
        size = operands[number].shape[axis]
        stay = torch.ones(size, dtype=torch.bool).index_fill_(0, gone, value=False).nonzero()[:, 0].to(operand.device)
        new[id(operands[number])] = operand.index_select(axis, stay)
        if func in _NORMS:
            new |= {id(t): t.index_select(0, stay) for t in operands if t.shape == (size,)}
            args = (args[0], [len(stay)], *args[2:])
        if isinstance(full, Tensor) and full.dim() == operand.dim() and full.shape[axis] == size:
            scatter.append((axis, stay))
    result = func(*_replaced(args, new), **{name: _replaced([v], new)[0] for name, v in kwargs.items()})
    for axis, stay in scatter:
        shape = [*result.shape[:axis], full.shape[axis], *result.shape[axis + 1 :]]
        result = result.new_zeros(shape).index_copy(axis, stay, result)
    return result


def _replaced(values: Sequence[Any], new: Mapping[int, Tensor]) -> list[Any]:
    return [_replaced(v, new) if isinstance(v, (list, tuple)) and all_tensors(v) else new.get(id(v), v) for v in values]
