"""Correct biases for what rounding the weights does to the mean of a layer's outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from deploypipe.export.quantization.activation_ranges import Histogram
from deploypipe.export.quantization.run_and_compare_graphs import copy_of

_QUANTISED = "_quantized"  # what onnxruntime's quantiser appends to a weight's name


def with_corrected_biases(
    proto: onnx.ModelProto, quantised: onnx.ModelProto, layers: Sequence[str], histograms: Mapping[str, Histogram]
) -> onnx.ModelProto:
    """Return `proto` with biases that undo the mean shift of the layers' outputs that rounded weights cause.

    The shift is (W - rounded W) E[x], with E[x] the mean of each input channel (Nagel et al., arXiv:1906.04721,
    section 4.2). Borders of padded convolutions, which see fewer inputs, are treated like the rest.
    """
    moved = copy_of(proto)
    weights = {weight.name: numpy_helper.to_array(weight) for weight in proto.graph.initializer}
    rounded = _rounded_weights(quantised)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    added: dict[str, NDArray[Any]] = {}
    for node in proto.graph.node:
        if node.name not in layers or node.input[1] not in rounded:
            continue
        bias = _bias_of(node, readers, weights)
        if bias and len(readers[bias]) == 1:
            shift = _mean_shift(node, weights[node.input[1]] - rounded[node.input[1]], histograms[node.input[0]].means)
            added[bias] = shift
    for weight in moved.graph.initializer:
        if weight.name in added:
            weight.CopyFrom(
                numpy_helper.from_array((weights[weight.name] + added[weight.name]).astype(np.float32), weight.name)
            )
    return moved


def _rounded_weights(quantised: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """By its original name: each weight as its integers represent it."""
    arrays = {weight.name: weight for weight in quantised.graph.initializer}
    rounded = {}
    for node in quantised.graph.node:
        if node.op_type != "DequantizeLinear" or not node.input[0].endswith(_QUANTISED):
            continue
        name = node.input[0].removesuffix(_QUANTISED)
        values, scale = (numpy_helper.to_array(arrays[i]) for i in node.input[:2])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        shape = [-1 if i == axis else 1 for i in range(values.ndim)] if scale.ndim else []
        rounded[name] = values.astype(np.float64) * scale.reshape(shape)
    return rounded


def _bias_of(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], weights: Mapping[str, NDArray[Any]]
) -> str:
    """The name of the bias of the output channels; "" if there is none."""
    if node.op_type != "MatMul":
        return node.input[2] if len(node.input) > 2 else ""
    after = readers.get(node.output[0], [])
    if len(after) != 1 or after[0].op_type != "Add":
        return ""
    names = [n for n in after[0].input if n in weights and weights[n].shape == weights[node.input[1]].shape[1:]]
    return names[0] if names else ""


def _mean_shift(node: onnx.NodeProto, lost: NDArray[Any], means: NDArray[np.float64]) -> NDArray[Any]:
    """(outputs,): what rounding the weights subtracts from the mean of each output channel."""
    if node.op_type == "Conv":
        taps = lost.reshape(*lost.shape[:2], -1).sum(axis=2)  # (outputs, inputs of a group)
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        parts = zip(np.split(taps, groups), np.split(means, groups), strict=True)
        return np.concatenate([part @ mean for part, mean in parts], dtype=np.float64)
    flags = {a.name: a.f if a.type == onnx.AttributeProto.FLOAT else a.i for a in node.attribute}
    shift: NDArray[Any] = (lost if flags.get("transB") else lost.T) @ means
    scale = float(flags.get("alpha", 1.0)) / float(flags.get("beta", 1.0) or 1.0)
    return shift * scale
