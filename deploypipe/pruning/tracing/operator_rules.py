"""What each tensor operation does to axes: which of its operands' are the same, and what its result's are.

A rule gets the trace, the operation's arguments by name and its result, and returns the axes of the result (of each,
where there are several). Operations marked pointwise by PyTorch need none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from deploypipe.pruning.tracing.axis_indices import Axes, Axis, fixed, has_atoms
from deploypipe.pruning.tracing.axis_reductions import all_tensors

if TYPE_CHECKING:
    from deploypipe.pruning.tracing.index_propagation import Propagation

Arguments = dict[str, Any]
Rule = Callable[["Propagation", Arguments, Any], Any]


def pointwise(t: "Propagation", a: Arguments, result: Any) -> Any:
    """Operands are broadcast against each other."""
    operands = all_tensors(a.values())
    return [_broadcast(t, operands, each.dim(), each.shape) for each in all_tensors([result])]


def _broadcast(t: "Propagation", operands: Sequence[Tensor], rank: int, shape: Sequence[int]) -> Axes:
    axes: list[Axis] = [()] * rank
    for operand in operands:
        for back, axis in enumerate(reversed(t.of(operand)), start=1):
            if back <= rank:
                axes[rank - back] = t.fit(axes[rank - back], axis)
    return tuple(axis if axis or size == 1 else fixed(size) for axis, size in zip(axes, shape, strict=True))


def _same(t: "Propagation", a: Arguments, result: Any) -> Any:
    first = t.of(next(v for v in a.values() if isinstance(v, Tensor)))
    return [first for _ in all_tensors([result])]


def _dims(value: Any, rank: int) -> list[int]:
    if value is None or value == []:
        return list(range(rank))
    return [d % rank for d in (value if isinstance(value, (list, tuple)) else [value])]


def _reduce(name: str) -> Rule:
    def rule(t: "Propagation", a: Arguments, result: Any) -> Any:
        operand = a["self"] if "self" in a else a["input"]
        axes = t.of(operand)
        gone = _dims(a.get("dim"), len(axes))
        for d in gone:
            t.mix(operand, d, name)
        left = tuple(() if d in gone else axis for d, axis in enumerate(axes))
        if not a.get("keepdim"):
            left = tuple(axis for d, axis in enumerate(left) if d not in gone)
        return [left for _ in all_tensors([result])]

    return rule


def _along(name: str) -> Rule:
    """The result has the shape of its operand, and every number in it depends on all along one axis."""

    def rule(t: "Propagation", a: Arguments, result: Any) -> Any:
        axes = t.of(a["self"])
        for d in _dims(a.get("dim"), len(axes)):
            t.mix(a["self"], d, name)
        return [axes for _ in all_tensors([result])]

    return rule


def _reshape(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    return t.indices.reshape(t.of(a["self"]), result.shape, f"is cut in an odd place by a view in {t.running[-1]!r}")


def _view(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    """With the sizes that the code gave, perhaps from attributes."""
    axes = _reshape(t, a, result)
    t.count(axes)
    t.count_shape(axes)
    t.widen(axes)
    return axes


def _permute(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = list(t.of(a["self"]))
    if "dims" in a:
        return tuple(axes[d] for d in a["dims"])
    if "dim0" in a:
        axes[a["dim0"]], axes[a["dim1"]] = axes[a["dim1"]], axes[a["dim0"]]
        return tuple(axes)
    return tuple(reversed(axes))


def _movedim(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    places = list(range(len(axes)))
    source, target = _dims(a["source"], len(axes)), _dims(a["destination"], len(axes))
    rest = [p for p in places if p not in source]
    order = {to: come for come, to in zip(source, target, strict=True)}
    return tuple(axes[order[p] if p in order else rest.pop(0)] for p in places)


def _expand(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    axes = ((),) * (result.dim() - len(axes)) + axes
    return tuple(axis or made for axis, made in zip(axes, t.made(result.shape), strict=True))


def _repeat(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    axes = ((),) * (result.dim() - len(axes)) + axes
    return tuple((*fixed(times, is_free=not axis), *axis) for times, axis in zip(a["repeats"], axes, strict=True))


def _repeat_interleave(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    if not isinstance(a["repeats"], int) or a["dim"] is None:
        return t.give_up("repeat_interleave", [a["self"]], [result])[0]
    axes = list(t.of(a["self"]))
    axes[a["dim"]] = (*axes[a["dim"]], *fixed(a["repeats"]))
    return tuple(axes)


def _cat(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    parts = [p for p in all_tensors([a["tensors"]]) if p.dim() == result.dim()]  # empty ones may have another rank
    dim = a["dim"] % result.dim()
    axes: list[Axis] = list(t.of(parts[0]))
    for part in parts[1:]:
        axes = [t.equate(x, y) if d != dim else x for d, (x, y) in enumerate(zip(axes, t.of(part), strict=True))]
    why = f"is concatenated with constants in {t.running[-1]!r}"
    axes[dim] = t.indices.concatenate([t.of(p)[dim] for p in parts], [p.shape[dim] for p in parts], why)
    return tuple(axes)


def _stack(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    dim = a["dim"] % result.dim()
    axes = list(_broadcast(t, a["tensors"], result.dim() - 1, [n for d, n in enumerate(result.shape) if d != dim]))
    return (*axes[:dim], fixed(len(a["tensors"])), *axes[dim:])


def _pieces(t: "Propagation", a: Arguments, result: Any) -> list[Axes]:
    """split, chunk and their kin: consecutive parts of one axis."""
    axes = t.of(a["self"])
    dim = a["dim"] % len(axes)
    found, start = [], 0
    for part in result:
        size = part.shape[dim]
        piece = t.pick(axes[dim], np.arange(start, start + size), part)
        found.append((*axes[:dim], piece, *axes[dim + 1 :]))
        t.count((piece,))
        start += size
    sizes, pieces = [part.shape[dim] for part in result], [each[dim] for each in found]
    t.count_pieces(sizes, pieces)
    if "chunks" in a or "sections" in a:  # the code names their number: of what is left, all get the same share
        if len(set(sizes)) > 1:
            t.keep(axes[dim], "is cut into unequal parts")
        else:
            for piece in pieces[1:]:
                t.equate(pieces[0], piece)
    return found


def _slice(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    dim, size = a["dim"] % len(axes), a["self"].shape[a["dim"]]
    places = np.arange(size)[slice(a["start"], a["end"], a["step"])]
    piece = axes[dim] if len(places) == size else t.pick(axes[dim], places, result)
    return (*axes[:dim], piece, *axes[dim + 1 :])


def _select(t: "Propagation", a: Arguments, result: Any) -> Any:
    axes = t.of(a["self"])
    dim = a["dim"] % len(axes)
    for each in all_tensors([result]):
        t.picked[each] = axes[dim]
    return [(*axes[:dim], *axes[dim + 1 :]) for _ in all_tensors([result])]


def _index(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
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


def _index_select(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes, dim = list(t.of(a["self"])), a["dim"]
    t.keep(axes[dim], "is picked out by the code")
    axes[dim] = fixed(result.shape[dim])
    return tuple(axes)


def _index_add(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    """Rows of one tensor are added to, or put in the place of, some rows of another."""
    axes, others, dim = t.of(a["self"]), t.of(a["source"]), a["dim"] % max(result.dim(), 1)
    if len(axes) != len(others):
        return t.give_up("index_add", [a["self"], a["source"]], [result])[0]
    for axis in (axes[dim], others[dim]):
        t.keep(axis, "is picked out by the code")
    pairs = enumerate(zip(axes, others, strict=True))
    return tuple(fixed(result.shape[d]) if d == dim else t.equate(x, y) for d, (x, y) in pairs)


def _gather(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes, others, dim = t.of(a["self"]), t.of(a["index"]), a["dim"] % result.dim()
    t.keep(axes[dim], "is picked out by the code")
    pairs = enumerate(zip(axes, others, strict=True))
    return tuple(fixed(result.shape[d]) if d == dim else t.equate(x, y) for d, (x, y) in pairs)


def _embedding(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    rows, columns = t.of(a["weight"])
    t.keep(rows, "is looked up by an index")
    t.called.add(t.owners.get(id(a["weight"]), ("", ""))[0])
    return (*t.of(a["indices"]), columns)


def _flip(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = list(t.of(a["self"]))
    for d in _dims(a["dims"], len(axes)):
        axes[d] = t.indices.pick(axes[d], np.arange(result.shape[d])[::-1])
    return tuple(axes)


def _roll(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    for d in _dims(a["dims"], len(axes)):
        t.keep(axes[d], "is rolled by the code")
    return axes


def _pad(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
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


def _spatial(t: "Propagation", a: Arguments, result: Any) -> list[Axes]:
    """Pooling and resampling: leading axes pass, those after the channels become others."""
    axes = t.of(next(v for v in a.values() if isinstance(v, Tensor)))
    leading = 2 if len(axes) > 2 else 1
    for axis in axes[leading:]:
        t.keep(axis, "is pooled or resampled as if it were a place")
    return [(*axes[:leading], *(fixed(n) for n in each.shape[leading:])) for each in all_tensors([result])]


def _unpool(t: "Propagation", a: Arguments, result: Tensor) -> list[Axes]:
    leading = 2 if result.dim() > 3 else 1
    for x, y in zip(t.of(a["self"])[:leading], t.of(a["indices"]), strict=False):
        t.equate(x, y)
    return _spatial(t, a, result)


def _im2col(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    for axis in axes[-2:]:
        t.keep(axis, "is unfolded as if it were a place")
    return (*axes[:-3], (*axes[-3], *fixed(math.prod(a["kernel_size"]))), fixed(result.shape[-1]))


def _pixel_shuffle(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    *lead, channels, _, _ = t.of(a["self"])
    r = a["upscale_factor"]
    parts = t.indices.reshape((channels,), (result.shape[-3], r, r), "is cut in an odd place")
    for part in parts[1:]:
        t.keep(part, "is a place inside a pixel")
    return (*lead, parts[0], fixed(result.shape[-2]), fixed(result.shape[-1]))


def _pixel_unshuffle(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    *lead, channels, _, _ = t.of(a["self"])
    return (*lead, (*channels, *fixed(a["downscale_factor"] ** 2)), *(fixed(n) for n in result.shape[-2:]))


def _channel_shuffle(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    first, channels, *rest = t.of(a["self"])
    outer, inner = t.indices.reshape((channels,), (a["groups"], result.shape[1] // a["groups"]), "is shuffled")
    t.keep(outer, "is a group of a shuffle")
    return (first, (*inner, *outer), *rest)


def _glu(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    dim, half = a["dim"] % len(axes), result.shape[a["dim"]]
    gated, gate = (t.indices.pick(axes[dim], np.arange(half) + start) for start in (0, half))
    return (*axes[:dim], t.equate(gated, gate), *axes[dim + 1 :])


def _linear(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    weight = t.of(a["weight"])
    *lead, read = t.of(a["input"])
    if len(weight) == 1:  # a single output without an axis of its own
        t.equate(read, weight[0])
        return tuple(lead)
    out = weight[0]
    if a["bias"] is not None:
        out = t.equate(out, t.of(a["bias"])[-1])
    _note_reader(t, a["weight"], t.equate(weight[1], read, "inputs of fixed size"))
    return (*lead, out)


def _note_reader(t: "Propagation", weight: Tensor, read: Axis) -> None:
    where = t.running[-1]
    own = t.modules[where]._parameters.get("weight")
    is_computed = own is not None and id(weight) not in t.owners and own.shape == weight.shape  # from its own, masked
    if own is not weight and not is_computed:  # called by another module than its own
        where, _ = t.owners.get(id(weight), ("", ""))
    t.called.add(where)
    atoms = t.indices.joined(read).atoms if has_atoms(read) else None
    if where and atoms is not None:
        t.reads[where] = atoms


def _convolution(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    x, weight = t.of(a["input"]), t.of(a["weight"])
    is_transposed, groups = bool(a.get("transposed")), a["groups"]
    channel = len(x) - (len(weight) - 2) - 1
    outer, inner = (weight[1], weight[0]) if is_transposed else weight[:2]
    if groups > 1:
        split, size = (inner, a["input"].shape[channel]) if is_transposed else (outer, result.shape[channel])
        parts = t.indices.reshape((split,), (groups, size // groups), "is cut in an odd place")
        t.convolution_groups += [f.atoms for f in parts[0] if f.atoms is not None and size > groups]
        outer, inner = ((*parts[0], *outer), split) if is_transposed else (split, (*parts[0], *inner))
    _note_reader(t, a["weight"], t.equate(inner, x[channel], "inputs of fixed size"))
    if a["bias"] is not None:
        outer = t.equate(outer, t.of(a["bias"])[0])
    for axis in (*x[channel + 1 :], *weight[2:]):
        t.keep(axis, "is convolved as if it were a place")
    return (*x[:channel], outer, *(fixed(n) for n in result.shape[channel + 1 :]))


def _transposed(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    return _convolution(t, {**a, "transposed": True}, result)


def _matmul(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    left, right = a["self"], next(a[name] for name in ("other", "mat2", "vec", "tensor") if name in a)
    x, y = t.of(left), t.of(right)
    inner = t.equate(x[-1], y[-2] if len(y) > 1 else y[-1])
    shape = result.shape[: max(len(x), len(y)) - 2] if len(x) > 1 and len(y) > 1 else ()
    lead: list[Axis] = [()] * len(shape)
    for axes in (x[:-2], y[:-2]):
        for back, axis in enumerate(reversed(axes), start=1):
            lead[-back] = t.equate(lead[-back], axis)
    lead = [axis or fixed(n) for axis, n in zip(lead, shape, strict=True)]
    if id(left) not in t.owners and id(right) not in t.owners:
        t.note_attention(lead, inner)
    rows = x[-2:-1] if len(y) > 1 else x[:-1]
    columns = y[-1:] if len(x) > 1 and len(y) > 1 else (*y[:-2], *y[-1:]) if len(y) > 1 else ()
    return (*lead, *rows, *columns)


def _addmm(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    """bias + mat1 @ mat2"""
    first, second = ("mat1", "mat2") if "mat1" in a else ("batch1", "batch2")
    axes = _matmul(t, {"self": a[first], "other": a[second]}, result)
    bias = t.of(a["self"])
    padded = ((),) * (len(axes) - len(bias)) + bias
    out = tuple(t.equate(x, y) for x, y in zip(axes, padded, strict=True))
    return out


def _einsum(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    equation = a["equation"].replace(" ", "")
    left, _, right = equation.partition("->")
    if "->" not in equation or "." in equation:
        return t.give_up("einsum", a["tensors"], [result])[0]
    found: dict[str, Axis] = {}
    terms = left.split(",")
    for term, operand in zip(terms, a["tensors"], strict=True):
        for letter, axis in zip(term, t.of(operand), strict=True):
            found[letter] = t.equate(found.get(letter, ()), axis)
    for letter, axis in found.items():
        if letter not in right and sum(letter in term for term in terms) == 1:
            t.keep(axis, "is summed up by einsum()")
    if len(terms) == 2 and not any(id(operand) in t.owners for operand in a["tensors"]):
        shared = [letter for letter in found if all(letter in term for term in terms)]
        heads = [found[letter] for letter in shared if letter in right]
        t.note_attention(heads, tuple(f for letter in shared if letter not in right for f in found[letter]))
    return tuple(found[letter] for letter in right)


def _attention(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    query, key, value = t.of(a["query"]), t.of(a["key"]), t.of(a["value"])
    inner = t.equate(query[-1], key[-1])
    rank = len(query)
    if a.get("enable_gqa"):  # each head of the keys serves several of the queries
        repeats = a["query"].shape[-3] // a["key"].shape[-3]
        key, value = ((*x[:-3], (*x[-3], *fixed(repeats)), *x[-2:]) for x in (key, value))
    lead = [t.equate(t.equate(query[d], key[d]), value[d]) for d in range(rank - 2)]
    if a.get("attn_mask") is not None:
        for back, axis in enumerate(reversed(t.of(a["attn_mask"])[:-2]), start=1):
            lead[-back] = t.equate(lead[-back], axis)
    t.note_attention(lead, inner)
    return (*lead, query[-2], value[-1])


def _batch_norm(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = list(t.of(a["input"]))
    if a.get("training"):
        for d in (0, *range(2, len(axes))):
            t.mix(a["input"], d, "batch_norm")
    axes[1] = _with_weights(t, axes[1], [a.get(k) for k in ("weight", "bias", "running_mean", "running_var")])
    return tuple(axes)


def _with_weights(t: "Propagation", axis: Axis, weights: Sequence[Tensor | None]) -> Axis:
    for weight in weights:
        if weight is not None:
            axis = t.equate(t.of(weight)[0], axis)
    if isinstance(t.modules[t.running[-1]], nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase | nn.RMSNorm):
        atoms = t.indices.joined(axis).atoms if has_atoms(axis) else None
        if atoms is not None:
            t.normalises[t.running[-1]] = atoms
    return axis


def _layer_norm(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    *lead, last = t.of(a["input"])
    for axis in lead[len(lead) + 1 - len(a["normalized_shape"]) :]:
        t.keep(axis, "is normalised together with other axes")
    if len(a["normalized_shape"]) == 1:
        t.mix(a["input"], len(lead), "layer_norm")
        last = _with_weights(t, last, [a["weight"], a.get("bias")])
        t.count_pieces(a["normalized_shape"], [last])
    return (*lead, last)


def _group_norm(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    first, channels, *rest = t.of(a["input"])
    channels = _with_weights(t, channels, [a["weight"], a["bias"]])
    groups = a["num_groups"]
    if 1 < groups < result.shape[1]:
        parts = t.indices.reshape((channels,), (groups, result.shape[1] // groups), "is cut in an odd place")
        t.keep(parts[1], "shares its statistics with a part of the channels")
        channels = tuple(f for part in parts for f in part)
    return (first, channels, *rest)


def _prelu(t: "Propagation", a: Arguments, result: Tensor) -> Axes:
    axes = list(t.of(a["self"]))
    if len(axes) > 1:
        axes[1] = t.equate(axes[1], t.of(a["weight"])[0])
    return tuple(axes)


def _weight_norm(t: "Propagation", a: Arguments, result: Any) -> Any:
    direction, dim = t.of(a["v"]), a["dim"]
    for d, axis in enumerate(direction):
        if d != dim % len(direction):
            t.keep(axis, "belongs to a weight that is normalised over it")
    gain = t.of(a["g"])
    axes = tuple(t.equate(x, y) for x, y in zip(direction, gain, strict=True))
    return axes if isinstance(result, Tensor) else [axes, gain]


def _pack(t: "Propagation", a: Arguments, result: Any) -> list[Axes]:
    """Sequences one after another, without their padding; and how many go on at each step."""
    return [(fixed(len(result[0])), *t.of(a["input"])[2:]), t.of(result[1])]


def _unpack(t: "Propagation", a: Arguments, result: Any) -> list[Axes]:
    return [(*map(fixed, result[0].shape[:2]), *t.of(a["data"])[1:]), t.of(result[1])]


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


def _named(names: str, make: Callable[[str], Rule]) -> dict[str, Rule]:
    return {name: make(name) for name in names.split()}


RULES: Mapping[str, Rule] = {
    **_each(
        "dropout feature_dropout alpha_dropout contiguous clone detach alias to _to_copy type_as lift_fresh", _same
    ),
    **_each(
        "zeros_like ones_like empty_like full_like rand_like randn_like bernoulli fill zero hardswish rrelu", _same
    ),
    **_each("copy where masked_fill", pointwise),
    **_named("mean sum amax amin max min var std var_mean std_mean prod any all logsumexp", _reduce),
    **_named("argmax argmin norm linalg_vector_norm median nanmean", _reduce),
    **_named("softmax _softmax log_softmax _log_softmax cumsum cumprod sort argsort", _along),
    **_each("view reshape _unsafe_view _reshape_alias unflatten", _view),
    **_each("flatten view_as reshape_as squeeze unsqueeze", _reshape),
    **_each("permute transpose swapaxes swapdims t numpy_T", _permute),
    **_each("movedim moveaxis", _movedim),
    **_each("expand expand_as broadcast_to", _expand),
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    **_each("cat concat concatenate", _cat),
    "stack": _stack,
    "_pack_padded_sequence": _pack,
    "_pad_packed_sequence": _unpack,
    **_each("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split", _pieces),
    "slice": _slice,
    **_each("select unbind", _select),
    "index": _index,
    **dict.fromkeys(("index_add", "index_copy"), _index_add),
    "index_select": _index_select,
    "gather": _gather,
    "embedding": _embedding,
    "flip": _flip,
    "roll": _roll,
    **_each("pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d", _pad),
    **{
        f"{kind}_pool{d}d": _spatial for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for d in (1, 2, 3)
    },
    **{f"max_pool{d}d_with_indices": _spatial for d in (1, 2, 3)},
    **_each("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d", _spatial),
    **_each("upsample_linear1d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa", _spatial),
    **_each("grid_sampler grid_sampler_2d grid_sampler_3d _adaptive_avg_pool2d _adaptive_avg_pool3d", _spatial),
    **_each("max_unpool2d max_unpool3d", _unpool),
    "im2col": _im2col,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
    "glu": _glu,
    "linear": _linear,
    **_each("conv1d conv2d conv3d convolution _convolution", _convolution),
    **_each("conv_transpose1d conv_transpose2d conv_transpose3d", _transposed),
    **_each("matmul mm bmm mv dot", _matmul),
    **_each("addmm baddbmm", _addmm),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **_each("batch_norm instance_norm", _batch_norm),
    **_each("layer_norm rms_norm", _layer_norm),
    "group_norm": _group_norm,
    "prelu": _prelu,
    **_each("_weight_norm _weight_norm_interface", _weight_norm),
}
