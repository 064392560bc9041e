"""Fold an ONNX graph's constants with onnxruntime, and open graphs for it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from deploypipe.errors import ModelError
from deploypipe.runtimes.onnxruntime import OnnxSession

CANNOT_RUN = (
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NotImplemented,
    errors.RuntimeException,
)
_ERRORS_ONLY = 3


def folded(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Apply onnxruntime's basic optimisations, unless they add operators that are not ONNX's own.

    Weights that are split or transposed before a product become plain weights, which can be in 8 bits.
    """
    return fold(proto, path)[0]


def fold(proto: onnx.ModelProto, path: Path) -> tuple[onnx.ModelProto, OnnxSession]:
    """Return what `folded` returns, and a session that computes it: quick to open, slow to run."""
    with TemporaryDirectory() as scratch:
        plain_path = Path(scratch) / "plain.onnx"
        options = session_options(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC)
        options.optimized_model_filepath = str(plain_path)
        options.add_session_config_entry("session.disable_prepacking", "1")
        session = open_graph(proto, options, path)
        plain = onnx.load(plain_path)
    used = {node.domain for node in plain.graph.node}
    if used <= {node.domain for node in proto.graph.node}:
        opsets = [o for o in plain.opset_import if o.domain in used or o.domain == ""]
        del plain.opset_import[:]
        plain.opset_import.extend(opsets)
        plain.producer_name, plain.producer_version = proto.producer_name, proto.producer_version
        proto = plain
    return proto, OnnxSession.around(session, path)


def session_options(level: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_graph(proto: onnx.ModelProto, options: Any, path: Path) -> Any:
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except CANNOT_RUN as error:
        raise ModelError(f"{path}: onnxruntime cannot run it ({first_line(error)}); export the model again") from error


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
