"""Record how a network calls its blocks: run it once through all of them, then up to the first."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deploypipe.errors import DataError, ModelError
from deploypipe.task import Batch, forward, take


@dataclass(frozen=True, kw_only=True, slots=True)
class CallForm:
    """How a block is called: the arguments that all samples share, and the places of the others."""

    leaves: list[Any]  # of args and kwargs; None at the places of arguments that differ
    places: tuple[int, ...]  # of the stream, and of other arguments that differ between samples
    spec: pytree.TreeSpec

    def __deepcopy__(self, _: Any) -> "CallForm":
        return self  # it never changes, so copies of a block can share it

    def call(self, block: nn.Module, values: Sequence[Tensor]) -> Any:
        leaves = list(self.leaves)
        for at, value in zip(self.places, values, strict=True):
            leaves[at] = value
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return block(*args, **kwargs)


@dataclass(frozen=True, kw_only=True, slots=True)
class CallKind:
    """Blocks that are called in the same way."""

    form: CallForm
    varying: list[tuple[Tensor, ...]]  # per batch: the arguments other than the stream with a row per sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """The calls of all blocks, without the stream (the output of one block that the next one reads)."""

    stream: list[Tensor]  # (samples, ...) of each batch, at the first block
    targets: list[Any]
    kinds: Mapping[str, CallKind]  # by the name of a block

    def standalone(self, name: str, block: nn.Module) -> "StandaloneBlock":
        return StandaloneBlock(block, self.kinds[name].form)

    def batches(self, name: str, stream: Sequence[Tensor]) -> list[Batch]:
        """The block's inputs in each batch, if it is a network of its own and reads this stream."""
        varying = self.kinds[name].varying
        inputs = [(own, *others) if others else own for own, others in zip(stream, varying, strict=True)]
        return list(zip(inputs, self.targets, strict=True))


class StandaloneBlock(nn.Module):
    """A block as a network of its own. Its inputs are the stream and other arguments that differ between samples."""

    def __init__(self, block: nn.Module, form: CallForm) -> None:
        super().__init__()
        self.block, self.form = block, form

    def forward(self, *values: Tensor) -> Tensor:
        return stream_of(self.form.call(self.block, values))


def stream_of(outputs: Any) -> Tensor:
    """The input of the next block: the first output of this one."""
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    if not isinstance(first, Tensor):
        raise ModelError(f"the first output of a block is a {type(first).__name__}; the next block needs a tensor")
    return first


def find_calls(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> Calls:
    """How the network calls its blocks `names`, in order. The network must be runnable.

    Runs two samples through all blocks, then all batches up to the first block, and up to later blocks that are called
    differently. Raises ModelError if a block does not read the output of the one before it, or also reads something
    that depends on another block. Raises DataError without batches.
    """
    if not batches:
        raise DataError("the calibration split has no batches")
    with torch.no_grad():
        seen = _watch(model, names, take(batches[0][0], 2))
        _require_chain(names, seen)
        models = _models(names, seen)
        captured = {name: [_call_of(model, name, inputs) for inputs, _ in batches] for name in set(models.values())}
    kinds = {name: _kind(name, calls) for name, calls in captured.items()}
    first = captured[names[0]]
    at = kinds[names[0]].form.places[0]
    return Calls(
        stream=[leaves[at] for leaves, _ in first],
        targets=[target for _, target in batches],
        kinds={name: kinds[models[name]] for name in names},
    )


Leaves = list[Any]  # of the arguments of a call


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """A call of a block, and its output."""

    leaves: Leaves
    stream: Tensor
    others: list[Tensor]  # its other output tensors


def _watch(model: nn.Module, names: Sequence[str], inputs: Any) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}

    def note(name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        stream = stream_of(output)
        given = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf is not stream]
        seen[name] = _Seen(leaves=pytree.tree_leaves((args, kwargs)), stream=stream, others=given)

    hooks = [model.get_submodule(name).register_forward_hook(partial(note, name), with_kwargs=True) for name in names]
    try:
        forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        if name not in seen:
            raise ModelError(f"the network never calls its block {name!r}")
    return seen


def _require_chain(names: Sequence[str], seen: Mapping[str, _Seen]) -> None:
    for before, name in pairwise(names):
        read = next((leaf for leaf in seen[name].leaves if isinstance(leaf, Tensor)), None)
        if read is None or not _is_same(read, seen[before].stream):
            problem = f"block {name!r} does not read the output of block {before!r}"
            raise ModelError(f"{problem}; name other blocks (blocks=...)")
    for number, name in enumerate(names):
        rest = [leaf for leaf in _rest(seen[name].leaves) if isinstance(leaf, Tensor)]
        for before in names[:number]:
            made = [seen[before].stream] if before != names[number - 1] else []
            if any(leaf is other for leaf in rest for other in (*made, *seen[before].others)):
                raise ModelError(
                    f"block {name!r} reads more from block {before!r} than its first output; they cannot be pruned "
                    f"one by one; prune this network as a whole"
                )


def _models(names: Sequence[str], seen: Mapping[str, _Seen]) -> dict[str, str]:
    """Block -> the first block that is called in the same way."""
    found: dict[str, str] = {}
    for name in names:
        rest = _rest(seen[name].leaves)
        same = (other for other in dict.fromkeys(found.values()) if _are_same(_rest(seen[other].leaves), rest))
        found[name] = next(same, name)
    return found


class _Reached(Exception):
    """Raised when the block is called, because the rest of the network need not run."""


def _call_of(model: nn.Module, name: str, inputs: Any) -> tuple[Leaves, pytree.TreeSpec]:
    calls: list[tuple[Any, Any]] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise _Reached

    hook = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Reached):
            forward(model, inputs)
    finally:
        hook.remove()
    leaves, spec = pytree.tree_flatten(calls[0])
    return leaves, spec


def _kind(name: str, calls: Sequence[tuple[Leaves, pytree.TreeSpec]]) -> CallKind:
    leaves, spec = calls[0]
    stream_at = _stream_at(leaves)
    count = len(leaves[stream_at])
    varying_at = tuple(
        at
        for at, leaf in enumerate(leaves)
        if at != stream_at and isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count > 1
    )
    places = (stream_at, *varying_at)
    fixed = _without(leaves, places)
    for others, _ in calls:
        if not _are_same(fixed, _without(others, places)):
            raise ModelError(
                f"the arguments of block {name!r} change from batch to batch; use samples of one length, and switch "
                f"caches off (use_cache=False)"
            )
    varying = [tuple(own[at] for at in varying_at) for own, _ in calls]
    return CallKind(form=CallForm(leaves=fixed, places=places, spec=spec), varying=varying)


def _stream_at(leaves: Leaves) -> int:
    return next(at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor))


def _rest(leaves: Leaves) -> Leaves:
    """All leaves except the stream."""
    return _without(leaves, {_stream_at(leaves)})


def _without(leaves: Leaves, places: Collection[int]) -> Leaves:
    return [None if at in places else leaf for at, leaf in enumerate(leaves)]


def _are_same(some: Leaves, others: Leaves) -> bool:
    return len(some) == len(others) and all(_is_same(one, other) for one, other in zip(some, others, strict=True))


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one is other or one == other)
