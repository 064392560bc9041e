"""Export a network to a self-contained ONNX file for any batch size, and compare the two before keeping the file."""

import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter, signature
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deploypipe.errors import ConfigError, DataError, ModelError, ParityError
from deploypipe.export.onnx_export.dynamic_axes import (
    Axes,
    choose_axes,
    free_axes,
    in_order,
    input_names,
    require_constants,
)
from deploypipe.export.onnx_export.export_template import without_weights, write_template
from deploypipe.export.onnx_export.forget_batch_sizes import forget_sizes_
from deploypipe.export.onnx_export.input_sizes import extremes_of, other_sizes, tested_sizes
from deploypipe.export.onnx_export.mismatch_bisection import Point, find_mismatch, module_outputs
from deploypipe.export.onnx_export.parity import limit_of, measure_parity, require_parity
from deploypipe.export.onnx_export.protect_padding import protect_padding
from deploypipe.export.onnx_graphs.file_metadata import describe, forget_shapes, name_nodes, strip
from deploypipe.export.onnx_graphs.fold_constants import folded
from deploypipe.files.atomic import scratch_folder
from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.files.hashing import file_sha256
from deploypipe.networks.batch_trees import constants_in_lists, map_tensors, tensors
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.recipe import Export
from deploypipe.records import FileEntry, ModelFile, Parity
from deploypipe.runtimes import Array
from deploypipe.runtimes.named_arrays import name_outputs
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.task import (
    Batch,
    as_arguments,
    forward,
    has_batch_axis,
    num_samples,
    repeat_samples,
    take,
    without_caches,
)
from deploypipe.untrusted_files.onnx_file_check import check_onnx_file

_MIN_TRACED = 2  # torch.export makes an axis of size one a constant
_PRECISION = "fp32"


def export_onnx(
    model: nn.Module,
    batches: Sequence[Batch],
    path: Path | str,
    settings: Export,
    *,
    origin: Mapping[str, str] | None = None,
    class_names: Sequence[str] = (),
    template: Path | str | None = None,
    other_inputs: Sequence[Any] | None = None,
) -> ModelFile:
    """Write `model` to `path` and return what was written; `ModelFile.path` is the file's name alone.

    batches: (inputs, target), with axis 0 of every input the batch. All of them are used to compare the file with the
    network: at their own sizes, at a batch of one, and at `other_inputs`. By default these are half and twice the size
    of each other dynamic axis, if the network accepts them. Tensors are inputs of the file, with or without a batch
    axis; numbers, flags, text and None are constants in it.

    The file takes any batch size and names no source files. It holds the weights; above `settings.single_file_mib` a
    second file next to it does. Nodes are named after their modules, outputs as in `runtimes.named_arrays`. `origin`
    (for example the plan's hash) and the class names are in its metadata as `deploypipe.KEY`. The network is left as it
    was, on its own device.

    template: where to write the graph that `graph_slicing` makes files of pruned networks from. It holds no weights.

    Raises DataError without batches; ModelError if the network cannot be exported; ConfigError if the recipe asks for
    axes or an opset that are not possible; ParityError, which names the first module that differs, if the file computes
    something else. After any error, nothing is left at `path` that was not there before.
    """
    model, path = unwrapped(model), Path(path)
    if not batches:
        raise DataError("export needs at least one batch to compare the file with the network; none was given")
    network = _copy_for_export(model, batches[0][0])
    inputs = [in_order(network, map_tensors(lambda t: t.cpu().contiguous(), batch)) for batch, _ in batches]
    if other_inputs is None:
        other_inputs = other_sizes(network, inputs[0], extremes_of(inputs), settings)
    others = [in_order(network, map_tensors(lambda t: t.cpu().contiguous(), each)) for each in other_inputs]
    require_constants([*inputs, *others])
    output_names, expected = run_eager(network, inputs)
    names = input_names(network, inputs[0])
    axes = choose_axes(names, [*inputs, *others], settings)
    forget_sizes_(network, [*(repeat_samples(network, take(inputs[0], 1), count) for count in (2, 3)), *others])
    with scratch_folder(path) as scratch:
        part = scratch / path.name
        is_single = fits_one_file(network, settings)
        program = _export(network, inputs[0], names, output_names, axes, settings)
        if template is not None:
            with _quiet():
                write_template(without_weights(program), program, output_names, Path(template))
        with _quiet():
            program.optimize()
        points = module_outputs(program.exported_program, network, output_names)
        proto = _write(program, part, is_single)
        del program
        name_nodes(proto)
        strip(proto)
        protect_padding(proto)
        if is_single:  # weights in a second file are not folded
            proto = folded(proto, path)
        forget_shapes(proto)
        describe(proto, precision=_PRECISION, origin=origin or {}, class_names=class_names)
        part.write_bytes(proto.SerializeToString(deterministic=True))
        _check(part, network)
        for each in (take(inputs[0], 1), *others):
            inputs.append(each)
            expected.append(_expected(network, each))
        taken_names, parity = _compare(network, inputs, expected, part, points, settings)
        data = tuple(_entry(part.parent / name) for name in check_onnx_file(part).data)
        _place(part, data, path)
    return ModelFile(
        path=path.name,
        sha256=file_sha256(path),
        size_bytes=path.stat().st_size + sum(entry.size_bytes for entry in data),
        precision=_PRECISION,
        opset=settings.opset,
        max_abs_error=parity.max_abs_error,
        input_names=taken_names,
        output_names=tuple(output_names),
        data=data,
        parity=parity,
        tested_sizes=tested_sizes(names, inputs, axes),
    )


def _copy_for_export(model: nn.Module, inputs: Any) -> nn.Module:
    """An eval-mode copy on the CPU in contiguous layout, so that the caller's network is not changed.

    inputs: any that it accepts, to see what it returns.
    """
    require_fp32(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size:
            raise ModelError(
                f"{name or 'the network'} is an nn.LSTM with proj_size={module.proj_size}, and ONNX's LSTM has no "
                "projection; use an LSTM without it, followed by an nn.Linear"
            )
    network = copied(model).cpu().eval()
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # missing in torch's stubs
    _leave_out_caches_(network, map_tensors(Tensor.cpu, inputs))
    return network


def _leave_out_caches_(network: nn.Module, inputs: Any) -> None:
    """Return no caches from forward(), as `task.forward` does: the exporter accepts no objects of other classes."""
    returned: list[Any] = []
    hook = network.register_forward_hook(lambda _, __, outputs: returned.append(outputs))
    with torch.no_grad():
        forward(network, inputs)
    hook.remove()
    if without_caches(returned[-1]) is returned[-1]:
        return
    plain = network.forward

    @wraps(plain)
    def without(*args: Any, **kwargs: Any) -> Any:
        return without_caches(plain(*args, **kwargs))

    network.forward = without


def require_fp32(model: nn.Module) -> None:
    """ModelError if weights or buffers have another precision."""
    values = [*model.parameters(), *model.buffers()]
    odd = {str(v.dtype) for v in values if v.is_floating_point() and v.dtype != torch.float32}
    if odd:
        raise ModelError(f"the network holds {', '.join(sorted(odd))}; this version exports fp32: call model.float()")


def fits_one_file(network: nn.Module, settings: Export) -> bool:
    """Whether the weights are written into the graph's own file; else into a second file next to it."""
    num_bytes = sum(v.numel() * v.element_size() for v in [*network.parameters(), *network.buffers()])
    return num_bytes <= settings.single_file_mib * 2**20


def run_eager(network: nn.Module, inputs: Sequence[Any]) -> tuple[list[str], list[list[Array]]]:
    """The outputs' names, and `outputs[batch][output]`."""
    with torch.no_grad():
        given = [forward(network, batch) for batch in inputs]
    for kind in {type(each) for each in given if is_dataclass(each)} - set(pytree.SUPPORTED_NODES):
        torch.export.register_dataclass(kind)  # the exporter accepts no others
    outputs = [name_outputs(each) for each in given]
    return list(outputs[0]), [[tensor.numpy() for tensor in named.values()] for named in outputs]


def _expected(network: nn.Module, inputs: Any) -> list[Array]:
    """The network's outputs at a size that the batches may not have.

    A network that torch.export accepts may still depend on the sizes of its example.
    """
    try:
        return run_eager(network, [inputs])[1][0]
    except Exception as error:  # forward() may raise anything on sizes it was not written for
        raise_if_exhausted(error)
        raise ModelError(
            f"{type(network).__name__} cannot be exported: it fails on inputs of shape {_shapes(inputs)} "
            f"({_root_cause(error)}); forward() must accept any batch size, and every size of a dynamic axis"
        ) from error


def _shapes(inputs: Any) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors(inputs))


def _export(
    network: nn.Module, inputs: Any, names: Sequence[str], output_names: list[str], axes: Axes, settings: Export
) -> Any:
    """The exporter's program, not optimised yet. ModelError if it fails, ConfigError if its opset is not the one asked
    for."""
    example = repeat_samples(network, inputs, _MIN_TRACED)
    batch = torch.export.Dim("batch")  # unlike a mere name, raises if the network binds it in any way
    args, kwargs = as_arguments(constants_in_lists(example))
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                args,
                None,
                kwargs=kwargs,
                input_names=list(names),
                dynamic_shapes=free_axes(names, kwargs or args, batch, axes),
                output_names=output_names,
                opset_version=settings.opset,
                dynamo=True,
                external_data=False,
                verbose=False,
                optimize=False,
            )
    except torch.onnx.OnnxExporterError as error:
        others = "".join(f", any {name}" for name in sorted({n for named in axes.values() for n in named.values()}))
        raise ModelError(
            f"{type(network).__name__} cannot be exported: {_root_cause(error)}; forward() must be traceable by "
            f"torch.export, with any batch size{others} (no shape written as a constant, no branch on values)"
            f"{_hint(network, inputs, error)}"
        ) from error
    assert program is not None  # it was asked for
    _require_free(without_weights(program), network, names, example, axes)
    written = program.model.opset_imports[""]
    if written != settings.opset:  # the exporter falls back silently
        raise ConfigError(
            "recipe",
            "export.opset",
            f"opset {settings.opset} cannot be written for {type(network).__name__}: torch {torch.__version__} and "
            f"onnx {onnx.__version__} write {written} instead",
            f"use export.opset = {max(written, 18)} to 23",
        )
    return program


def _hint(network: nn.Module, inputs: Any, error: BaseException) -> str:
    """A remedy, for constructs that are known not to be exportable."""
    if any("rnn.py" in line for line in traceback.format_exception(error)):
        return "; packed sequences cannot be exported: pass padded ones, and take each sequence's last step"
    kinds = [parameter.kind for parameter in signature(network.forward).parameters.values()]
    if isinstance(inputs, Mapping) and Parameter.VAR_KEYWORD in kinds:
        return "; name the arguments of forward() instead of **kwargs"
    return ""


def _require_free(proto: onnx.ModelProto, network: nn.Module, names: Sequence[str], example: Any, axes: Axes) -> None:
    """ModelError if an axis that must be free is a constant: for some networks the exporter falls back to that."""
    size = num_samples(example)
    free = {
        name: [*([0] if has_batch_axis(tensor, size) else []), *axes.get(name, {})]
        for name, tensor in zip(names, tensors(example), strict=True)
    }
    for value in proto.graph.input:
        for axis in free.get(value.name, []):
            dim = value.type.tensor_type.shape.dim[axis]
            if dim.HasField("dim_value"):
                raise ModelError(
                    f"{type(network).__name__} cannot be exported: forward() makes axis {axis} of {value.name!r} a "
                    f"constant, {dim.dim_value}; write x.shape[{axis}] where it has len(x), int(...) or a number"
                )


def _write(program: Any, path: Path, is_single: bool) -> onnx.ModelProto:
    """The graph. Its weights are in it, or in a second file next to `path`, to which it refers."""
    if is_single:
        proto: onnx.ModelProto = program.model_proto
        return proto
    with _quiet():
        program.save(path, external_data=True)
    return onnx.load(path, load_external_data=False)


def _check(path: Path, network: nn.Module) -> None:
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"{type(network).__name__} was exported to an invalid ONNX graph: {error}") from error


def _compare(
    network: nn.Module,
    inputs: Sequence[Any],
    expected: Sequence[Sequence[Array]],
    path: Path,
    points: Sequence[Point],
    settings: Export,
) -> tuple[tuple[str, ...], Parity]:
    """The file's own names of its inputs, and how far it is from the network; ParityError if that is too far."""
    with OnnxRuntime().open(path, num_threads=torch.get_num_threads()) as session:
        parity = measure_parity(session, inputs, expected)
        input_names = session.input_names
        try:
            require_parity(parity, settings, path)
        except ParityError:
            apart = [measure_parity(session, [x], [y]).max_abs_error for x, y in zip(inputs, expected, strict=True)]
            worst = inputs[int(np.argmax(apart))]
            found = find_mismatch(network, worst, path, points, limit_of(settings, _PRECISION))
            where = f"the difference is largest at inputs of shape {_shapes(worst)}{f', {found}' if found else ''}"
            require_parity(parity, settings, path, where=where)
    return input_names, parity


def _place(part: Path, data: Sequence[FileEntry], path: Path) -> None:
    """Move the files. The data goes first: a graph without its weights must never exist at `path`."""
    for entry in data:
        (part.parent / entry.name).replace(path.parent / entry.name)
    part.replace(path)


def _entry(path: Path) -> FileEntry:
    return FileEntry(name=path.name, sha256=file_sha256(path), size_bytes=path.stat().st_size)


def _root_cause(error: BaseException) -> str:
    """The message of the innermost cause, on one line and of readable length."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings, log lines and printed graphs; its errors say what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
