"""Detect the arithmetic of 8-bit files: on this machine by a probe, on another one from its target.

x86 processors without VNNI add pairs of unsigned by signed 8-bit products in 16 bits (VPMADDUBSW), and ONNX Runtime
uses that instruction there. 255 * 127 + 255 * 127 does not fit: the sum saturates, and the file computes something else
than on a processor with VNNI. Weights of 7 bits, -64 to 64, always fit: 2 * 255 * 64 < 2**15.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from deploypipe.runtimes.this_machine import this_machine
from deploypipe.target import Target

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})  # as in /proc/cpuinfo; each adds four products in 32 bits
_ON_PROCESSORS = frozenset({"cpu", "openvino"})  # providers of onnxruntime


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Kernels:
    """The kernels that compute an 8-bit file."""

    runtime: str  # whose recipe the file follows; "tensorrt" for onnxruntime's TensorRT provider too
    saturate: bool = False  # whether sums of two products may saturate

    @property
    def are_emulated_here(self) -> bool:
        """Whether this machine's own 8-bit kernels compute something else, so that files are evaluated in float."""
        return self.runtime != "onnxruntime" or (saturates_here() and not self.saturate)


def kernels_of(target: Target) -> Int8Kernels:
    """The kernels of a target.

    An x86 target whose `cpu_features` lack VNNI saturates. One that lists no features counts as a machine like this.
    """
    if target.provider == "tensorrt":
        return Int8Kernels(runtime="tensorrt")
    is_on_processor = target.runtime == "onnxruntime" and target.provider in _ON_PROCESSORS
    return Int8Kernels(runtime=target.runtime, saturate=is_on_processor and _processor_saturates(target))


def _processor_saturates(target: Target) -> bool:
    here = this_machine().architecture
    if (target.machine or here) != "x86_64":
        return False
    if target.cpu_features:
        return VNNI.isdisjoint(target.cpu_features)
    return here != "x86_64" or saturates_here()  # an unknown x86 processor is assumed to saturate


@cache
def saturates_here() -> bool:
    """Whether ONNX Runtime's sums of 8-bit products saturate on this processor, by one product of matrices."""
    left, right = np.full((1, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["left", "right"], ["sums"])],
        "sums",
        [helper.make_tensor_value_info("left", onnx.TensorProto.UINT8, left.shape)],
        [helper.make_tensor_value_info("sums", onnx.TensorProto.INT32, (1, 16))],
        [onnx.numpy_helper.from_array(right, "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"left": left})
    return not np.array_equal(sums, left.astype(np.int32) @ right.astype(np.int32))
