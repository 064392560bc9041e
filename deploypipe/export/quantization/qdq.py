"""Insert QuantizeLinear/DequantizeLinear pairs as each runtime needs them, with onnxruntime's quantiser."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from deploypipe.errors import ModelError
from deploypipe.export.onnx_graphs.file_metadata import PREFIX
from deploypipe.export.quantization.activation_ranges import Range
from deploypipe.export.quantization.run_and_compare_graphs import FLOAT, copy_of, subgraphs, types_of
from deploypipe.runtimes.int8_arithmetic import Int8Kernels

LAYERS = ("Conv", "Gemm", "MatMul")
ARITHMETIC = f"{PREFIX}int8_arithmetic"  # in a file's metadata: what `Converted.int8_arithmetic` holds
_OTHER_LAYERS = ("ConvTranspose", "Attention", "Einsum", "GRU", "LSTM", "RNN")

_DEQUANTISED = "_DequantizeLinear_Output"  # what the quantiser appends to a tensor's name


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one runtime wants its 8-bit graphs. Weights are signed, symmetric, with one scale per output channel."""

    is_symmetric: bool  # activations: signed with zero point 0; else unsigned with any zero point
    has_integer_bias: bool
    rounds_outputs_of: tuple[str, ...]  # layers whose outputs are in 8 bits too, whatever reads them
    followers: tuple[str, ...]  # operators that run in 8 bits if all their inputs are in 8 bits
    leaves_others: bool  # readers that are not in 8 bits get the float tensor, if there is one
    weights_have_7_bits: bool = False  # so that a sum of two products fits into 16 bits (`runtimes.int8_arithmetic`)


# onnxruntime: chosen by time on an AVX-512 VNNI CPU (EPYC), batch 1, one thread, as a share of the fp32 time (constants
# folded). ResNet-56 0.40: without the followers 0.51, without Add 0.45, with the outputs of Conv left float 1.11 (no
# integer kernel then), symmetric 1.45. A ViT 0.71: with the outputs of products rounded too 0.84, with products of two
# activations 0.82, with all readers on rounded tensors 0.75, symmetric 1.23. On x86 without VNNI the weights
# get 7 bits (`find_recipe`).
# TensorRT: symmetric only, biases in float, and pairs before layers only, so that TensorRT can fuse what follows a
# layer. All readers of a tensor get the rounded one: an Add needs it to be fused with the Conv before it (NVIDIA,
# "Working with Quantized Types"). Not timed: there was no GPU.
_TENSORRT = Recipe(is_symmetric=True, has_integer_bias=False, rounds_outputs_of=(), followers=(), leaves_others=False)
RECIPES: dict[str, Recipe] = {
    "onnxruntime": Recipe(
        is_symmetric=False,
        has_integer_bias=True,
        rounds_outputs_of=("Conv",),
        followers=(
            *("Relu", "Clip", "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Pad", "Slice"),
            *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"),
        ),
        leaves_others=True,
    ),
    "tensorrt": _TENSORRT,
    "tensorrt-rtx": _TENSORRT,
}


def find_recipe(kernels: Int8Kernels) -> Recipe:
    """The recipe for these kernels; ModelError if there is none."""
    if kernels.runtime not in RECIPES:
        raise ModelError(
            f"the runtime {kernels.runtime!r} has no conversion to 8 bits; those with one are {', '.join(RECIPES)}"
        )
    return replace(RECIPES[kernels.runtime], weights_have_7_bits=kernels.saturate)


def why_not(node: onnx.NodeProto, proto: onnx.ModelProto) -> str:
    """Why a layer, or a node's subgraphs with layers, cannot be in 8 bits; "" if they can, and for other nodes."""
    if subgraphs(node):
        return f"{node.op_type}: its subgraphs stay float" if _holds_layers(node) else ""
    if node.op_type in _OTHER_LAYERS:
        return f"{node.op_type} stays float in all recipes"
    if node.op_type not in LAYERS:
        return ""
    weights = {weight.name: weight for weight in proto.graph.initializer}
    if types_of(proto.graph).get(node.input[0]) != FLOAT:
        return f"{node.op_type} does not read fp32"
    weight = weights.get(node.input[1])
    if node.op_type == "MatMul":
        if weight is None:
            return "a product of two activations, slower in 8 bits where it was measured"
        return "" if len(weight.dims) == 2 else f"MatMul with weights of {len(weight.dims)} axes"
    if weight is None or (len(node.input) > 2 and node.input[2] and node.input[2] not in weights):
        return f"{node.op_type} with weights that are computed"
    return ""


def _holds_layers(node: onnx.NodeProto) -> bool:
    return any(inner.op_type in LAYERS or _holds_layers(inner) for graph in subgraphs(node) for inner in graph.node)


def channel_axes(proto: onnx.ModelProto, layers: Iterable[str], recipe: Recipe) -> dict[str, int]:
    """The tensors that need ranges if `layers` are in 8 bits -> axis of the channels: 1 for a convolution, else -1."""
    chosen = _choose_nodes(proto, layers, recipe)
    types, weights = types_of(proto.graph), {weight.name for weight in proto.graph.initializer}
    axes: dict[str, int] = {}
    for node in proto.graph.node:
        if node.name not in chosen:
            continue
        for name in (*node.input, *(node.output if chosen[node.name] else ())):
            if types.get(name) == FLOAT and name not in weights:
                axes[name] = 1 if node.op_type == "Conv" else axes.get(name, -1)
    return axes


def _choose_nodes(proto: onnx.ModelProto, layers: Iterable[str], recipe: Recipe) -> dict[str, bool]:
    """The nodes that run in 8 bits (`layers` and followers) -> whether their outputs are in 8 bits too."""
    wanted, weights = set(layers), {weight.name for weight in proto.graph.initializer}
    types = types_of(proto.graph)
    held: set[str] = set()
    chosen: dict[str, bool] = {}
    for node in proto.graph.node:
        floats = [name for name in node.input if types.get(name) == FLOAT and name not in weights]
        is_follower = node.op_type in recipe.followers and bool(floats) and held.issuperset(floats)
        if node.name not in wanted and not is_follower:
            continue
        chosen[node.name] = is_follower or node.op_type in recipe.rounds_outputs_of
        if chosen[node.name]:
            held |= set(node.output)
    return chosen


def quantise(
    proto: onnx.ModelProto, layers: Iterable[str], ranges: Mapping[str, Range], recipe: Recipe
) -> onnx.ModelProto:
    """Convert `layers` and their followers to 8 bits."""
    chosen = _choose_nodes(proto, layers, recipe)
    needed = channel_axes(proto, layers, recipe)
    data = {n: (np.array(ranges[n][0], np.float32), np.array(ranges[n][1], np.float32)) for n in sorted(needed)}
    activations = QuantType.QInt8 if recipe.is_symmetric else QuantType.QUInt8
    by_name = {node.name: node for node in proto.graph.node}
    with _quiet():
        quantizer = QDQQuantizer(
            copy_of(proto),
            True,  # per channel
            recipe.weights_have_7_bits,
            QuantType.QInt8,
            activations,
            TensorsData(CalibrationMethod.MinMax, data),
            list(chosen),
            [],
            sorted({by_name[name].op_type for name in chosen}),
            {
                "ActivationSymmetric": recipe.is_symmetric,
                "WeightSymmetric": True,
                "QuantizeBias": recipe.has_integer_bias,
                "OpTypesToExcludeOutputQuantization": [t for t in LAYERS if t not in recipe.rounds_outputs_of],
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    quantised: onnx.ModelProto = quantizer.model.model
    quantised.metadata_props.add(key=ARITHMETIC, value="any" if recipe.weights_have_7_bits else "exact")
    quantised.producer_name, quantised.producer_version = proto.producer_name, proto.producer_version
    if recipe.leaves_others:
        _reconnect_floats(quantised, proto, chosen)
    return quantised


def _reconnect_floats(quantised: onnx.ModelProto, proto: onnx.ModelProto, chosen: Mapping[str, bool]) -> None:
    """Let nodes that are not in 8 bits read the original float tensors, unless these exist in 8 bits only."""
    held = {name for node in proto.graph.node if chosen.get(node.name) for name in node.output}
    weights = {weight.name: weight for weight in proto.graph.initializer}
    present = {weight.name for weight in quantised.graph.initializer}
    for node in quantised.graph.node:
        if node.name in chosen or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for i, name in enumerate(node.input):
            before = name.removesuffix(_DEQUANTISED)
            if before == name or before in held:
                continue
            node.input[i] = before
            if before in weights and before not in present:
                present.add(before)
                quantised.graph.initializer.append(weights[before])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence onnxruntime's quantiser, which logs its changes of ranges to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        logging.disable(before)
