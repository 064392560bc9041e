"""Write the graph of a dense network in which every width can still be changed.

An optimised graph has weights merged into one another, such as a batch norm into its convolution. An unoptimised one
computes every shape again, and onnxruntime does not remove all of that. So the exporter's optimiser sees a graph whose
weights are unknown inputs: it optimises everything but the weights.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import ir
from torch import Tensor

from deploypipe.export.onnx_export.mismatch_bisection import scopes_of
from deploypipe.export.onnx_export.protect_padding import protect_padding
from deploypipe.export.onnx_graphs.file_metadata import PREFIX, name_nodes, strip

BLOCKS = f"{PREFIX}blocks"  # in a template's metadata: what each block reads and gives
_PASSING = ("Identity", "Cast")
_SMALL = 1024  # bytes of a weight that is written into the template: it may be a shape


def write_template(raw: onnx.ModelProto, program: Any, output_names: Sequence[str], path: Path) -> None:
    """Write the template. program: as `torch.onnx.export(optimize=False)` returns it; raw: its `without_weights`."""
    proto = _tidied(raw, program)
    name_nodes(proto)
    strip(proto)
    protect_padding(proto)
    known = {name for node in proto.graph.node for name in node.output} | {value.name for value in proto.graph.input}
    blocks = _find_blocks(program.exported_program, output_names, _aliases(raw), known)
    onnx.helper.set_model_props(proto, {BLOCKS: json.dumps(blocks, sort_keys=True)})
    path.write_bytes(proto.SerializeToString(deterministic=True))


def without_weights(program: Any) -> onnx.ModelProto:
    """The program's graph with the types and shapes of the network's weights, and without their values."""
    weights = program.exported_program.state_dict
    values = [value for name, value in program.model.graph.initializers.items() if name in weights]
    held = [(value, value.const_value) for value in values if value.const_value is not None]
    try:
        for value, weight in held:
            if weight.nbytes > _SMALL:
                value.const_value = ir.ExternalTensor(
                    "weights", 0, weight.nbytes, weight.dtype, shape=weight.shape, name=weight.name
                )
        proto: onnx.ModelProto = ir.to_proto(program.model)
    finally:
        for value, weight in held:
            value.const_value = weight
    return proto


def _tidied(raw: onnx.ModelProto, program: Any) -> onnx.ModelProto:
    """`raw` after the exporter's optimisations, none of which saw the value of a weight."""
    unknown = onnx.ModelProto()
    unknown.CopyFrom(raw)
    graph = unknown.graph
    weights = {weight.name: weight for weight in raw.graph.initializer}
    del graph.initializer[:]
    graph.input.extend(onnx.helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in weights.values())
    part = type(program)(ir.from_proto(unknown), program.exported_program)
    part.optimize()
    tidied: onnx.ModelProto = ir.to_proto(part.model)
    inputs = [value for value in tidied.graph.input if value.name not in weights]
    del tidied.graph.input[:]
    tidied.graph.input.extend(inputs)
    tidied.graph.initializer.extend(weights.values())
    return tidied


def _aliases(raw: onnx.ModelProto) -> dict[str, str]:
    """Values that a node only passes on -> the node's input."""
    return {node.output[0]: node.input[0] for node in raw.graph.node if node.op_type in _PASSING}


def _find_blocks(
    program: torch.export.ExportedProgram,
    output_names: Sequence[str],
    aliases: Mapping[str, str],
    known: Collection[str],
) -> dict[str, list[tuple[str, str]]]:
    """By module: the values (input, output) of every call whose one output has the shape of an input."""
    outputs = [name for name in program.graph_signature.user_outputs if isinstance(name, str)]
    renamed = dict(zip(outputs, output_names, strict=False))
    inside: dict[tuple[str, str], list[torch.fx.Node]] = {}
    for node in program.graph.nodes:
        for scope in scopes_of(node):
            inside.setdefault(scope, []).append(node)
    found: dict[str, list[tuple[str, str]]] = {}
    unclear = set()
    for (_, path), nodes in inside.items():
        pair = _ends(nodes)
        names = [_known_name(renamed.get(node.name, node.name), aliases, known) for node in pair]
        if len(names) == 2 and all(names):
            found.setdefault(path, []).append((names[0], names[1]))
        else:
            unclear.add(path)
    return {path: calls for path, calls in found.items() if path not in unclear}


def _ends(nodes: Sequence[torch.fx.Node]) -> tuple[torch.fx.Node, ...]:
    """The nodes (input, output) of a module; () if they are unclear.

    If several inputs have the output's shape, the one computed last counts: the others (a mask, a cross-attention's
    memory) were computed earlier.
    """
    members = set(nodes)
    entering = {node: None for inner in nodes for node in inner.all_input_nodes if node not in members}
    place = {node: i for i, node in enumerate(nodes[0].graph.nodes)}
    pairs = []
    for leaving in nodes:
        alike = [node for node in entering if _shape(node) is not None and _shape(node) == _shape(leaving)]
        if alike and any(user not in members for user in leaving.users):
            pairs.append((max(alike, key=place.__getitem__), leaving))
    return pairs[0] if len(pairs) == 1 else ()


def _shape(node: torch.fx.Node) -> tuple[str, ...] | None:
    """Type and shape, with symbols as text: comparing symbols would bind them."""
    value = node.meta.get("val")
    return (str(value.dtype), *map(str, value.shape)) if isinstance(value, Tensor) else None


def _known_name(name: str, aliases: Mapping[str, str], known: Collection[str]) -> str:
    """The value's name in the optimised graph; "" if the graph has no such value."""
    return next((n for n in _chain(name, aliases) if n in known), "")


def _chain(name: str, aliases: Mapping[str, str]) -> Iterator[str]:
    yield name
    while name in aliases:
        name = aliases[name]
        yield name
