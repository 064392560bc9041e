"""What an ONNX file makes onnxruntime hold on the CPU: its weights, and its activations where most of them are held.

The graph is read and its shapes are inferred, nothing is run: milliseconds. Activations lie where onnxruntime's
allocation planner puts them: views and outputs in place of an input share its memory, and memory that is free again
goes to the next tensor of the same shape. Scratch memory within an operator is not counted.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from deploypipe.errors import ModelError
from deploypipe.untrusted_files.onnx_file_check import ELEMENT_BITS, check_onnx_file

_FLOAT, _HALVES = onnx.TensorProto.FLOAT, (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_NUM_SHAPE_VALUES = 64  # elements of a weight that shapes may be computed from: axes, sizes, scales
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "QuantizeLinear", "DequantizeLinear"})
# Either onnxruntime lets the output take the place of an input, or it makes one operator of this and the one before.
_ARITHMETIC = frozenset({"Add", "BatchNormalization", "Cast", "Div", "Mul", "Neg", "Sub"})
_ACTIVATION = frozenset({"Clip", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Relu", "Sigmoid", "Tanh"})
_IN_PLACE = _ARITHMETIC | _ACTIVATION
_VANISHING = frozenset({"Relu", "Clip"})  # into the range of the QuantizeLinear behind them


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a file makes its runtime hold, at one batch size."""

    weight_bytes: int
    activation_bytes: int


def footprint(path: Path, batch_size: int, dynamic: Mapping[str, int] | None = None) -> Footprint:
    """Bytes of weights and of activations of an ONNX file, which is not run; weights in files beside it are not read.

    dynamic: sizes of axes other than the batch, by their names. Constants count as weights; inputs, which the caller
    holds, not at all. Half precision is counted in 32 bits, since onnxruntime computes it so on the CPU; and what an
    operator between DequantizeLinear and QuantizeLinear reads and writes in 8. Operators are taken in the file's order.
    ModelError where a shape stays unknown, or an operator has graphs within it.
    """
    check_onnx_file(path)
    proto = onnx.load(path, load_external_data=False)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    graph = proto.graph
    _refuse_control_flow(graph.node, path)
    weights = _weight_bytes(graph)
    _bind([value for value in graph.input if value.name not in weights], batch_size, dynamic or {}, path)
    tensors = _with_8_bits(graph, _activations(proto, path))
    outputs = {value.name for value in graph.output}
    return Footprint(
        weight_bytes=sum(weights.values()), activation_bytes=peak_bytes(_steps(graph.node), tensors, outputs)
    )


# --- which memory an activation lies in ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTensor:
    shape: tuple[int, ...]
    bits: int  # of one element

    @property
    def num_bytes(self) -> int:
        return -(-prod(self.shape) * self.bits // 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One operator, by the names of tensors. What it reads and writes is held while it runs."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    is_view: bool = False  # the first output is the first input's memory, where both are as large
    is_in_place: bool = False  # the first output takes the memory of an input as large that is not read later


@dataclass(slots=True)
class _Buffer:
    """Memory that tensors take one after the other. It is held from the first to the last of them."""

    num_bytes: int
    born: int  # the step that writes it first
    until: int  # the last step that reads it, as far as is known


def peak_bytes(steps: Sequence[Step], tensors: Mapping[str, GraphTensor], kept: Collection[str]) -> int:
    """The most bytes held during any of `steps`, done in order.

    tensors: what is written; what is not in it takes no memory. kept: held to the end. A buffer that is free again is
    taken, last freed first, by the next tensor of its shape, and held in between (onnxruntime's allocation planner).
    """
    last = {name: i for i, step in enumerate(steps) for name in (*step.writes, *step.reads)}
    last |= {name: len(steps) for name in kept}
    homes: dict[str, _Buffer] = {}
    pools: dict[GraphTensor, list[_Buffer]] = {}
    for i, step in enumerate(steps):
        for position, name in enumerate(step.writes):
            if name not in tensors:
                continue
            pool = pools.setdefault(tensors[name], [])
            buffer = _shared(step, i, tensors, homes) if position == 0 else None
            buffer = buffer or max((b for b in pool if b.until < i), key=lambda b: b.until, default=None)
            if buffer is None:
                buffer = _Buffer(num_bytes=tensors[name].num_bytes, born=i, until=i)
                pool.append(buffer)
            buffer.until = max(buffer.until, last[name])
            homes[name] = buffer
    changes = [0] * (len(steps) + 2)
    for buffer in (buffer for pool in pools.values() for buffer in pool):
        changes[buffer.born] += buffer.num_bytes
        changes[buffer.until + 1] -= buffer.num_bytes
    return max(accumulate(changes))


def _shared(step: Step, i: int, tensors: Mapping[str, GraphTensor], homes: Mapping[str, _Buffer]) -> _Buffer | None:
    """An input's buffer that the first output of step `i` lies in too."""
    size = tensors[step.writes[0]].num_bytes
    fitting = [(name, homes[name]) for name in step.reads if name in homes and tensors[name].num_bytes == size]
    if step.is_view and fitting and fitting[0][0] == step.reads[0]:
        return fitting[0][1]
    return next((buffer for _, buffer in fitting if buffer.until == i), None) if step.is_in_place else None


# --- what a graph holds ----------------------------------------------------------------------------------------------


def _refuse_control_flow(nodes: Iterable[onnx.NodeProto], path: Path) -> None:
    for node in nodes:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise ModelError(
                f"{path}: {node.op_type} {node.name!r} holds graphs of its own, and what they take depends on values; "
                "measure this file's memory"
            )


def _weight_bytes(graph: onnx.GraphProto) -> dict[str, int]:
    """By tensor. A sparse one counts as the dense one that onnxruntime makes of it."""
    found = {tensor.name: _tensor(tensor.dims, tensor.data_type).num_bytes for tensor in graph.initializer}
    for sparse in graph.sparse_initializer:
        found[sparse.values.name] = _tensor(sparse.dims, sparse.values.data_type).num_bytes
    for node in graph.node:
        if node.op_type == "Constant":
            held = [a.t for a in node.attribute if a.HasField("t")]  # none: a few numbers
            found[node.output[0]] = sum(_tensor(t.dims, t.data_type).num_bytes for t in held)
    return found


def _tensor(dims: Iterable[int], data_type: int) -> GraphTensor:
    return GraphTensor(shape=tuple(dims), bits=ELEMENT_BITS[_FLOAT if data_type in _HALVES else data_type])


def _bind(inputs: Sequence[onnx.ValueInfoProto], batch_size: int, dynamic: Mapping[str, int], path: Path) -> None:
    """Give every axis of the inputs its size."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inputs}
    sizes = {**dynamic, **{dims[0].dim_param: batch_size for dims in shapes.values() if dims and dims[0].dim_param}}
    for name, dims in shapes.items():
        for axis, dim in enumerate(dims):
            if axis == 0 and dim.HasField("dim_value") and dim.dim_value != batch_size:
                raise ModelError(
                    f"{path}: input {name!r} takes batches of {dim.dim_value}, not {batch_size}; "
                    "export it for any batch size"
                )
            if dim.HasField("dim_value"):
                continue
            if axis > 0 and dim.dim_param not in sizes:
                raise ModelError(
                    f"{path}: axis {axis} of input {name!r} has any size, and none is given for "
                    f"{dim.dim_param!r}; give one in `dynamic`"
                )
            dim.dim_value = batch_size if axis == 0 else sizes[dim.dim_param]


def _activations(proto: onnx.ModelProto, path: Path) -> dict[str, GraphTensor]:
    """Everything that a node writes. Takes from `proto` what does not matter to shapes."""
    graph = proto.graph
    del graph.value_info[:]  # in terms of the dynamic axes
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for weight in graph.initializer:
        if prod(weight.dims) > _NUM_SHAPE_VALUES:
            weight.ClearField("raw_data")  # it would be copied twice
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(
            f"{path}: its shapes do not fit together ({' '.join(str(error).split())[:300]}); export the model again"
        ) from error
    typed = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.output)}
    return {
        name: _known(typed.get(name), f"{path}: {node.op_type} {node.name!r}")
        for node in graph.node
        for name in node.output
        if name and node.op_type != "Constant"
    }


def _known(inferred: Any, writer: str) -> GraphTensor:
    dims = inferred.shape.dim if inferred is not None and inferred.HasField("shape") else None
    if dims is None or not inferred.elem_type or not all(dim.HasField("dim_value") for dim in dims):
        raise ModelError(f"{writer} writes a tensor of unknown shape; measure this file's memory")
    return _tensor((dim.dim_value for dim in dims), inferred.elem_type)


def _steps(nodes: Iterable[onnx.NodeProto]) -> list[Step]:
    return [
        Step(
            reads=tuple(name for name in node.input if name),
            writes=tuple(name for name in node.output if name),
            is_view=node.op_type in _VIEWS,
            is_in_place=node.op_type in _IN_PLACE,
        )
        for node in nodes
        if node.op_type != "Constant"
    ]


def _with_8_bits(graph: onnx.GraphProto, tensors: Mapping[str, GraphTensor]) -> dict[str, GraphTensor]:
    """`tensors` once onnxruntime has made one operator of DequantizeLinear, operator, QuantizeLinear.

    What goes to QuantizeLinear is then written in 8 bits, and what comes from DequantizeLinear to such an operator is
    read in 8 bits. What DequantizeLinear would make of a weight is never made.
    """
    readers: dict[str, list[onnx.NodeProto]] = {value.name: [onnx.NodeProto()] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    fused: dict[str, GraphTensor] = {}
    for node in reversed(graph.node):
        written = [_written_in_8_bits(reader, fused, tensors) for reader in readers.get(node.output[0], ())]
        if written and written[0] and None not in written:
            fused[node.output[0]] = written[0]
    eight_bit_operators = set(fused)
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            of = readers.get(node.output[0], [])
            if all(reader.output and reader.output[0] in eight_bit_operators for reader in of):
                fused[node.output[0]] = tensors[node.input[0]]
    weights = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in tensors}
    return {name: fused.get(name, tensor) for name, tensor in tensors.items() if name not in weights}


def _written_in_8_bits(
    reader: onnx.NodeProto, fused: Mapping[str, GraphTensor], tensors: Mapping[str, GraphTensor]
) -> GraphTensor | None:
    """What `reader` writes, where whatever it reads is made to write just that."""
    if reader.op_type == "QuantizeLinear":
        return tensors[reader.output[0]]
    return fused.get(reader.output[0]) if reader.op_type in _VANISHING else None
