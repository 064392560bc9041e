"""Rules for operations that move, cut, join or pick elements: what they do to axes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploypipe.pruning.modules.axis_reductions import all_tensors
from deploypipe.pruning.tracing.elementwise_rules import broadcast, dims
from deploypipe.pruning.tracing.index_algebra import Axes, Axis, fixed
from deploypipe.pruning.tracing.trace_record import Arguments, AxisTrace


def reshape(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    return t.indices.reshape(t.of(a["self"]), result.shape, f"is split unevenly by a view in {t.running[-1]!r}")


def view(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    """A view with sizes that the code gave, perhaps from attributes."""
    axes = reshape(t, a, result)
    t.match_size_attributes(axes)
    t.match_view_sizes(axes)
    t.match_input_width(axes)
    return axes


def permute(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = list(t.of(a["self"]))
    if "dims" in a:
        return tuple(axes[d] for d in a["dims"])
    if "dim0" in a:
        axes[a["dim0"]], axes[a["dim1"]] = axes[a["dim1"]], axes[a["dim0"]]
        return tuple(axes)
    return tuple(reversed(axes))


def movedim(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    places = list(range(len(axes)))
    source, target = dims(a["source"], len(axes)), dims(a["destination"], len(axes))
    rest = [p for p in places if p not in source]
    order = {to: come for come, to in zip(source, target, strict=True)}
    return tuple(axes[order[p] if p in order else rest.pop(0)] for p in places)


def expand(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    axes = ((),) * (result.dim() - len(axes)) + axes
    return tuple(axis or made for axis, made in zip(axes, t.created(result.shape), strict=True))


def repeat(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    axes = ((),) * (result.dim() - len(axes)) + axes
    return tuple((*fixed(times, is_free=not axis), *axis) for times, axis in zip(a["repeats"], axes, strict=True))


def repeat_interleave(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    if not isinstance(a["repeats"], int) or a["dim"] is None:
        return t.freeze_operands("repeat_interleave", [a["self"]], [result])[0]
    axes = list(t.of(a["self"]))
    axes[a["dim"]] = (*axes[a["dim"]], *fixed(a["repeats"]))
    return tuple(axes)


def cat(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    parts = [p for p in all_tensors([a["tensors"]]) if p.dim() == result.dim()]  # empty ones may have another rank
    dim = a["dim"] % result.dim()
    axes: list[Axis] = list(t.of(parts[0]))
    for part in parts[1:]:
        axes = [t.equate(x, y) if d != dim else x for d, (x, y) in enumerate(zip(axes, t.of(part), strict=True))]
    why = f"is concatenated with constants in {t.running[-1]!r}"
    axes[dim] = t.indices.concatenate([t.of(p)[dim] for p in parts], [p.shape[dim] for p in parts], why)
    return tuple(axes)


def stack(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    dim = a["dim"] % result.dim()
    axes = list(broadcast(t, a["tensors"], result.dim() - 1, [n for d, n in enumerate(result.shape) if d != dim]))
    return (*axes[:dim], fixed(len(a["tensors"])), *axes[dim:])


def split(t: AxisTrace, a: Arguments, result: Any) -> list[Axes]:
    """split, chunk and the like: consecutive parts of one axis."""
    axes = t.of(a["self"])
    dim = a["dim"] % len(axes)
    found, start = [], 0
    for part in result:
        size = part.shape[dim]
        piece = t.pick(axes[dim], np.arange(start, start + size), part)
        found.append((*axes[:dim], piece, *axes[dim + 1 :]))
        t.match_size_attributes((piece,))
        start += size
    sizes, pieces = [part.shape[dim] for part in result], [each[dim] for each in found]
    t.match_split_sizes(sizes, pieces)
    if "chunks" in a or "sections" in a:  # the code gives the number of parts: all keep one size
        if len(set(sizes)) > 1:
            t.keep(axes[dim], "is cut into unequal parts")
        else:
            for piece in pieces[1:]:
                t.equate(pieces[0], piece)
    return found


def slice_axis(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    dim, size = a["dim"] % len(axes), a["self"].shape[a["dim"]]
    places = np.arange(size)[slice(a["start"], a["end"], a["step"])]
    piece = axes[dim] if len(places) == size else t.pick(axes[dim], places, result)
    return (*axes[:dim], piece, *axes[dim + 1 :])


def select(t: AxisTrace, a: Arguments, result: Any) -> Any:
    axes = t.of(a["self"])
    dim = a["dim"] % len(axes)
    for each in all_tensors([result]):
        t.picked[each] = axes[dim]
    return [(*axes[:dim], *axes[dim + 1 :]) for _ in all_tensors([result])]


def index(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    """x[i, :, j] with tensors i and j."""
    axes, place = t.of(a["self"]), 0
    used: list[int] = []
    for index in a["indices"]:
        width = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        used += range(place, place + width) if index is not None else []
        place += width
    for d in used:
        t.keep(axes[d], "is picked out by the code")
    rest = [axis for d, axis in enumerate(axes) if d not in used]
    new = result.dim() - len(rest)
    before = used[0] if used and used == list(range(used[0], used[-1] + 1)) else 0
    shape = result.shape[before : before + new]
    return (*rest[:before], *(fixed(size) for size in shape), *rest[before:])


def index_select(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes, dim = list(t.of(a["self"])), a["dim"]
    t.keep(axes[dim], "is picked out by the code")
    axes[dim] = fixed(result.shape[dim])
    return tuple(axes)


def index_add(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    """Rows of one tensor are added to some rows of another, or replace them."""
    axes, others, dim = t.of(a["self"]), t.of(a["source"]), a["dim"] % max(result.dim(), 1)
    if len(axes) != len(others):
        return t.freeze_operands("index_add", [a["self"], a["source"]], [result])[0]
    for axis in (axes[dim], others[dim]):
        t.keep(axis, "is picked out by the code")
    pairs = enumerate(zip(axes, others, strict=True))
    return tuple(fixed(result.shape[d]) if d == dim else t.equate(x, y) for d, (x, y) in pairs)


def gather(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes, others, dim = t.of(a["self"]), t.of(a["index"]), a["dim"] % result.dim()
    t.keep(axes[dim], "is picked out by the code")
    pairs = enumerate(zip(axes, others, strict=True))
    return tuple(fixed(result.shape[d]) if d == dim else t.equate(x, y) for d, (x, y) in pairs)


def flip(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = list(t.of(a["self"]))
    for d in dims(a["dims"], len(axes)):
        axes[d] = t.indices.pick(axes[d], np.arange(result.shape[d])[::-1])
    return tuple(axes)


def roll(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    for d in dims(a["dims"], len(axes)):
        t.keep(axes[d], "is rolled by the code")
    return axes


def pad(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = list(t.of(a["self"]))
    pads = a["pad"] if "pad" in a else a["padding"]
    for back in range(len(pads) // 2):
        low, high = pads[2 * back], pads[2 * back + 1]
        dim = len(axes) - 1 - back
        if min(low, high) < 0:
            t.keep(axes[dim], "is cropped by the code")
            axes[dim] = fixed(result.shape[dim])
        elif low or high:
            sizes = [low, a["self"].shape[dim], high]
            parts = [axes[dim] if i == 1 else fixed(n) for i, n in enumerate(sizes) if n]
            why = "belongs to a padding of fixed size"
            axes[dim] = t.indices.concatenate(parts, [n for n in sizes if n], why)
    return tuple(axes)


def pack(t: AxisTrace, a: Arguments, result: Any) -> list[Axes]:
    """Sequences concatenated without padding, and how many are active at each step."""
    return [(fixed(len(result[0])), *t.of(a["input"])[2:]), t.of(result[1])]


def unpack(t: AxisTrace, a: Arguments, result: Any) -> list[Axes]:
    return [(*map(fixed, result[0].shape[:2]), *t.of(a["data"])[1:]), t.of(result[1])]
