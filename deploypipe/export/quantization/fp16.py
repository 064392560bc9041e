"""Convert an fp32 ONNX file to half precision, except for the nodes whose measured error is too large.

Errors are those of an emulation in float32: a graph that rounds every half-precision tensor where it is computed. The
converted file itself would not show them on a CPU. onnxruntime computes it in float32 and drops the casts between its
nodes, so a product of 1e6, infinite on a GPU, goes unnoticed.

The conversion is our own, since onnxruntime.transformers.float16 (1.31) passes tensors between float nodes through half
precision, and makes invalid graphs of nodes kept float inside an If. Control flow stays float here.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from deploypipe.errors import ParityError
from deploypipe.export.quantization.run_and_compare_graphs import (
    FLOAT,
    HALF,
    Feed,
    compare_graph,
    copy_of,
    feeds_of,
    fewest,
    load_float,
    opset_of,
    place,
    read_tensors,
    run_file,
    subgraphs,
    take_feeds,
    types_of,
    write,
)
from deploypipe.files.atomic import scratch_folder
from deploypipe.recipe import Export
from deploypipe.records import Converted, FloatLayer
from deploypipe.runtimes import Array
from deploypipe.task import Batch

_NUM_SAMPLES = 64  # that errors are measured on
_HALF, _ROUGH, _OWN = ".half", ".rough", ".own"  # what is appended to tensors' names
_LARGEST = float(np.finfo(np.float16).max)


def to_fp16(source: Path, out: Path, batches: Iterable[Batch], settings: Export) -> Converted:
    """Write `source`, an fp32 file, to `out` in half precision; its inputs and outputs stay fp32.

    Nodes stay float if ONNX has no half precision for them. Others stay float in the order of their own errors, as few
    as are needed to keep the outputs within `settings.max_abs_error_fp16` of the fp32 file's. The same inputs give the
    same bytes.

    Raises ModelError for a file that is broken or of another precision, DataError for samples that do not fit it,
    ParityError if nothing can be half. After an error, nothing is left at `out` that was not there before.
    """
    started = time.perf_counter()
    proto = load_float(source)
    inputs = take_feeds(feeds_of(batches, proto), _NUM_SAMPLES)
    expected = run_file(source, inputs)
    types, opset = types_of(proto.graph), opset_of(proto)
    kinds = {node.name: _kind_of(node, types, opset) for node in proto.graph.node}
    nodes = [name for name, kind in kinds.items() if kind.inputs]
    limit = settings.max_abs_error_fp16

    def holds(kept: frozenset[str]) -> bool:
        graph = _convert(proto, kinds, kept, is_emulated=True)
        return compare_graph(graph, inputs, expected, source).max_abs_error <= limit

    kept: frozenset[str] = frozenset()
    reasons: dict[str, str] = {}
    if not holds(kept):
        errors = _own_errors(proto, kinds, nodes, inputs, source)
        kept = fewest(sorted(nodes, key=lambda name: -errors[name]), holds)
        reasons = {name: f"error {errors[name]:.3g} of its own output in half precision" for name in kept}
    if len(kept) == len(nodes):
        raise ParityError(
            f"{source}: no node of it can be in half precision with an error of {limit:.3g} or less; "
            "use fp32, or raise export.max_abs_error_fp16"
        )
    emulated = _convert(proto, kinds, kept, is_emulated=True)
    parity = compare_graph(emulated, inputs, expected, source)
    converted = _convert(proto, kinds, kept, is_emulated=False)
    with scratch_folder(out) as scratch:
        part = scratch / out.name
        write(converted, part, "fp16")
        # Check that it loads and runs, node by node. Its outputs on a CPU prove nothing.
        compare_graph(converted, inputs, expected, source)
        file = place(part, out, converted, "fp16", parity)
    unsupported = {name: kind.why_not for name, kind in kinds.items() if kind.why_not}
    return Converted(
        file=file,
        num_layers=len(nodes) + len(unsupported),
        num_converted=len(nodes) - len(kept),
        kept_float=tuple(
            FloatLayer(layer=name, reason=reason)
            for name in kinds
            if (reason := reasons.get(name, unsupported.get(name, "")))
        ),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """The inputs that a node can read in half precision, and the outputs that it then writes in half precision."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    why_not: str = ""  # for a node that computes with floats and has no half precision


def _kind_of(node: onnx.NodeProto, types: Mapping[str, int], opset: int) -> _Kind:
    floats = [i for i, name in enumerate(node.input) if types.get(name) == FLOAT]
    if subgraphs(node):
        return _Kind(why_not=f"{node.op_type}: its subgraphs stay float")
    if not floats:
        return _Kind()
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return _Kind(why_not=f"{node.op_type} is not an operator of ONNX, so its types are not known")
    allowed = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}

    inputs = tuple(i for i in floats if _type_name(schema.inputs, i) in allowed)
    bound = {_type_name(schema.inputs, i) for i in inputs}
    outputs = tuple(
        i for i, name in enumerate(node.output) if types.get(name) == FLOAT and _type_name(schema.outputs, i) in bound
    )
    return _Kind(
        inputs=inputs, outputs=outputs, why_not="" if inputs else f"{node.op_type} has no half precision in ONNX"
    )


def _type_name(parameters: Any, i: int) -> str:
    """The type of an operator's i-th input or output; the last parameter may be variadic."""
    return str(parameters[min(i, len(parameters) - 1)].type_str)


def _convert(
    proto: onnx.ModelProto, kinds: Mapping[str, _Kind], kept: frozenset[str], *, is_emulated: bool
) -> onnx.ModelProto:
    """Convert all nodes but `kept` to half precision; a tensor's half-precision version is `NAME.half`.

    is_emulated: return a float32 graph whose tensors `NAME.half` are rounded to half precision.
    """
    converted = copy_of(proto)
    graph = converted.graph
    weights = {weight.name: weight for weight in proto.graph.initializer}
    needed = _float_readers(proto, kinds, kept)
    halves: set[str] = set()
    nodes: list[onnx.NodeProto] = []

    def as_half(name: str) -> str:
        half = name + _HALF
        if half in halves:
            return half
        halves.add(half)
        if name in weights:
            graph.initializer.append(_half_weight(weights[name], half, is_emulated))
        else:
            nodes.extend(_rounded(name, half) if is_emulated else [_cast(name, half, HALF)])
        return half

    for node in converted.graph.node:
        kind = kinds[node.name]
        if not kind.inputs or node.name in kept:
            nodes.append(node)
            continue
        for i in kind.inputs:
            node.input[i] = as_half(node.input[i])
        nodes.append(node)
        for i in kind.outputs:
            name = node.output[i]
            half = name + _HALF
            halves.add(half)
            node.output[i] = half + _ROUGH if is_emulated else half
            if is_emulated:
                nodes.extend(_rounded(node.output[i], half))
            if name in needed:
                nodes.append(_cast(half, name, FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    _drop_unread(graph, needed)
    return converted


def _drop_unread(graph: onnx.GraphProto, needed: set[str]) -> None:
    """Remove the weights that nothing reads. needed: tensors that subgraphs or the graph's outputs read."""
    read = needed | {name for node in graph.node for name in node.input}
    for weight in [weight for weight in graph.initializer if weight.name not in read]:
        graph.initializer.remove(weight)


def _float_readers(proto: onnx.ModelProto, kinds: Mapping[str, _Kind], kept: frozenset[str]) -> set[str]:
    """The tensors that are read in float: by a node that stays float, by a subgraph, or as the graph's outputs."""
    needed = {value.name for value in proto.graph.output}
    for node in proto.graph.node:
        as_half = () if node.name in kept else kinds[node.name].inputs
        needed |= {name for i, name in enumerate(node.input) if i not in as_half}
        for inner in subgraphs(node):
            needed |= _names_read(inner)
    return needed


def _names_read(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in graph.output}
    for node in graph.node:
        names |= set(node.input)
        for inner in subgraphs(node):
            names |= _names_read(inner)
    return names


def _half_weight(weight: onnx.TensorProto, name: str, is_emulated: bool) -> onnx.TensorProto:
    """The weight rounded to half precision; finite values that are too large become the largest one."""
    values: Array = numpy_helper.to_array(weight)
    within = np.where(np.isfinite(values), np.clip(values, -_LARGEST, _LARGEST), values).astype(np.float16)
    return numpy_helper.from_array(within.astype(np.float32) if is_emulated else within, name)


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=to)


def _rounded(source: str, target: str) -> list[onnx.NodeProto]:
    """Two nodes that cast float to half precision and back."""
    between = f"{target}.16"
    return [_cast(source, between, HALF), _cast(between, target, FLOAT)]


def _own_errors(
    proto: onnx.ModelProto, kinds: Mapping[str, _Kind], names: Sequence[str], inputs: Sequence[Feed], path: Path
) -> dict[str, float]:
    """By node: the largest error of its outputs, relative to their largest magnitude, if it alone is in half precision.

    All in one pass: next to each node of the float graph runs a twin that reads the same tensors rounded.
    """
    probe = copy_of(proto)
    weights = {weight.name: weight for weight in proto.graph.initializer}
    rounded: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    pairs: dict[str, list[tuple[str, str]]] = {}
    for node in proto.graph.node:
        nodes.append(node)
        if node.name not in names:
            continue
        kind = kinds[node.name]
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name += _ROUGH
        for i in kind.inputs:
            name = node.input[i]
            twin.input[i] = name + _HALF
            if name in rounded:
                continue
            rounded.add(name)
            if name in weights:
                probe.graph.initializer.append(_half_weight(weights[name], twin.input[i], is_emulated=True))
            else:
                nodes.extend(_rounded(name, twin.input[i]))
        twin.output[:] = [name and name + _ROUGH for name in node.output]
        nodes.append(twin)
        for i in kind.outputs:
            nodes.extend(_rounded(twin.output[i], node.output[i] + _OWN))
        pairs[node.name] = [
            (name, name + (_OWN if i in kind.outputs else _ROUGH)) for i, name in enumerate(node.output) if name
        ]
    del probe.graph.node[:]
    probe.graph.node.extend(nodes)
    wanted = sorted({name for both in pairs.values() for pair in both for name in pair})
    errors = dict.fromkeys(names, 0.0)
    for arrays in read_tensors(probe, wanted, inputs, path):
        for node_name, both in pairs.items():
            found = [_relative_error(arrays[name], arrays[own]) for name, own in both]
            errors[node_name] = max(errors[node_name], *found)
    return errors


def _relative_error(want: Array, got: Array) -> float:
    """The relative error; for values other than floats, the share that differs."""
    differs = want != got
    if want.dtype.kind != "f":
        return float(differs.mean()) if differs.size else 0.0
    apart = np.abs(np.where(differs, want.astype(np.float64) - got, 0.0))
    if not np.isfinite(got[np.isfinite(want)]).all():
        return float("inf")
    finite = np.abs(want[np.isfinite(want)])
    return float(apart.max(initial=0, where=np.isfinite(apart)) / (finite.max(initial=0) or 1.0))
