"""Run TensorRT and TensorRT-RTX engines on an NVIDIA GPU; torch holds the GPU's memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploypipe.errors import DataError, ModelError, RuntimeUnavailableError
from deploypipe.runtimes.bound_runs import BufferedRun, Buffers
from deploypipe.runtimes.engine_file import read_engine
from deploypipe.runtimes.tensorrt_libraries import load_library


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRtSession:
    """A loaded engine; see `deploypipe.runtimes.Session`. A run includes the copies to the GPU and back."""

    path: Path
    trt: Any  # the bindings' module
    engine: Any
    context: Any
    stream: Any  # torch.cuda.Stream
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    cuda_graph: bool  # bound runs replay a CUDA graph

    def run(self, inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> list[np.ndarray[Any, np.dtype[Any]]]:
        bound = BufferedRun(buffers=self._bind(inputs), enqueue=self._enqueue)
        bound.run()
        return bound.outputs()

    def bind(self, inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> BufferedRun:
        """See `deploypipe.runtimes.Session`. The engine runs in the buffers of the last call of `bind` or `run`."""
        buffers = self._bind(inputs)
        return BufferedRun(buffers=buffers, enqueue=self._capture() if self.cuda_graph else self._enqueue)

    def _bind(self, inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> Buffers:
        if inputs.keys() != set(self.input_names):
            raise DataError(self._misfit(inputs, "names differ"))
        for name in self.input_names:
            if inputs[name].dtype != self.trt.nptype(self.engine.get_tensor_dtype(name)):
                raise DataError(self._misfit(inputs, f"{name} has another type"))
            if not self.context.set_input_shape(name, inputs[name].shape):
                raise DataError(self._misfit(inputs, f"{name} is outside the optimisation profile"))
        unknown = self.context.infer_shapes()
        if unknown:
            raise DataError(self._misfit(inputs, f"the shapes of {', '.join(unknown)} are unknown"))
        outputs = {name: self._kind(name) for name in self.output_names}
        buffers = Buffers.allocate({name: inputs[name] for name in self.input_names}, outputs, "cuda", self.stream)
        for name, tensor in {**buffers.inputs, **buffers.outputs}.items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        return buffers

    def _capture(self) -> Callable[[], object]:
        """Capture one run as a CUDA graph. One before it, since TensorRT updates itself at the first run of a shape."""
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            self._enqueue()
        self.stream.synchronize()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self._enqueue()
        return graph.replay

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise ModelError(f"{self.path}: the engine failed while it ran; rebuild it from the ONNX file")

    def _kind(self, name: str) -> tuple[tuple[int, ...], Any]:
        """Shape and numpy type of an output."""
        shape = tuple(self.context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise ModelError(f"{self.path}: the shape of output {name!r} depends on values; remove such operators")
        return shape, np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))

    def _misfit(self, inputs: Mapping[str, Any], reason: str) -> str:
        seen = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in inputs.items())
        takes = []
        for name in self.input_names:
            least, _, most = (list(shape) for shape in self.engine.get_tensor_profile_shape(name, 0))
            span = f"{least}" if least == most else f"{least} to {most}"
            takes.append(f"{name} {np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))} {span}")
        return (
            f"{self.path}: cannot run on {seen or 'no inputs'} ({reason}); it takes {', '.join(takes)}: widen "
            "batch_range or dynamic_dims in the target, and rebuild the engine"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRtRuntime:
    """Runs engine files that `export.tensorrt_engine.build_engine` wrote, and no others."""

    library: str  # tensorrt, tensorrt-rtx
    cuda_graph: bool = False  # bound runs replay a CUDA graph

    @contextmanager
    def open(self, path: Path, *, num_threads: int) -> Iterator[TensorRtSession]:
        """See `deploypipe.runtimes.Runtime`. The GPU does the work: `num_threads` has no effect."""
        trt, _ = load_library(self.library)
        content = read_engine(path, self.library, str(trt.__version__))
        torch = _torch_with_cuda()
        log = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise ModelError(f"{path}: {self.library} rejects the engine; rebuild it from the ONNX file")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        yield TensorRtSession(
            path=path,
            trt=trt,
            engine=engine,
            context=engine.create_execution_context(),
            stream=torch.cuda.Stream(),
            input_names=tuple(name for name in names if is_input[name]),
            output_names=tuple(name for name in names if not is_input[name]),
            cuda_graph=self.cuda_graph,
        )


def _torch_with_cuda() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeUnavailableError(
            "an engine's inputs and outputs are in torch's GPU memory, and this torch detects no CUDA device; "
            "install a CUDA build of torch"
        )
    return torch
