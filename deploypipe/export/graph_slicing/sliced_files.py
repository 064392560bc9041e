"""Write files of pruned networks without exporting them: from a template of the dense network, in milliseconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import numpy_helper
from onnxscript import ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule
from torch import nn

from deploypipe.errors import DeploypipeError
from deploypipe.export.graph_slicing.resize_graph import Refit, UnfitError, facts_of
from deploypipe.export.graph_slicing.template import Template, tensors_of
from deploypipe.export.onnx_export.export_onnx import export_onnx, run_eager
from deploypipe.export.onnx_export.parity import measure_parity, require_parity
from deploypipe.export.onnx_graphs.file_metadata import describe, forget_shapes, module_of
from deploypipe.export.onnx_graphs.fold_constants import fold
from deploypipe.files.atomic import scratch_folder
from deploypipe.recipe import Export
from deploypipe.records import CandidateFile, PruningPlan
from deploypipe.runtimes.onnxruntime import OnnxSession
from deploypipe.task import Batch, evaluating, take

_NORM_RULES = [fuse_batchnorm_into_gemm_rule, fuse_batchnorm_into_conv_transpose_rule]
_NUM_CHECKED = 2  # samples


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
        return CandidateFile(path=path.name, size_bytes=path.stat().st_size)
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
    """Write the file as `slice_file` does, but never export: UnfitError or a DeploypipeError says why it cannot be."""
    with evaluating(pruned), scratch_folder(path) as scratch:
        part = scratch / path.name
        proto, session = fold(_without_norms(cut_graph(template, dense, pruned, plan)), path)
        _compare(pruned, batches, session, settings)
        forget_shapes(proto)
        describe(proto, precision="fp32", origin=origin or {})
        part.write_bytes(proto.SerializeToString(deterministic=True))
        part.replace(path)


def cut_graph(template: Template, dense: nn.Module, pruned: nn.Module, plan: PruningPlan) -> onnx.ModelProto:
    """The template with the tensors of `pruned`; UnfitError if that is not possible."""
    proto = onnx.ModelProto()
    proto.CopyFrom(template.graph)
    graph = proto.graph
    _bypass(graph, template, plan.blocks)
    ends = [value.name for value in graph.output]
    nodes = _needed(graph.node, ends)
    read = {name for node in nodes for name in node.input}
    constants = [weight for weight in graph.initializer if weight.name in read]
    weights = _weights(pruned, [name for name in sorted(template.tensors) if name in read])
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
    producers = {node.output[0]: node.op_type for node in proto.graph.node}
    norms = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    if all(producers.get(node.input[0]) == "Conv" for node in norms):
        return proto
    merged: onnx.ModelProto = ir.to_proto(rewrite(ir.from_proto(proto), _NORM_RULES))
    return merged


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


def _weights(pruned: nn.Module, names: Sequence[str]) -> list[onnx.TensorProto]:
    tensors = tensors_of(pruned)
    absent = [name for name in names if name not in tensors]
    if absent:
        raise UnfitError(f"the pruned network has no tensor {', '.join(absent)}, which the dense network's graph reads")
    return [numpy_helper.from_array(tensors[name].detach().cpu().contiguous().numpy(), name) for name in names]


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


def _compare(pruned: nn.Module, batches: Sequence[Batch], session: OnnxSession, settings: Export) -> None:
    """ParityError if the session does not compute what the network computes."""
    inputs = take(batches[0][0], _NUM_CHECKED)
    _, expected = run_eager(pruned, [inputs])
    require_parity(measure_parity(session, [inputs], expected), settings, session.path)
