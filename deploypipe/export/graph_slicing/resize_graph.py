"""Bring a graph to other widths of its weights: the sizes of its tensors, and the constants that hold sizes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from deploypipe.runtimes import Array
from deploypipe.task import batch_size_of

Shape: TypeAlias = tuple[int, ...]
_NUM_SAMPLES = 1_000_003  # a prime
_MAX_KNOWN = 64  # elements of a value that is computed: shapes are short
_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


class UnfitError(Exception):
    """A node cannot be brought to other widths. Callers export the network instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Known facts about a graph's tensors."""

    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)  # of integers that are shapes or parts of them

    def shape(self, name: str) -> Shape:
        if name not in self.types or not self.types[name].tensor_type.HasField("shape"):
            raise UnfitError(f"the shape of {name!r} is unknown")
        dims = self.types[name].tensor_type.shape.dim
        if not all(dim.HasField("dim_value") for dim in dims):
            raise UnfitError(f"the shape of {name!r} is unknown")
        return tuple(dim.dim_value for dim in dims)


def propagate(proto: onnx.ModelProto, feed: Mapping[str, Array]) -> Facts:
    """Infer the sizes of all tensors of a graph, on a batch like `feed` with more samples than any width."""
    facts = facts_of(proto.graph.initializer, feed)
    for node in proto.graph.node:
        learn_(facts, node, proto.opset_import)
    return facts


def facts_of(weights: Iterable[onnx.TensorProto], feed: Mapping[str, Array]) -> Facts:
    facts = Facts()
    size = batch_size_of([array.shape for array in feed.values()])
    for name, array in feed.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        is_batched = array.ndim > 0 and len(array) == size
        shape = (_NUM_SAMPLES, *array.shape[1:]) if is_batched else array.shape
        facts.types[name] = onnx.helper.make_tensor_type_proto(kind, shape)
    for weight in weights:
        facts.types[weight.name] = onnx.helper.make_tensor_type_proto(weight.data_type, weight.dims)
        if weight.data_type in _INTEGERS and math.prod(weight.dims) <= _MAX_KNOWN:
            facts.values[weight.name] = numpy_helper.to_array(weight)
    return facts


def learn_(facts: Facts, node: onnx.NodeProto, opsets: Sequence[onnx.OperatorSetIdProto]) -> None:
    """Add a node's outputs; UnfitError if its inputs do not fit together."""
    inputs = [name for name in node.input if name]
    version = next((o.version for o in opsets if o.domain == node.domain), 0)
    try:
        found = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, version, node.domain),
            node,
            {name: facts.types[name] for name in inputs if name in facts.types},
            {name: numpy_helper.from_array(facts.values[name]) for name in inputs if name in facts.values},
            opset_imports=list(opsets),
        )
        facts.types.update(found)
        if node.op_type == "Shape":
            facts.values[node.output[0]] = _shape_value(node, facts.shape(node.input[0]))
        elif inputs and all(name in facts.values for name in inputs):
            results: Any = ReferenceEvaluator(node).run(None, {name: facts.values[name] for name in inputs})
            facts.values.update(zip(node.output, results, strict=True))
    except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError, ValueError, IndexError) as error:
        raise UnfitError(f"{node.name}: {str(error).strip().splitlines()[0]}") from error


def _shape_value(node: onnx.NodeProto, shape: Shape) -> Array:
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    return np.array(shape[start:end], np.int64)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refit:
    """One pass over a graph whose weights have other widths, node by node in order."""

    dense: Facts
    new: Facts
    opsets: Sequence[onnx.OperatorSetIdProto]
    sizes: Callable[[str], Mapping[int, int]]  # node -> numbers that its modules hold, before and after
    constants: Mapping[str, onnx.TensorProto]
    nodes: list[onnx.NodeProto] = field(default_factory=list)  # those done
    added: dict[str, onnx.TensorProto] = field(default_factory=dict)
    concats: dict[str, onnx.NodeProto] = field(default_factory=dict)  # done, by their value

    def take(self, node: onnx.NodeProto) -> None:
        """Append the node with its sizes updated. `node` may be changed."""
        if node.op_type in _RULES and self._sees_a_change(node):
            _RULES[node.op_type](self, node)
        self._append(node)

    def _append(self, node: onnx.NodeProto) -> None:
        self.nodes.append(node)
        learn_(self.new, node, self.opsets)
        if node.op_type == "Concat":
            self.concats[node.output[0]] = node

    def _sees_a_change(self, node: onnx.NodeProto) -> bool:
        if node.op_type in ("Conv", "ConvTranspose"):
            return bool(attribute(node, "group", 1) > 1)
        return self.dense.shape(node.input[0]) != self.new.shape(node.input[0])

    def write_(self, node: onnx.NodeProto, position: int, wanted: Sequence[int]) -> None:
        """Let `node` read these integers. Other nodes may keep reading the old ones."""
        name = node.input[position]
        if name in self.new.values and self.new.values[name].reshape(-1).tolist() == list(wanted):
            return
        if name in self.constants:
            node.input[position] = self._constant(wanted, self.dense.values[name])
        elif name in self.concats:
            node.input[position] = self._joined(self.concats[name], wanted, node)
        else:
            raise UnfitError(f"{node.name}: needs {list(wanted)}, and the graph computes another value")

    def _joined(self, concat: onnx.NodeProto, wanted: Sequence[int], reader: onnx.NodeProto) -> str:
        """The value of a copy of the Concat, with its constant parts as wanted."""
        own = onnx.NodeProto()
        own.CopyFrom(concat)
        own.name, own.output[0] = f"{reader.name}/Concat", f"{reader.output[0]}_sizes"
        start = 0
        for position, name in enumerate(concat.input):
            size = math.prod(self.new.shape(name))
            self.write_(own, position, wanted[start : start + size])
            start += size
        self._append(own)  # onnxruntime merges equal nodes
        return str(own.output[0])

    def resize(self, array: Array, size: int, node: onnx.NodeProto) -> str:
        """A constant (n,) whose elements are all equal, with another n."""
        if (array != array[0]).any():
            raise UnfitError(f"{node.name}: has a constant of {len(array)} unequal numbers, and {size} channels")
        name = f"constant_{array.dtype}_{size}_{array[0]}"
        return self._add(np.full(size, array[0], array.dtype), name)

    def _constant(self, wanted: Sequence[int], like: Array) -> str:
        array = np.array(wanted, like.dtype).reshape(like.shape)
        name = f"sizes_{like.dtype}_{like.ndim}_" + "_".join(map(str, wanted))
        self.new.values[name] = array
        return self._add(array, name)

    def _add(self, array: Array, name: str) -> str:
        self.added[name] = numpy_helper.from_array(array, name)
        self.new.types[name] = onnx.helper.make_tensor_type_proto(self.added[name].data_type, array.shape)
        return name


def _fit_reshape(refit: Refit, node: onnx.NodeProto) -> None:
    data, shape = node.input
    known = refit.dense.values.get(shape)
    if known is None:
        raise UnfitError(f"{node.name}: its shape depends on the values of the input")
    old, new = refit.dense.shape(data), refit.new.shape(data)
    computed = refit.new.values.get(shape)
    if shape not in refit.constants and computed is not None and math.prod(computed.tolist()) == math.prod(new):
        return
    try:
        wanted = regrouped(old, new, refit.dense.shape(node.output[0]), refit.sizes(node.name))
    except UnfitError as error:
        raise UnfitError(f"{node.name}: {error}") from None
    refit.write_(node, 1, [k if k in (0, -1) else w for k, w in zip(known.tolist(), wanted, strict=True)])


def regrouped(old: Shape, new: Shape, shape: Shape, sizes: Mapping[int, int]) -> list[int]:
    """The shape for reshaping `new`, given that `old` was reshaped to `shape`.

    Axes are combined until their products agree: (n, 64, 8, 16) and (n, 64, 128) match one to one, then two to one.
    `sizes`, numbers that changed or stayed, decide how one axis is divided.
    """
    wanted: list[int] = []
    i = j = 0
    while i < len(old) or j < len(shape):
        first, begun = i, j
        before, after = 1, 1
        while first == i or begun == j or before != after:
            if (before <= after and i < len(old)) or j == len(shape):
                before, i = before * old[i], i + 1
            else:
                after, j = after * shape[j], j + 1
            if i == len(old) and j == len(shape):
                break
        wanted += _divided(math.prod(old[first:i]), math.prod(new[first:i]), shape[begun:j], sizes)
    return wanted


def _divided(old: int, new: int, parts: Shape, sizes: Mapping[int, int]) -> list[int]:
    """Change `parts`, whose product was `old`, so that their product is `new`."""
    if old == new:
        return list(parts)
    for guess in ([sizes.get(part, part) for part in parts], list(parts)):
        if math.prod(guess) == new:
            return guess
        # A part that no module holds as a number follows from the others. If modules hold all parts, the last one
        # does: an attention's head dimension.
        for i in sorted(range(len(parts)), key=lambda i: (parts[i] in sizes, -i)):
            others = math.prod(guess[:i] + guess[i + 1 :])
            if parts[i] > 1 and others and new % others == 0:
                return [*guess[:i], new // others, *guess[i + 1 :]]
    raise UnfitError(f"{new} instead of {old} cannot be divided like {list(parts)}")


def _fit_expand(refit: Refit, node: onnx.NodeProto) -> None:
    _fit_aligned(refit, node, 1)


def _fit_resize(refit: Refit, node: onnx.NodeProto) -> None:
    if len(node.input) > 3 and node.input[3]:
        _fit_aligned(refit, node, 3)


def _fit_aligned(refit: Refit, node: onnx.NodeProto, position: int) -> None:
    """Update sizes that equal the input's, axis by axis from the last."""
    known = refit.dense.values[node.input[position]].tolist()
    old, new = refit.dense.shape(node.input[0]), refit.new.shape(node.input[0])
    ahead = [1] * (len(known) - len(old))
    pairs = zip(known, [*ahead, *old], [*ahead, *new], strict=True)
    refit.write_(node, position, [after if k == before else k for k, before, after in pairs])


def _fit_split(refit: Refit, node: onnx.NodeProto) -> None:
    if len(node.input) < 2 or not node.input[1]:
        return
    axis = attribute(node, "axis", 0)
    old, new = refit.dense.shape(node.input[0])[axis], refit.new.shape(node.input[0])[axis]
    if old == new:
        return
    known = refit.dense.values[node.input[1]].tolist()
    sizes = refit.sizes(node.name)
    resized = [sizes.get(k, k) for k in known]
    refit.write_(node, 1, resized if sum(resized) == new else [_scaled(node, k, old, new) for k in known])


def _fit_slice(refit: Refit, node: onnx.NodeProto) -> None:
    old, new = refit.dense.shape(node.input[0]), refit.new.shape(node.input[0])
    has_axes = len(node.input) > 3 and node.input[3]
    axes = refit.dense.values[node.input[3]].tolist() if has_axes else list(range(len(old)))
    for position in (1, 2):
        if node.input[position] not in refit.constants:  # the graph computes this length
            continue
        bounds = refit.dense.values[node.input[position]].tolist()
        fitted = [
            bound if abs(bound) >= old[axis] else _scaled(node, bound, old[axis], new[axis])
            for bound, axis in zip(bounds, axes, strict=True)
        ]
        refit.write_(node, position, fitted)


def _scaled(node: onnx.NodeProto, part: int, old: int, new: int) -> int:
    """Scale an equal part of an axis with the axis."""
    if part * new % old:
        raise UnfitError(f"{node.name}: {part} of {old} is not a whole number of {new}")
    return part * new // old


def _fit_conv(refit: Refit, node: onnx.NodeProto) -> None:
    """The number of groups: channels / channels of one group, which is the second axis of the weight."""
    channels, weight = refit.new.shape(node.input[0])[1], refit.new.shape(node.input[1])
    _set_groups(node, channels // weight[1])


def _fit_conv_transpose(refit: Refit, node: onnx.NodeProto) -> None:
    """The number of groups of a transposed convolution, whose weight does not show it: whole groups are removed, or
    none."""
    old, new = refit.dense.shape(node.input[1]), refit.new.shape(node.input[1])
    groups = attribute(node, "group", 1)
    per_group = old[0] // groups
    sizes = refit.sizes(node.name)
    _set_groups(node, sizes.get(groups, groups) if per_group > 1 else new[0])


def _set_groups(node: onnx.NodeProto, groups: int) -> None:
    next(a for a in node.attribute if a.name == "group").i = groups


def _fit_instance_norm(refit: Refit, node: onnx.NodeProto) -> None:
    """Resize scale and offset: a GroupNorm is exported as one over its groups, with ones and zeros."""
    channels = refit.new.shape(node.input[0])[1]
    for position in (1, 2):
        weight = refit.constants.get(node.input[position])
        if weight is not None and weight.dims[0] != channels:
            node.input[position] = refit.resize(numpy_helper.to_array(weight), channels, node)


_RULES: dict[str, Callable[[Refit, onnx.NodeProto], None]] = {
    "Reshape": _fit_reshape,
    "Expand": _fit_expand,
    "Resize": _fit_resize,
    "Split": _fit_split,
    "Slice": _fit_slice,
    "Conv": _fit_conv,
    "ConvTranspose": _fit_conv_transpose,
    "InstanceNormalization": _fit_instance_norm,
}
