"""Start a forward pass in the middle: modules that ran before a change return what they returned in the dense network.

A module is not run again if it was called once, was finished before the first changed module began, holds parameters,
and left its arguments as they were (a block may begin with a ReLU in place). Only the outermost such modules count.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from deploypipe.networks.batch_trees import leaves, tensors


@dataclass(slots=True)
class _Call:
    """When a module ran for the first time, in numbers of events, and what it gave out."""

    name: str
    start: int
    end: int = -1
    count: int = 1
    changes_inputs: bool = False
    has_parameters: bool = False
    is_plain: bool = False  # it returned tensors only
    num_bytes: int = 0  # of the tensors it returned


@dataclass(slots=True)
class CallOrder:
    """The calls of one forward pass."""

    calls: dict[str, _Call] = field(default_factory=dict)
    num_events: int = 0

    @property
    def largest_bytes(self) -> int:
        """The bytes of the largest output of a module."""
        return max((call.num_bytes for call in self.calls.values()), default=0)

    def finished_before(self, changed: Collection[str]) -> tuple[str, ...]:
        """The modules that need not run again if those of `changed` are the first that differ."""
        if not changed or not all(name in self.calls for name in changed):
            return ()
        begin = min(self.calls[name].start for name in changed)
        chosen: list[_Call] = []
        for call in sorted(self.calls.values(), key=lambda call: call.start):
            is_inside = bool(chosen) and call.start < chosen[-1].end
            if not is_inside and call.end < begin and _can_be_skipped(call):
                chosen.append(call)
        return tuple(call.name for call in chosen)

    def num_bytes(self, names: Collection[str]) -> int:
        """The bytes of the outputs of these modules."""
        return sum(self.calls[name].num_bytes for name in names)


def _can_be_skipped(call: _Call) -> bool:
    return call.count == 1 and call.has_parameters and call.is_plain and not call.changes_inputs


@contextmanager
def ordered_calls(model: nn.Module) -> Iterator[CallOrder]:
    """Record the order of calls of the forward pass that runs inside."""
    order = CallOrder()
    open_calls: list[list[tuple[Tensor, int]]] = []  # the versions of the arguments of each module that is running

    def enter(name: str, args: Any, kwargs: Any) -> None:
        order.num_events += 1
        open_calls.append([(tensor, _version(tensor)) for tensor in (*tensors(args), *tensors(kwargs))])
        if name in order.calls:
            order.calls[name].count += 1
        else:
            order.calls[name] = _Call(name=name, start=order.num_events)

    def leave(name: str, module: nn.Module, output: Any) -> None:
        order.num_events += 1
        call = order.calls[name]
        call.end = order.num_events
        call.changes_inputs |= any(_version(tensor) != version for tensor, version in open_calls.pop())
        call.has_parameters = next(module.parameters(), None) is not None
        call.is_plain = all(isinstance(leaf.value, Tensor | None) for leaf in leaves(output))
        call.num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors(output))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda _m, a, k, n=name: enter(n, a, k), with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(lambda m, _a, o, n=name: leave(n, m, o)).remove)
        yield order


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def kept_outputs(modules: Mapping[str, nn.Module], names: Collection[str]) -> Iterator[dict[str, Any]]:
    """Copy what the named modules return in the forward pass that runs inside."""
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_m: nn.Module, _a: tuple[Any, ...], output: Any) -> None:
            outputs[name] = deepcopy(output)  # the next module may work in place

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(modules[name].register_forward_hook(keep(name)).remove)
        yield outputs


@contextmanager
def returning(modules: Mapping[str, nn.Module], names: Sequence[str], outputs: Mapping[str, Any]) -> Iterator[None]:
    """Let the named modules return copies of these outputs, without running."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(forward_as(modules[name], lambda *_a, o=outputs[name], **_k: deepcopy(o)))
        yield


@contextmanager
def forward_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Replace forward() of one module."""
    own = vars(module).get("forward")  # a patched module has its own
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
