"""Rules for what layers compute (products, norms, pooling, attention): what they do to axes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from deploypipe.pruning.modules.axis_reductions import all_tensors
from deploypipe.pruning.tracing.index_algebra import Axes, Axis, fixed, has_atoms
from deploypipe.pruning.tracing.trace_record import Arguments, AxisTrace


def embedding(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    rows, columns = t.of(a["weight"])
    t.keep(rows, "is looked up by an index")
    t.called.add(t.owners.get(id(a["weight"]), ("", ""))[0])
    return (*t.of(a["indices"]), columns)


def spatial(t: AxisTrace, a: Arguments, result: Any) -> list[Axes]:
    """Pooling and resampling: batch and channel axes pass, spatial axes are new."""
    axes = t.of(next(v for v in a.values() if isinstance(v, Tensor)))
    leading = 2 if len(axes) > 2 else 1
    for axis in axes[leading:]:
        t.keep(axis, "is pooled or resampled like a spatial axis")
    return [(*axes[:leading], *(fixed(n) for n in each.shape[leading:])) for each in all_tensors([result])]


def unpool(t: AxisTrace, a: Arguments, result: Tensor) -> list[Axes]:
    leading = 2 if result.dim() > 3 else 1
    for x, y in zip(t.of(a["self"])[:leading], t.of(a["indices"]), strict=False):
        t.equate(x, y)
    return spatial(t, a, result)


def im2col(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    for axis in axes[-2:]:
        t.keep(axis, "is unfolded like a spatial axis")
    return (*axes[:-3], (*axes[-3], *fixed(math.prod(a["kernel_size"]))), fixed(result.shape[-1]))


def pixel_shuffle(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    *lead, channels, _, _ = t.of(a["self"])
    r = a["upscale_factor"]
    parts = t.indices.reshape((channels,), (result.shape[-3], r, r), "is split unevenly")
    for part in parts[1:]:
        t.keep(part, "is a position inside a pixel")
    return (*lead, parts[0], fixed(result.shape[-2]), fixed(result.shape[-1]))


def pixel_unshuffle(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    *lead, channels, _, _ = t.of(a["self"])
    return (*lead, (*channels, *fixed(a["downscale_factor"] ** 2)), *(fixed(n) for n in result.shape[-2:]))


def channel_shuffle(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    first, channels, *rest = t.of(a["self"])
    outer, inner = t.indices.reshape((channels,), (a["groups"], result.shape[1] // a["groups"]), "is shuffled")
    t.keep(outer, "is a group of a shuffle")
    return (first, (*inner, *outer), *rest)


def glu(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = t.of(a["self"])
    dim, half = a["dim"] % len(axes), result.shape[a["dim"]]
    gated, gate = (t.indices.pick(axes[dim], np.arange(half) + start) for start in (0, half))
    return (*axes[:dim], t.equate(gated, gate), *axes[dim + 1 :])


def linear(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
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


def _note_reader(t: AxisTrace, weight: Tensor, read: Axis) -> None:
    where = t.running[-1]
    own = t.modules[where]._parameters.get("weight")
    is_computed = own is not None and id(weight) not in t.owners and own.shape == weight.shape  # from its own
    if own is not weight and not is_computed:  # called by another module than its own
        where, _ = t.owners.get(id(weight), ("", ""))
    t.called.add(where)
    atoms = t.indices.joined(read).atoms if has_atoms(read) else None
    if where and atoms is not None:
        t.reads[where] = atoms


def convolution(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    x, weight = t.of(a["input"]), t.of(a["weight"])
    is_transposed, groups = bool(a.get("transposed")), a["groups"]
    channel = len(x) - (len(weight) - 2) - 1
    outer, inner = (weight[1], weight[0]) if is_transposed else weight[:2]
    if groups > 1:
        split, size = (inner, a["input"].shape[channel]) if is_transposed else (outer, result.shape[channel])
        parts = t.indices.reshape((split,), (groups, size // groups), "is split unevenly")
        t.convolution_groups += [f.atoms for f in parts[0] if f.atoms is not None and size > groups]
        outer, inner = ((*parts[0], *outer), split) if is_transposed else (split, (*parts[0], *inner))
    _note_reader(t, a["weight"], t.equate(inner, x[channel], "inputs of fixed size"))
    if a["bias"] is not None:
        outer = t.equate(outer, t.of(a["bias"])[0])
    for axis in (*x[channel + 1 :], *weight[2:]):
        t.keep(axis, "is convolved like a spatial axis")
    return (*x[:channel], outer, *(fixed(n) for n in result.shape[channel + 1 :]))


def transposed(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    return convolution(t, {**a, "transposed": True}, result)


def matmul(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
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


def addmm(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    """bias + mat1 @ mat2"""
    first, second = ("mat1", "mat2") if "mat1" in a else ("batch1", "batch2")
    axes = matmul(t, {"self": a[first], "other": a[second]}, result)
    bias = t.of(a["self"])
    padded = ((),) * (len(axes) - len(bias)) + bias
    out = tuple(t.equate(x, y) for x, y in zip(axes, padded, strict=True))
    return out


def einsum(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    equation = a["equation"].replace(" ", "")
    left, _, right = equation.partition("->")
    if "->" not in equation or "." in equation:
        return t.freeze_operands("einsum", a["tensors"], [result])[0]
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


def attention(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    query, key, value = t.of(a["query"]), t.of(a["key"]), t.of(a["value"])
    inner = t.equate(query[-1], key[-1])
    rank = len(query)
    if a.get("enable_gqa"):  # each key head serves several query heads
        repeats = a["query"].shape[-3] // a["key"].shape[-3]
        key, value = ((*x[:-3], (*x[-3], *fixed(repeats)), *x[-2:]) for x in (key, value))
    lead = [t.equate(t.equate(query[d], key[d]), value[d]) for d in range(rank - 2)]
    if a.get("attn_mask") is not None:
        for back, axis in enumerate(reversed(t.of(a["attn_mask"])[:-2]), start=1):
            lead[-back] = t.equate(lead[-back], axis)
    t.note_attention(lead, inner)
    return (*lead, query[-2], value[-1])


def batch_norm(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = list(t.of(a["input"]))
    if a.get("training"):
        for d in (0, *range(2, len(axes))):
            t.reduce_over(a["input"], d, "batch_norm")
    axes[1] = _with_weights(t, axes[1], [a.get(k) for k in ("weight", "bias", "running_mean", "running_var")])
    return tuple(axes)


def _with_weights(t: AxisTrace, axis: Axis, weights: Sequence[Tensor | None]) -> Axis:
    for weight in weights:
        if weight is not None:
            axis = t.equate(t.of(weight)[0], axis)
    if isinstance(t.modules[t.running[-1]], nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase | nn.RMSNorm):
        atoms = t.indices.joined(axis).atoms if has_atoms(axis) else None
        if atoms is not None:
            t.normalises[t.running[-1]] = atoms
    return axis


def layer_norm(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    *lead, last = t.of(a["input"])
    for axis in lead[len(lead) + 1 - len(a["normalized_shape"]) :]:
        t.keep(axis, "is normalised together with other axes")
    if len(a["normalized_shape"]) == 1:
        t.reduce_over(a["input"], len(lead), "layer_norm")
        last = _with_weights(t, last, [a["weight"], a.get("bias")])
        t.match_split_sizes(a["normalized_shape"], [last])
    return (*lead, last)


def group_norm(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    first, channels, *rest = t.of(a["input"])
    channels = _with_weights(t, channels, [a["weight"], a["bias"]])
    groups = a["num_groups"]
    if 1 < groups < result.shape[1]:
        parts = t.indices.reshape((channels,), (groups, result.shape[1] // groups), "is split unevenly")
        t.keep(parts[1], "shares its normalization statistics with a part of the channels")
        channels = tuple(f for part in parts for f in part)
    return (first, channels, *rest)


def prelu(t: AxisTrace, a: Arguments, result: Tensor) -> Axes:
    axes = list(t.of(a["self"]))
    if len(axes) > 1:
        axes[1] = t.equate(axes[1], t.of(a["weight"])[0])
    return tuple(axes)


def weight_norm(t: AxisTrace, a: Arguments, result: Any) -> Any:
    direction, dim = t.of(a["v"]), a["dim"]
    for d, axis in enumerate(direction):
        if d != dim % len(direction):
            t.keep(axis, "belongs to a weight that is normalised over it")
    gain = t.of(a["g"])
    axes = tuple(t.equate(x, y) for x, y in zip(direction, gain, strict=True))
    return axes if isinstance(result, Tensor) else [axes, gain]
