"""Shared steps of the conversions to fp16 and int8: load a plain graph, run it, and compare a candidate's outputs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import torch

from deploypipe.errors import DataError, ModelError
from deploypipe.export.onnx_graphs.file_metadata import PREFIX
from deploypipe.export.onnx_graphs.fold_constants import CANNOT_RUN, first_line, folded, open_graph, session_options
from deploypipe.files.hashing import file_sha256
from deploypipe.numerics.output_differences import difference
from deploypipe.records import ModelFile, Parity
from deploypipe.runtimes import Array
from deploypipe.runtimes.named_arrays import feed
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.task import Batch, batch_size_of
from deploypipe.untrusted_files.onnx_file_check import size_with_data

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
Feed = dict[str, Array]
Outputs = list[list[Array]]  # outputs[batch][output]

_MAX_BYTES = 1_900_000_000  # one protobuf message ends at 2 GiB
_MAX_BYTES_AT_ONCE = 256 * 2**20  # of inner tensors


def load_float(path: Path) -> onnx.ModelProto:
    """Load the file's graph in a plain form that computes the same.

    Constants and batch norms are folded, functions inlined, every node has a unique name, and every tensor's type is
    known. ModelError if the file is absent, broken, or already in another precision.
    """
    size = size_with_data(path)
    if size > _MAX_BYTES:
        raise ModelError(
            f"{path}: takes {size / 1e9:.2f} GB, and a graph to convert may take {_MAX_BYTES / 1e9} GB; "
            "ship fp32, or ask for a smaller network with budget.params"
        )
    try:
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
        proto = onnx.inliner.inline_local_functions(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"{path}: not a valid ONNX file ({first_line(error)}); export the model again") from error
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node):
        raise ModelError(f"{path}: is quantised already; convert the fp32 file it was made from")
    if any(weight.data_type == HALF for weight in proto.graph.initializer):
        raise ModelError(f"{path}: holds half-precision weights already; convert the fp32 file it was made from")
    metadata = list(proto.metadata_props)
    _drop_weight_inputs(proto.graph)
    _name_nodes(proto.graph, set())
    proto = folded(proto, path)
    _name_nodes(proto.graph, set())  # folding makes nodes of its own
    proto = onnx.shape_inference.infer_shapes(proto)
    del proto.metadata_props[:]
    proto.metadata_props.extend(metadata)
    return proto


def _drop_weight_inputs(graph: onnx.GraphProto) -> None:
    """Remove weights from the inputs: old files list them there as defaults, which forbids folding and replacing."""
    weights = {weight.name for weight in graph.initializer}
    for value in [value for value in graph.input if value.name in weights]:
        graph.input.remove(value)


def _name_nodes(graph: onnx.GraphProto, taken: set[str]) -> None:
    for node in graph.node:
        base, number = node.name or node.op_type, 2
        node.name = base
        while node.name in taken:
            node.name, number = f"{base}_{number}", number + 1
        taken.add(node.name)
        for inner in subgraphs(node):
            _name_nodes(inner, taken)


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The branches or the body of a control flow node."""
    return [graph for a in node.attribute for graph in ([a.g] if a.HasField("g") else a.graphs)]


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that the graph uses."""
    return next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)


def types_of(graph: onnx.GraphProto) -> dict[str, int]:
    """The element type of every tensor of the graph whose type is known, but not of its nodes' subgraphs."""
    values = (*graph.input, *graph.output, *graph.value_info)
    types: dict[str, int] = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {weight.name: weight.data_type for weight in graph.initializer}


def copy_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    return other


def feeds_of(batches: Iterable[Batch], proto: onnx.ModelProto) -> list[Feed]:
    """The batches as named arrays; DataError if there is no sample, or an input is missing."""
    names = [value.name for value in proto.graph.input]
    inputs = [feed(inputs, names) for inputs, _ in batches]
    if num_samples_of(inputs) == 0:
        raise DataError("no samples to convert the file with; return batches as `calib` from load_data()")
    return inputs


def take_feeds(inputs: Sequence[Feed], count: int, start: int = 0) -> list[Feed]:
    """The `count` samples from `start` on, in their own batches; fewer if there are fewer."""
    taken, seen = [], 0
    for batch in inputs:
        size = num_samples_of([batch])
        first, last = max(start - seen, 0), min(start + count - seen, size)
        if first < last:
            taken.append(
                {
                    name: a[first:last] if a.ndim and len(a) == size else a for name, a in batch.items()
                }  # see num_samples
            )
        seen += size
    return taken


def num_samples_of(inputs: Sequence[Feed]) -> int:
    return sum(batch_size_of([array.shape for array in batch.values()]) or 0 for batch in inputs)


def run_file(path: Path, inputs: Sequence[Feed]) -> Outputs:
    """Run a file on the CPU, in onnxruntime; DataError if the inputs do not fit, or the outputs are not finite."""
    with OnnxRuntime().open(path, num_threads=torch.get_num_threads()) as session:
        outputs = [session.run(batch) for batch in inputs]
        names = session.output_names
    for arrays in outputs:
        for name, array in zip(names, arrays, strict=True):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise DataError(f"{path}: output {name!r} holds NaN or infinity on these samples; check the inputs")
    return outputs


def compare_file(path: Path, inputs: Sequence[Feed], expected: Outputs, *, is_plain: bool = False) -> Parity:
    """Compare a candidate's outputs with `expected`; errors are NaN if the outputs are not finite.

    is_plain: compute in float between the roundings, not with this machine's 8-bit kernels.
    """
    with OnnxRuntime(is_plain=is_plain).open(path, num_threads=torch.get_num_threads()) as session:
        return _difference(expected, [session.run(batch) for batch in inputs])


def compare_graph(proto: onnx.ModelProto, inputs: Sequence[Feed], expected: Outputs, path: Path) -> Parity:
    """As `compare_file`, without any optimisation of the graph. Errors name `path`, which the graph was made from."""
    session = open_graph(proto, session_options(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL), path)
    return _difference(expected, [_run(session, None, batch, path) for batch in inputs])


def _difference(expected: Outputs, seen: Outputs) -> Parity:
    with np.errstate(invalid="ignore", over="ignore"):  # candidates may be infinite; the figures show it
        return difference(expected, seen)


def read_tensors(
    proto: onnx.ModelProto, names: Sequence[str], inputs: Sequence[Feed], path: Path
) -> Iterator[dict[str, Array]]:
    """Read inner tensors of the graph by name, a few samples at a time: as many as fit into 256 MiB."""
    typed = {value.name: value for value in (*proto.graph.value_info, *proto.graph.input)}
    probe = copy_of(proto)
    present = {value.name for value in proto.graph.output}
    probe.graph.output.extend(typed.get(n, onnx.ValueInfoProto(name=n)) for n in names if n not in present)
    session = open_graph(probe, session_options(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL), path)
    at_once = 1
    for batch in inputs:
        start = 0
        while start < num_samples_of([batch]):
            part = {name: array[start : start + at_once] for name, array in batch.items()}
            arrays = dict(zip(names, _run(session, list(names), part, path), strict=True))
            yield arrays
            start += at_once
            num_bytes = sum(array.nbytes for array in arrays.values()) // num_samples_of([part])
            at_once = max(1, _MAX_BYTES_AT_ONCE // max(1, num_bytes))


def _run(session: Any, names: list[str] | None, inputs: Feed, path: Path) -> list[Array]:
    try:
        return list(session.run(names, inputs))
    except (*CANNOT_RUN, ValueError) as error:
        seen = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in inputs.items())
        raise DataError(f"{path}: cannot run on {seen} ({first_line(error)}); give batches of its inputs") from error


def fewest(order: Sequence[str], holds: Callable[[frozenset[str]], bool]) -> frozenset[str]:
    """The shortest prefix of `order` for which `holds` is true; all of `order` if there is none.

    By bisection: `holds` is called about log2(len(order)) times, and should not become false for longer prefixes.
    """
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if holds(frozenset(order[:middle])):
            high = middle
        else:
            low = middle + 1
    return frozenset(order[:high])


def write(proto: onnx.ModelProto, path: Path, precision: str) -> None:
    """Write the graph to a file with its precision in the metadata. The same graph gives the same bytes."""
    final = copy_of(proto)
    del final.graph.value_info[:]
    metadata = {entry.key: entry.value for entry in final.metadata_props} | {f"{PREFIX}precision": precision}
    del final.metadata_props[:]
    onnx.helper.set_model_props(final, dict(sorted(metadata.items())))
    path.write_bytes(final.SerializeToString(deterministic=True))


def place(part: Path, out: Path, proto: onnx.ModelProto, precision: str, parity: Parity) -> ModelFile:
    """Move a finished file to `out`, and return its record. parity: against the fp32 file."""
    part.replace(out)
    return ModelFile(
        path=out.name,
        sha256=file_sha256(out),
        size_bytes=out.stat().st_size,
        precision=precision,
        opset=opset_of(proto),
        max_abs_error=parity.max_abs_error,
        input_names=tuple(i.name for i in proto.graph.input),
        output_names=tuple(o.name for o in proto.graph.output),
        parity=parity,
    )
