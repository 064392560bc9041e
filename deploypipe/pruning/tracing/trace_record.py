"""The record of one traced forward pass: the axes of every tensor, which axes are the same, and which must stay.

`index_propagation` fills a trace while the network runs; the rules of `operator_rules` write to it; `coupled_channels`
reads it.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from deploypipe.networks.batch_trees import tensors
from deploypipe.pruning.modules.axis_reductions import FunctionCalls, all_tensors, side_of
from deploypipe.pruning.modules.module_attributes import lists_of_whole_numbers, whole_numbers
from deploypipe.pruning.modules.module_kinds import normalizes_over_channels
from deploypipe.pruning.modules.recurrent_sizes import RECURRENT, sizes_of
from deploypipe.pruning.tracing.index_algebra import Atoms, Axes, Axis, Factor, Indices, fixed, has_atoms, size_of
from deploypipe.pruning.tracing.unread_parts import PartialReads

Side = tuple[str, str]  # (module, side)
Arguments = dict[str, Any]  # of an operation, by name
Rule = Callable[["AxisTrace", Arguments, Any], Any]  # see `operator_rules`


@dataclass(slots=True)
class Attention:
    """Atoms that index the heads of one module's attention, and those inside each head."""

    heads: list[Atoms] = field(default_factory=list)
    head_dims: list[Atoms] = field(default_factory=list)


class AxisTrace:
    """The axes of all tensors of one forward pass, and what is known about them."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], as_wide: Collection[str] = ()) -> None:
        """as_wide: modules whose attention is as wide as their input, because the code takes its sizes from there
        (`B, N, C = x.shape; x.reshape(B, N, heads, C // heads)`). Sizes are plain numbers, so a trace cannot see it."""
        self.indices = Indices()
        self.as_wide = as_wide
        self.read: dict[str, Axis] = {}  # module -> last axis of the first tensor it was last called with
        self.modules = dict(model.named_modules())
        self.running: list[str] = [""]  # names of the modules whose forward() is running, innermost last
        self.axes: Any = WeakIdKeyDictionary()  # tensor -> Axes
        self.stored: dict[str, dict[str, Tensor]] = {}  # module -> its tensors by name, before forward() replaces any
        self.owners: dict[int, tuple[str, str]] = {}  # id of a parameter -> (module, its name there)
        self.reads: dict[str, Atoms] = {}  # convolution or linear layer -> atoms of what it reads
        self.normalises: dict[str, Atoms] = {}  # norm without weights -> atoms of its channels
        self.sized: dict[tuple[str, str], list[Atoms]] = {}  # (module, attribute) -> axes whose size it may be
        self.attention: dict[str, Attention] = {}
        self.convolution_groups: list[Atoms] = []
        self.calls = FunctionCalls(whole={F.local_response_norm: self.normalise_locally})
        self.statistics: dict[tuple[str, str], Atoms] = {}  # (module, side of an operation) -> the atoms it reads
        self.picked: Any = WeakIdKeyDictionary()  # tensor -> the axis from which it is one index
        self.partial = PartialReads()
        self.called: set[str] = set()  # layers whose weight was used as a weight, so the layer writes channels
        self.used: set[int] = set()  # ids of parameters and buffers that some operation read
        self.label_weights_()
        for tensor in tensors(list(batches)):
            self.axes[tensor] = tuple(fixed(size) for size in tensor.shape)

    def label_weights_(self) -> None:
        for name, module in self.modules.items():
            both = {**module._parameters, **module._buffers}
            self.stored[name] = {local: tensor for local, tensor in both.items() if tensor is not None}
            for local, tensor in self.stored[name].items():
                self.owners.setdefault(id(tensor), (name, local))
                if tensor not in self.axes:
                    is_data = not tensor.is_floating_point()  # positions, masks, counters
                    self.axes[tensor] = tuple(fixed(n) if is_data else self.indices.new(n) for n in tensor.shape)
            if isinstance(module, RECURRENT):
                self.label_recurrent(name, module)

    def label_recurrent(self, name: str, module: nn.Module) -> None:
        sizes = sizes_of(module)
        for attribute, weights in sizes.items():
            axis = reduce(self.equate, [self.of(weight)[1] for weight in weights])
            for factor in axis:
                if factor.atoms is not None:
                    self.sized[name, attribute] = [factor.atoms]
        if "proj_size" in sizes:
            for weight in sizes["hidden_size"]:
                self.indices.keep(self.of(weight)[1], "PyTorch requires a projection to be narrower than the state")

    def enter(self, module: str, given: Sequence[Any]) -> None:
        self.running.append(module)
        self.calls.enter(module)
        first = next(iter(all_tensors(given)), None)
        if module in self.as_wide and first is not None and first.dim():
            self.read[module] = self.of(first)[-1]

    def leave(self) -> None:
        self.running.pop()
        self.calls.leave()

    def note_use(self, operands: Sequence[Tensor]) -> None:
        for operand in operands:
            self.used.add(id(operand))
            self.partial.use(operand)
            if operand in self.picked:  # some only want its shape
                self.keep(self.picked.pop(operand), "is picked out by the code")

    def of(self, tensor: Tensor) -> Axes:
        """Axes of a tensor. From an unknown tensor nothing can be removed."""
        if tensor not in self.axes:
            self.axes[tensor] = tuple(fixed(size) for size in tensor.shape)
        return self.axes[tensor]  # type: ignore[no-any-return]

    def created(self, shape: Sequence[int]) -> Axes:
        """Axes of a tensor that the code creates with sizes of its own."""
        given: list[Any] = self.calls.numbers[: len(shape)]
        if len(given) < len(shape) or any(g is not None and g != n for g, n in zip(given, shape, strict=True)):
            given = [None] * len(shape)
        return tuple(
            fixed(n, is_free=True, origin=getattr(each, "origin", None)) for n, each in zip(shape, given, strict=True)
        )

    def may_shrink(self, tensor: Tensor) -> bool:
        """Whether something can be removed from it, or its size may follow another tensor."""
        return any(factor.atoms is not None or factor.is_free for axis in self.of(tensor) for factor in axis)

    def pick(self, axis: Axis, places: Atoms, result: Tensor) -> Axis:
        """The part of an axis that `result` has. Unread parts may be read at another size (see `unread_parts`)."""
        if not has_atoms(axis):
            return fixed(len(places))
        whole = self.indices.joined(axis).atoms
        assert whole is not None
        self.partial.note(result, whole, whole[places])
        return self.indices.pick(axis, places)

    def freeze_operands(
        self,
        name: str,
        operands: Sequence[Tensor],
        results: Sequence[Tensor],
        why: str = "through which channels cannot be followed",
    ) -> list[Axes]:
        for operand in operands:
            for axis in self.of(operand):
                self.keep(axis, f"reaches {name}(), {why}")
        return [tuple(fixed(size) for size in t.shape) for t in results]

    def keep(self, axis: Axis, why: str) -> None:
        where = self.running[-1]
        self.indices.keep(axis, f"{why} (in {where!r})" if where else why)

    def equate(self, a: Axis, b: Axis, what: str = "an axis of fixed size") -> Axis:
        return self.indices.equate(a, b, f"meets {what} in {self.running[-1]!r}")

    def broadcast(self, a: Axis, b: Axis) -> Axis:
        """`equate` for axes of which the code may have made one to fit the other, with a size from an attribute."""
        for one, other in ((a, b), (b, a)):
            if one and not has_atoms(one) and all(factor.is_free for factor in one):
                self.match_size_attributes((other,))
        return self.equate(a, b)

    def reduce_over(self, operand: Tensor, dim: int, name: str) -> None:
        """An operation reduces a whole axis to one number; with fewer indices it gives another number.

        If the order does not matter and the code itself calls the operation, it is taken over the indices that stay, as
        a norm is. Otherwise the axis must stay.
        """
        axis, where = self.of(operand)[dim], self.running[-1]
        if normalizes_over_channels(self.modules[where]) or not has_atoms(axis):
            return
        place = next((i for i, each in enumerate(self.calls.operands) if each is operand), None)
        if place is None or name not in _SYMMETRIC:
            self.keep(axis, f"{name}() is computed over these channels")
            return
        factor = self.indices.joined(axis)
        assert factor.atoms is not None
        self.statistics[where, side_of(self.calls.number, place, dim)] = factor.atoms

    def normalise_locally(self, operand: Tensor, result: Tensor) -> None:
        """Normalization over neighbouring channels: after removal, the neighbours among those that stay."""
        self.reduce_over(operand, 1, "norm")
        self.axes[result] = self.of(operand)

    def match_size_attributes(self, axes: Axes) -> None:
        """Find attributes of the running module that hold the size of one of these axes: they shrink with it."""
        shrinking = [i for i, axis in enumerate(axes) if has_atoms(axis)]
        for i in shrinking:
            is_outer = i != shrinking[-1]
            is_joint = len([f for f in axes[i] if f.atoms is not None]) > 1
            for factor in axes[i]:
                if factor.atoms is not None and not is_joint:
                    self.match_factor(factor, is_outer, len(shrinking) > 1)
            if len(axes[i]) > 1:
                self.match_factor(self.indices.joined(axes[i]), is_outer, True)

    def match_input_width(self, axes: Axes) -> None:
        """Equate neighbouring factors of a view with the input width of the running module, if their product is it."""
        read = self.read.get(self.running[-1], ())
        factors = [factor for axis in axes for factor in axis]
        for start in range(len(factors)):
            for stop in range(start + 1, len(factors) + 1):
                part = tuple(factors[start:stop])
                if has_atoms(read) and all(f.atoms is not None for f in part) and size_of(part) == size_of(read):
                    self.equate(part, read)

    def match_factor(self, factor: Factor, is_outer: bool, is_certain: bool) -> None:
        where = self.running[-1]
        if isinstance(self.modules[where], RECURRENT):  # their size attributes are known
            return
        # When cut, nn.MultiheadAttention becomes a SlimAttention, whose only size is its number of heads.
        is_own = isinstance(self.modules[where], nn.MultiheadAttention)
        for name, value in whole_numbers(self.modules[where]).items():
            if is_own and name != "num_heads":
                continue
            is_size = value == factor.size and _names_a_width(name)
            if is_size and factor.atoms is not None and (not is_certain or _names_a_count(name) == is_outer):
                self.sized.setdefault((where, name), []).append(factor.atoms)

    def match_split_sizes(self, sizes: Sequence[int], pieces: Sequence[Axis]) -> None:
        """Find lists of the running module that hold the sizes of a split: they shrink with its parts."""
        where = self.running[-1]
        for name, value in lists_of_whole_numbers(self.modules[where]).items():
            if value == list(sizes):
                for number, piece in enumerate(pieces):
                    if len(piece) == 1 and piece[0].atoms is not None:
                        self.sized.setdefault((where, f"{name}.{number}"), []).append(piece[0].atoms)

    def match_view_sizes(self, axes: Axes) -> None:
        """Find lists of the running module that hold the last sizes of a view: they shrink with its axes."""
        where = self.running[-1]
        for value in lists_of_whole_numbers(self.modules[where]).values():
            if 1 < len(value) <= len(axes):
                last = axes[len(axes) - len(value) :]
                if value == [size_of(axis) for axis in last]:
                    self.match_split_sizes(value, last)

    def note_attention(self, batch: Sequence[Axis], inner: Axis) -> None:
        """Note a product of two activations: it runs over heads and sums over the dimensions of each head."""
        seen = self.attention.setdefault(self.running[-1], Attention())
        seen.heads += [f.atoms for axis in batch for f in axis if f.atoms is not None]
        seen.head_dims += [f.atoms for f in inner if f.atoms is not None]


_SYMMETRIC = {"mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "norm", "logsumexp"}
_SYMMETRIC |= {"linalg_vector_norm", "layer_norm", "rms_norm", "batch_norm"}

_WIDTHS = {"head", "heads", "dim", "dims", "size", "channels", "features", "width", "embed", "hidden", "nhead", "inner"}
_WIDTHS |= {"planes", "filters", "nf", "shape", "groups", "model", "k", "v", "kv"}
_OTHERS = {"window", "patch", "kernel", "image", "img", "pool", "stride", "seq", "max", "layers", "vocab", "grid"}
_OTHERS |= {"shift", "scale", "position", "positions", "idx", "index", "step", "steps", "chunk", "num_key_value_groups"}


def _names_a_width(name: str) -> bool:
    words = set(re.split(r"[_\d]+", name.lower()))
    return bool(words & _WIDTHS) and not words & _OTHERS and name not in _OTHERS


def _names_a_count(name: str) -> bool:
    words = re.split(r"_+", name.lower())
    return ("heads" in words or "nhead" in words or "groups" in words or words[0] in ("num", "n")) and not (
        {"dim", "size", "channels"} & set(words)
    )
