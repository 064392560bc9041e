"""Change an exported graph so that runtimes do not break it; what it computes stays the same."""

import onnx
from onnx import numpy_helper

_NEGATIVE_ZERO = "negative_zero"


def protect_padding(proto: onnx.ModelProto) -> None:
    """Write the zero of a Pad as -0.0 where ONNX Runtime would wrongly fuse it into the pool that reads it.

    Its PadFusion (at least in 1.17 to 1.31) fuses every Pad whose value has the bytes of 0.0; those of -0.0 differ. The
    fusion changes the result of a MaxPool where a window at the edge holds negative values only, since a pool's own
    padding counts as minus infinity. A pool that is not larger than its padding does not load.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    pools = {node.input[0]: node for node in graph.node if node.op_type in ("MaxPool", "AveragePool")}
    pools |= {node.input[0]: pools[node.output[0]] for node in graph.node if _is_cast_to(node, pools)}
    for pad in [node for node in graph.node if node.op_type == "Pad" and node.output[0] in pools]:
        if not _pads_zeros(pad, constants) or not _is_harmful(pad, pools[pad.output[0]], constants):
            continue
        given = constants[pad.input[2]].data_type if len(pad.input) > 2 and pad.input[2] else onnx.TensorProto.FLOAT
        name = f"{_NEGATIVE_ZERO}_{given}"
        if name not in constants:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(given)
            constants[name] = numpy_helper.from_array(dtype.type(-0.0), name)
            graph.initializer.append(constants[name])
        inputs = [*pad.input[:2], name, *pad.input[3:]]
        del pad.input[:]
        pad.input.extend(inputs)


def _is_cast_to(node: onnx.NodeProto, pools: dict[str, onnx.NodeProto]) -> bool:
    return bool(node.op_type == "Cast" and node.output[0] in pools)


def _pads_zeros(pad: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if any(a.name == "mode" and a.s != b"constant" for a in pad.attribute) or pad.input[1] not in constants:
        return False
    if len(pad.input) < 3 or not pad.input[2]:
        return True
    value = constants.get(pad.input[2])
    return value is not None and not numpy_helper.to_array(value).any()


def _is_harmful(pad: onnx.NodeProto, pool: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if pool.op_type == "MaxPool":
        return True
    sizes = {a.name: list(a.ints) for a in pool.attribute if a.name in ("kernel_shape", "pads")}
    widest = int(numpy_helper.to_array(constants[pad.input[1]]).max()) + max(sizes.get("pads", [0]))
    return bool(widest >= min(sizes["kernel_shape"]))
