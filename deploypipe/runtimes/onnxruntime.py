"""ONNX Runtime on the CPU or with another execution provider; no node runs elsewhere without the target's consent."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from deploypipe.errors import DataError, ModelError, RuntimeUnavailableError
from deploypipe.installed_packages import ONNXRUNTIME, find_package
from deploypipe.runtimes.bound_runs import BoundRun, BufferedRun, Buffers, PlainRun, new_stream

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """One execution provider."""

    names: tuple[str, ...]  # in ONNX Runtime; nodes that one does not support go to the next one
    package: str  # that ships it
    threads_option: str = ""  # the provider's own option for the number of threads, if it has its own pool
    graph_option: str = ""  # its option for CUDA graphs


PROVIDERS: dict[str, Provider] = {
    "cpu": Provider(names=(_CPU,), package="onnxruntime"),
    "cuda": Provider(names=(_CUDA,), package="onnxruntime-gpu", graph_option="enable_cuda_graph"),
    "tensorrt": Provider(
        names=("TensorrtExecutionProvider", _CUDA), package="onnxruntime-gpu", graph_option="trt_cuda_graph_enable"
    ),
    "openvino": Provider(
        names=("OpenVINOExecutionProvider",), package="onnxruntime-openvino", threads_option="num_of_threads"
    ),
    "coreml": Provider(names=("CoreMLExecutionProvider",), package="onnxruntime (its macOS wheel)"),
    "qnn": Provider(names=("QNNExecutionProvider",), package="onnxruntime-qnn"),
}

_CANNOT_LOAD = (
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NoSuchFile,
    errors.NotImplemented,
    errors.RuntimeException,
    errors.EPFail,
    RuntimeError,  # an option that a provider does not know
)
_CANNOT_RUN = (errors.Fail, errors.InvalidArgument, errors.RuntimeException, errors.EPFail)
_ERRORS_ONLY, _FATAL_ONLY = 3, 4
_NUM_NAMED = 5  # nodes in an error
# Entries of a run (onnxruntime_run_options_config_keys.h). A captured CUDA graph reads and writes the addresses that it
# was captured with, so that runs on other arrays must not replay it.
_NO_GRAPH = ("gpu_graph_id", "-1")
_NO_WAIT = ("disable_synchronize_execution_providers", "1")


@dataclass(frozen=True, slots=True)
class OnnxSession:
    """A loaded file; see `deploypipe.runtimes.Session`."""

    path: Path
    session: Any  # onnxruntime.InferenceSession
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    run_options: Any | None = None  # of `run`
    stream: Any | None = None  # torch.cuda.Stream of a CUDA provider; None: it has one of its own, or there is no GPU

    @classmethod
    def around(cls, session: Any, path: Path, **settings: Any) -> "OnnxSession":
        """Wrap an onnxruntime session. path: of the loaded file, for errors. settings: other fields."""
        return cls(
            path=path,
            session=session,
            input_names=tuple(i.name for i in session.get_inputs()),
            output_names=tuple(o.name for o in session.get_outputs()),
            **settings,
        )

    def run(self, inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> list[np.ndarray[Any, np.dtype[Any]]]:
        try:
            return list(self.session.run(None, dict(inputs), self.run_options))
        except (*_CANNOT_RUN, ValueError) as error:  # ValueError: an input is absent
            seen = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in inputs.items())
            expected = ", ".join(f"{i.name} {i.type}{i.shape}" for i in self.session.get_inputs())
            raise DataError(
                f"{self.path}: cannot run on {seen or 'no inputs'} ({_first_line(error)}); it takes {expected}"
            ) from error

    def bind(self, inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> BoundRun:
        """See `deploypipe.runtimes.Session`. On CUDA by I/O binding, else `run` itself."""
        if self.stream is None:
            return PlainRun(self.run, inputs)
        return bind_buffers(self, inputs, device=f"cuda:{self.stream.device.index}", stream=self.stream)


def bind_buffers(
    session: OnnxSession, inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]], *, device: str, stream: Any | None
) -> BufferedRun:
    """Bind the batch and its outputs to buffers on a device: "cpu", or "cuda:0" with a stream of it.

    The session runs once, to learn the outputs' shapes. They must not depend on values that change.
    """
    outputs = dict(zip(session.output_names, session.run(inputs), strict=True))
    kinds = {name: (array.shape, array.dtype) for name, array in outputs.items()}
    buffers = Buffers.allocate(inputs, kinds, device, stream)
    buffers.copy_inputs()
    buffers.wait()
    binding, (kind, _, index) = session.session.io_binding(), device.partition(":")
    for bound, tensors, arrays in (
        (binding.bind_input, buffers.inputs, inputs),
        (binding.bind_output, buffers.outputs, outputs),
    ):
        for name, tensor in tensors.items():
            bound(name, kind, int(index or 0), arrays[name].dtype.type, list(tensor.shape), tensor.data_ptr())
    options = _run_options(_NO_WAIT)
    return BufferedRun(buffers=buffers, enqueue=lambda: session.session.run_with_iobinding(binding, options))


def _run_options(entry: tuple[str, str]) -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(*entry)
    return options


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxRuntime:
    """Runs operators one after another, with all graph optimisations.

    is_plain: basic optimisations only, which leave 8-bit files in float between their roundings. They also avoid
    onnxruntime 1.31's crash in its fusion of MatMul and Transpose, when it loads some half-precision transformers on a
    CPU that other runtimes accept.

    Raises RuntimeUnavailableError if the provider is not in the installed package, does not start here, or leaves
    nodes to the CPU without `allow_cpu_fallback`.
    """

    provider: Provider = PROVIDERS["cpu"]
    options: Mapping[str, str] = field(default_factory=dict)
    allow_cpu_fallback: bool = False
    cuda_graph: bool = False  # bound runs replay a CUDA graph
    is_plain: bool = False

    @contextmanager
    def open(self, path: Path, *, num_threads: int) -> Iterator[OnnxSession]:
        """See `deploypipe.runtimes.Runtime`."""
        if problem := missing_provider(self.provider):
            raise RuntimeUnavailableError(problem)
        options = _session_options(num_threads)
        if self.is_plain:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        is_cpu = self.provider.names == (_CPU,)
        if not is_cpu:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            options.log_severity_level = _FATAL_ONLY  # a provider's failures are reported below
        stream = new_stream(int(self.options.get("device_id", 0))) if _CUDA in self.provider.names else None
        try:
            session = onnxruntime.InferenceSession(
                os.fspath(path),
                options,
                providers=self._providers(num_threads, stream),
                # With it, the CPU would replace a provider that fails, here or at the first run, with a printed line.
                enable_fallback=False,
            )
        except _CANNOT_LOAD as error:
            problem = f"onnxruntime cannot load it ({_first_line(error)})"
            if is_cpu:
                raise ModelError(f"{path}: {problem}; export the model again") from error
            given = f" with {dict(self.options)}" if self.options else ""
            raise ModelError(
                f"{path}: {problem} on {self.provider.names[0]}{given}; correct provider_options or export the model "
                "again"
            ) from error
        if not is_cpu:
            self._require_placement(path, session)
        yield OnnxSession.around(session, path, run_options=None if is_cpu else _run_options(_NO_GRAPH), stream=stream)

    def _providers(self, num_threads: int, stream: Any | None) -> list[tuple[str, dict[str, str]]]:
        first, *others = self.provider.names
        own = {self.provider.threads_option: str(num_threads)} if self.provider.threads_option else {}
        if self.cuda_graph and self.provider.graph_option:
            own[self.provider.graph_option] = "1"
        common = {} if stream is None else {"user_compute_stream": str(stream.cuda_stream)}
        if stream is not None and "device_id" in self.options:
            common["device_id"] = self.options["device_id"]
        return [(first, {**own, **common, **self.options}), *((name, common) for name in others)]

    def _require_placement(self, path: Path, session: Any) -> None:
        """RuntimeUnavailableError if the provider did not start, or nodes run on the CPU without permission."""
        name = self.provider.names[0]
        if name not in session.get_providers():
            raise RuntimeUnavailableError(
                f"{path}: {name} is installed but did not start on this machine, and onnxruntime would have run it on "
                "the CPU instead; check the device, its driver and provider_options"
            )
        if self.allow_cpu_fallback:
            return
        on_cpu = find_nodes(session, _CPU)
        if on_cpu:
            shown = ", ".join(on_cpu[:_NUM_NAMED]) + (", ..." if len(on_cpu) > _NUM_NAMED else "")
            raise RuntimeUnavailableError(
                f"{path}: {name} leaves {len(on_cpu)} nodes to the CPU: {shown}; set allow_cpu_fallback = true in the "
                "target to accept that, or export the model without these operators"
            )


def missing_provider(provider: Provider) -> str:
    """Why onnxruntime has not got this provider, and the package that brings it; empty where it has."""
    available = onnxruntime.get_available_providers()
    if provider.names[0] in available:
        if provider.names != (_CPU,) and not hasattr(
            onnxruntime.InferenceSession, "get_provider_graph_assignment_info"
        ):
            return (
                f"onnxruntime {onnxruntime.__version__} does not report which nodes ran on which provider; "
                f"pip install '{provider.package.partition(' ')[0]}>=1.24'"
            )
        return ""
    installed = find_package(ONNXRUNTIME)
    return (
        f"{provider.names[0]} is not in the installed {installed.name} {installed.version} (it has "
        f"{', '.join(available)}); pip uninstall {installed.name} && pip install {provider.package}"
    )


def find_nodes(session: Any, provider_name: str) -> list[str]:
    """`OP 'name'` of the nodes that a session gave to one provider, after the optimisations common to all."""
    return [
        f"{node.op_type} {node.name!r}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == provider_name
        for node in part.get_nodes()
    ]


def _session_options(num_threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    # Idle worker threads of one session would otherwise take the cores from another one timed next to it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
