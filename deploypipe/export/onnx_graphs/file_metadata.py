"""Names and metadata of an exported file: its origin, inputs and layers, and nothing about the author's machine."""

import ast
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import onnx

from deploypipe.installed_packages import find_package

PREFIX = "deploypipe."
_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript")
_WEIGHT = ".weight"
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(proto: onnx.ModelProto) -> None:
    """Name each node after the module it came from and its operator: `layer1.0.conv1/Conv`.

    Call it before `strip`, since it reads the exporter's own metadata.
    """
    seen: Counter[str] = Counter()
    for node in proto.graph.node:
        name = f"{_module_of(node)}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def module_of(node_name: str) -> str:
    """The module that a node came from, by the name that `name_nodes` gave it; "" for the network itself."""
    return node_name.rpartition("/")[0]


def _module_of(node: onnx.NodeProto) -> str:
    if node.op_type in ("Conv", "ConvTranspose") and node.input[1].endswith(_WEIGHT):
        return str(node.input[1].removesuffix(_WEIGHT))  # with a folded batch norm, the scopes name the norm
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""  # the last one is the node itself
    return ""


def strip(proto: onnx.ModelProto) -> None:
    """Remove what the exporter stores about the source: stack traces, file paths, class names."""
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


def forget_shapes(proto: onnx.ModelProto) -> None:
    """Remove the shapes of inner tensors, which a runtime infers itself.

    If the file holds them, onnxruntime 1.31 fuses additions into the layer norms after them, which is slower on a CPU
    (a ViT without them: 0.68 of the time).
    """
    del proto.graph.value_info[:]


def _strip_node(node: onnx.NodeProto) -> None:
    node.ClearField("doc_string")
    del node.metadata_props[:]
    for attribute in node.attribute:
        attribute.ClearField("doc_string")
        for graph in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
            _strip_graph(graph)


@cache
def _versions() -> dict[str, str]:
    """Cached: looking versions up reads files, which takes longer than writing a small graph."""
    found = {module: find_package(module) for module in ("deploypipe", *_PACKAGES)}
    return {"version": found.pop("deploypipe").version} | {
        f"{module}_version": p.version for module, p in found.items()
    }


def describe(
    proto: onnx.ModelProto, *, precision: str, origin: Mapping[str, str], class_names: Sequence[str] = ()
) -> None:
    """Set `deploypipe.*` metadata: versions, precision, inputs and outputs as JSON, `origin`, and the class names."""
    entries = {**_versions(), "precision": precision, **origin}
    entries["inputs"] = json.dumps(list(_specs(proto.graph.input)))
    entries["outputs"] = json.dumps(list(_specs(proto.graph.output)))
    if class_names:
        entries["class_names"] = json.dumps(list(class_names), ensure_ascii=False)
    kept = {entry.key: entry.value for entry in proto.metadata_props if not entry.key.startswith(PREFIX)}
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, dict(sorted({**kept, **{PREFIX + k: v for k, v in entries.items()}}.items())))


def _specs(values: Sequence[onnx.ValueInfoProto]) -> Iterator[dict[str, Any]]:
    """Name, dtype and shape of each; a dynamic axis by its name."""
    for value in values:
        tensor = value.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        yield {"name": value.name, "dtype": dtype, "shape": shape}
