"""Write files of pruned networks without exporting them: from a template of the dense network, in milliseconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import torch
from onnx import numpy_helper
from onnxscript import ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule
from torch import nn

from deploypipe.errors import DeploypipeError
from deploypipe.export.graph_slicing.resize_graph import Refit, UnfitError, facts_of
from deploypipe.export.graph_slicing.template import Template, tensors_of
from deploypipe.export.onnx_export.export_onnx import export_onnx, fits_one_file, run_eager
from deploypipe.export.onnx_export.parity import measure_parity, require_parity
from deploypipe.export.onnx_graphs.file_metadata import describe, forget_shapes, module_of
from deploypipe.export.onnx_graphs.fold_constants import fold
from deploypipe.files.atomic import scratch_folder
from deploypipe.recipe import Export
from deploypipe.records import CandidateFile, PruningPlan
from deploypipe.runtimes import Array, Session
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.task import Batch, evaluating, take
from deploypipe.untrusted_files.onnx_file_check import size_with_data

_NORM_RULES = [fuse_batchnorm_into_gemm_rule, fuse_batchnorm_into_conv_transpose_rule]
_NUM_CHECKED = 2  # samples
_SMALL = 1024  # bytes of a tensor that stays in the graph: it may be a shape
_PAGE = 4096  # bytes: tensors in a file of their own begin at a page, so that they can be mapped


def slice_file(
    template: Template,
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Sequence[Batch],
    path: Path,
    settings: Export,
    *,
    origin: Mapping[str, str] | None = None,
) -> CandidateFile:
    """Write `pruned`, which is `apply_plan(dense, plan)` whatever its weights are by now, to `path`.

    The file is compared with the network on two samples. If it cannot be made from the template, or differs, the
    network is exported with all of `batches`, and the record holds the reason. Raises what `export_onnx` raises.
    """
    try:
        slice_or_raise(template, dense, pruned, plan, batches, path, settings, origin=origin)
        return CandidateFile(path=path.name, size_bytes=size_with_data(path))
    except (UnfitError, DeploypipeError) as error:
        file = export_onnx(pruned, batches, path, settings, origin=origin)
        return CandidateFile(path=path.name, size_bytes=file.size_bytes, reason=str(error))


def slice_or_raise(
    template: Template,
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Sequence[Batch],
    path: Path,
    settings: Export,
    *,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write the file as `slice_file` does, but never export: UnfitError or a DeploypipeError says why it cannot be.

    As in an export, large weights go to a second file, and such a graph is not folded.
    """
    with evaluating(pruned), scratch_folder(path) as scratch:
        part, data = scratch / path.name, scratch / f"{path.name}.data"
        if fits_one_file(pruned, settings):
            proto, session = fold(_without_norms(cut_graph(template, dense, pruned, plan)), path)
            _compare(pruned, batches, session, settings, path)
            _write(proto, part, origin)
        else:
            proto = cut_graph(template, dense, pruned, plan, data)
            if _norms_to_merge(proto):
                raise UnfitError("batch norms cannot be merged into weights that lie in a second file")
            _write(proto, part, origin)
            with OnnxRuntime().open(part, num_threads=torch.get_num_threads()) as session:
                _compare(pruned, batches, session, settings, path)
            data.replace(path.parent / data.name)  # first: a graph without its weights must never exist at `path`
        part.replace(path)


def _write(proto: onnx.ModelProto, path: Path, origin: Mapping[str, str] | None) -> None:
    forget_shapes(proto)
    describe(proto, precision="fp32", origin=origin or {})
    path.write_bytes(proto.SerializeToString(deterministic=True))


def cut_graph(
    template: Template, dense: nn.Module, pruned: nn.Module, plan: PruningPlan, data: Path | None = None
) -> onnx.ModelProto:
    """The template with the tensors of `pruned`; UnfitError if that is not possible.

    data: the file to write large tensors to. Without one they are in the graph.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(template.graph)
    graph = proto.graph
    _bypass(graph, template, plan.blocks)
    ends = [value.name for value in graph.output]
    nodes = _needed(graph.node, ends)
    read = {name for node in nodes for name in node.input}
    constants = [weight for weight in graph.initializer if weight.name in read]
    weights = _weights(pruned, [name for name in sorted(template.tensors) if name in read], data)
    inputs = {value.name: template.facts.types[value.name] for value in graph.input}
    new = facts_of([*constants, *weights], {})
    new.types.update(inputs)
    refit = Refit(
        dense=template.facts,
        new=new,
        opsets=list(proto.opset_import),
        sizes=_Sizes(dense, pruned),
        constants={weight.name: weight for weight in constants},
    )
    for node in nodes:
        refit.take(node)
    del graph.initializer[:], graph.node[:], graph.value_info[:]
    graph.node.extend(_needed(refit.nodes, ends))
    graph.initializer.extend([*weights, *constants, *refit.added.values()])
    return proto


def _without_norms(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Fold batch norms into what precedes them, as in an exported file; onnxruntime folds them into Conv only."""
    if not _norms_to_merge(proto):
        return proto
    merged: onnx.ModelProto = ir.to_proto(rewrite(ir.from_proto(proto), _NORM_RULES))
    return merged


def _norms_to_merge(proto: onnx.ModelProto) -> bool:
    producers = {node.output[0]: node.op_type for node in proto.graph.node}
    norms = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    return any(producers.get(node.input[0]) != "Conv" for node in norms)


def _bypass(graph: onnx.GraphProto, template: Template, blocks: Sequence[str]) -> None:
    """Remove the blocks: readers of a block's output read its input instead."""
    instead: dict[str, str] = {}
    for block in blocks:
        if block not in template.blocks:
            raise UnfitError(f"block {block!r}: the graph does not show which tensor it passes on")
        instead |= {gave: given for given, gave in template.blocks[block]}
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = _resolve(name, instead)
    ends = {value.name for value in graph.output} & set(instead)
    if not ends:
        return
    nodes = [node for node in graph.node if not ends & set(node.output)]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.node.extend(onnx.helper.make_node("Identity", [_resolve(name, instead)], [name]) for name in sorted(ends))


def _resolve(name: str, instead: Mapping[str, str]) -> str:
    while name in instead:
        name = instead[name]
    return name


def _needed(nodes: Sequence[onnx.NodeProto], values: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that `values` are computed from, in order."""
    read = set(values)
    needed = []
    for node in reversed(nodes):
        if not read.isdisjoint(node.output):
            needed.append(node)
            read.update(node.input)
    return needed[::-1]


def _weights(pruned: nn.Module, names: Sequence[str], data: Path | None) -> list[onnx.TensorProto]:
    tensors = tensors_of(pruned)
    absent = [name for name in names if name not in tensors]
    if absent:
        raise UnfitError(f"the pruned network has no tensor {', '.join(absent)}, which the dense network's graph reads")
    arrays = ((name, tensors[name].detach().cpu().contiguous().numpy()) for name in names)
    if data is None:
        return [numpy_helper.from_array(array, name) for name, array in arrays]
    with data.open("wb") as stream:
        return [_stored(array, name, stream) for name, array in arrays]


def _stored(array: Array, name: str, stream: BinaryIO) -> onnx.TensorProto:
    """The tensor, with its values at the end of `stream` if they are many."""
    if array.nbytes <= _SMALL:
        return numpy_helper.from_array(array, name)
    stream.write(bytes(-stream.tell() % _PAGE))
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
    place = {"location": Path(stream.name).name, "offset": stream.tell(), "length": array.nbytes}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    array.tofile(stream)
    return tensor


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The integers that the modules around a node hold in the dense network -> in the pruned one."""

    dense: nn.Module
    pruned: nn.Module

    def __call__(self, node_name: str) -> dict[int, int]:
        found: dict[int, int] = {}
        path = module_of(node_name)
        while True:
            for name, number in _numbers(self.dense, path).items():
                if number > 1:
                    found.setdefault(number, _numbers(self.pruned, path).get(name, number))
            if not path:
                return found
            path = path.rpartition(".")[0]


def _numbers(network: nn.Module, path: str) -> dict[str, int]:
    try:
        attributes = vars(network.get_submodule(path))
    except AttributeError:  # a name inside a removed block, or of a container that was unrolled
        return {}
    return {name: value for name, value in attributes.items() if type(value) is int}


def _compare(pruned: nn.Module, batches: Sequence[Batch], session: Session, settings: Export, path: Path) -> None:
    """ParityError if the session does not compute what the network computes."""
    inputs = take(batches[0][0], _NUM_CHECKED)
    _, expected = run_eager(pruned, [inputs])
    require_parity(measure_parity(session, [inputs], expected), settings, path)
