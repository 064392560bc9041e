"""ONNX Runtime on the CPU."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from deploypipe.errors import DataError, ModelError

PROVIDER = "CPUExecutionProvider"

_CANNOT_LOAD = (
    errors.Fail,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NoSuchFile,
    errors.NotImplemented,
    errors.RuntimeException,
)
_CANNOT_RUN = (errors.Fail, errors.InvalidArgument, errors.RuntimeException)
_ERRORS_ONLY = 3


@dataclass(frozen=True, slots=True)
class OnnxSession:
    """A loaded file; see `deploypipe.runtimes.Session`."""

    path: Path
    session: Any  # onnxruntime.InferenceSession
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def run(self, inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> list[np.ndarray[Any, np.dtype[Any]]]:
        try:
            return list(self.session.run(None, dict(inputs)))
        except (*_CANNOT_RUN, ValueError) as error:  # ValueError: an input is absent
            seen = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in inputs.items())
            expected = ", ".join(f"{i.name} {i.type}{i.shape}" for i in self.session.get_inputs())
            raise DataError(
                f"{self.path}: cannot run on {seen or 'no inputs'} ({_first_line(error)}); it takes {expected}"
            ) from error


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """CPUExecutionProvider, operators one after another, all graph optimisations."""

    @contextmanager
    def open(self, path: Path, *, num_threads: int) -> Iterator[OnnxSession]:
        """See `deploypipe.runtimes.Runtime`."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = _ERRORS_ONLY
        # Idle worker threads of one session would otherwise take the cores from another one timed next to it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = onnxruntime.InferenceSession(os.fspath(path), options, providers=[PROVIDER])
        except _CANNOT_LOAD as error:
            raise ModelError(
                f"{path}: onnxruntime cannot load it ({_first_line(error)}); export the model again"
            ) from error
        yield OnnxSession(
            path=path,
            session=session,
            input_names=tuple(i.name for i in session.get_inputs()),
            output_names=tuple(o.name for o in session.get_outputs()),
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
