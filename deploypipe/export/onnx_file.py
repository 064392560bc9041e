"""A network to one self-contained ONNX file with a dynamic batch, checked against the network before it is kept."""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from deploypipe.errors import DataError, ModelError
from deploypipe.export.parity import measure_parity, require_parity
from deploypipe.recipe import Export
from deploypipe.records import ModelFile
from deploypipe.runs import file_sha256
from deploypipe.runtimes import Array
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.runtimes.packing import name_outputs
from deploypipe.task import Batch, forward, num_samples, take, tensors

_MAX_BYTES = 1_900_000_000  # one protobuf file ends at 2 GiB
_MIN_TRACED_BATCH = 2  # torch.export takes a batch of one for a constant


def export_onnx(model: nn.Module, batches: Sequence[Batch], path: Path, settings: Export) -> ModelFile:
    """Write `model` to `path` and return what was written; `ModelFile.path` is the file's name alone.

    `batches` are (inputs, target) with axis 0 of every input the batch; all of them are used to compare the file with
    the network, at their own batch sizes and at one. The file holds the weights, takes any batch size and names no
    source files; outputs are named as in `runtimes.packing`. The network is left as it was, on its own device.

    Raises DataError without batches, ModelError where the network cannot be exported, ParityError where the file does
    not compute what the network computes. Whatever is raised, nothing is left at `path` that was not there before.
    """
    if not batches:
        raise DataError("export needs at least one batch to compare the file with the network; none was given")
    network = _copy_for_export(model)
    inputs = [_to_cpu(batch) for batch, _ in batches]
    names, expected = _run_eager(network, inputs)
    proto = _to_proto(network, inputs[0], names, settings)
    _strip(proto)
    inputs.append(take(inputs[0], 1))
    expected.append(_run_single(network, inputs[-1]))
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        part = Path(scratch) / path.name
        part.write_bytes(proto.SerializeToString(deterministic=True))
        with OnnxRuntime().open(part, num_threads=torch.get_num_threads()) as session:
            parity = measure_parity(session, inputs, expected)
            input_names, output_names = session.input_names, session.output_names
        require_parity(parity, settings.max_abs_error, path)
        part.replace(path)
    return ModelFile(
        path=path.name,
        sha256=file_sha256(path),
        size_bytes=path.stat().st_size,
        precision="fp32",
        opset=next(o.version for o in proto.opset_import if o.domain == ""),
        max_abs_error=parity.max_abs_error,
        input_names=input_names,
        output_names=output_names,
    )


def _copy_for_export(model: nn.Module) -> nn.Module:
    """An eval-mode copy on the CPU in contiguous layout, so that nothing has to be put back."""
    values = [*model.parameters(), *model.buffers()]
    odd = {str(v.dtype) for v in values if v.is_floating_point() and v.dtype != torch.float32}
    if odd:
        raise ModelError(f"the network holds {', '.join(sorted(odd))}; this version exports fp32: call model.float()")
    size = sum(v.numel() * v.element_size() for v in values)
    if size > _MAX_BYTES:
        raise ModelError(
            f"the network's weights take {size / 1e9:.2f} GB and one ONNX file holds {_MAX_BYTES / 1e9} GB; "
            "ask for a smaller network with budget.params"
        )
    network = copy.deepcopy(model).cpu().eval()
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # missing in torch's stubs
    return network


def _to_cpu(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: tensor.cpu().contiguous() for name, tensor in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(tensor.cpu().contiguous() for tensor in inputs)
    return inputs.cpu().contiguous()


def _run_eager(network: nn.Module, inputs: Sequence[Any]) -> tuple[list[str], list[list[Array]]]:
    """The outputs' names, and `outputs[batch][output]`."""
    with torch.no_grad():
        outputs = [name_outputs(forward(network, batch)) for batch in inputs]
    return list(outputs[0]), [[tensor.numpy() for tensor in named.values()] for named in outputs]


def _run_single(network: nn.Module, sample: Any) -> list[Array]:
    """The outputs for one sample: what torch.export lets pass may still hold the batch size of the example."""
    try:
        return _run_eager(network, [sample])[1][0]
    except RuntimeError as error:  # what torch raises for shapes that do not fit
        raise ModelError(
            f"{type(network).__name__} cannot be exported: it fails on a batch of one sample ({_root_cause(error)}); "
            "forward() must take any batch size"
        ) from error


def _to_proto(network: nn.Module, inputs: Any, names: list[str], settings: Export) -> onnx.ModelProto:
    example = _at_least(inputs, _MIN_TRACED_BATCH)
    batch_axis = {0: torch.export.Dim("batch")}
    if isinstance(example, dict):
        args: tuple[Tensor, ...] = ()
        kwargs: dict[str, Tensor] = example
        shapes: Any = {name: batch_axis for name in kwargs}
    else:
        args, kwargs = tuple(tensors(example)), {}
        shapes = tuple(batch_axis for _ in args)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                args,
                None,
                kwargs=kwargs,
                dynamic_shapes=shapes,
                output_names=names,
                opset_version=settings.opset,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            proto: onnx.ModelProto = program.model_proto  # type: ignore[union-attr]
        onnx.checker.check_model(proto, full_check=True)
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(
            f"{type(network).__name__} cannot be exported: {_root_cause(error)}; forward() must be traceable by "
            "torch.export, with any batch size (no shape written as a constant, no branch on values)"
        ) from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"{type(network).__name__} was exported to an invalid ONNX graph: {error}") from error
    return proto


def _at_least(inputs: Any, count: int) -> Any:
    """A batch of `count` samples or more, by repeating."""
    size = num_samples(inputs)
    if size >= count:
        return inputs
    if size == 0:
        raise DataError("the first batch is empty; batches need one sample or more")
    repeats = -(-count // size)
    if isinstance(inputs, dict):
        return {name: torch.cat([tensor] * repeats) for name, tensor in inputs.items()}
    repeated = tuple(torch.cat([tensor] * repeats) for tensor in tensors(inputs))
    return repeated if isinstance(inputs, tuple) else repeated[0]


def _root_cause(error: BaseException) -> str:
    """The message of the innermost cause, on one line and of readable length."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what the exporter notes about the source: stack traces, file paths, class names."""
    proto.ClearField("doc_string")
    del proto.metadata_props[:]
    _strip_graph(proto.graph)
    for function in proto.functions:
        function.ClearField("doc_string")
        del function.metadata_props[:]
        del function.value_info[:]
        for node in function.node:
            _strip_node(node)


def _strip_graph(graph: onnx.GraphProto) -> None:
    for holder in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        holder.ClearField("doc_string")
        del holder.metadata_props[:]
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: onnx.NodeProto) -> None:
    node.ClearField("doc_string")
    del node.metadata_props[:]
    for attribute in node.attribute:
        attribute.ClearField("doc_string")
        graphs = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        for graph in graphs:
            _strip_graph(graph)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, log lines or printed graphs of the exporter; what matters of them is in the error it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
