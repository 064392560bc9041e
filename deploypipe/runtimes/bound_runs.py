"""Runs of one batch in buffers that are allocated once, as a server holds them, and the times of a run's parts.

On a GPU each input and output has pinned memory on the host and memory on the device. A run copies the inputs to the
device, enqueues the network and copies the outputs back, all on one stream, and waits for the end. Its parts have the
names that NVIDIA's `trtexec` gives them.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunParts:
    """Milliseconds of one run on a GPU."""

    enqueue_ms: float  # of the host, until the network is handed to the GPU, which may have begun meanwhile
    h2d_ms: float  # of the GPU: inputs to the device
    compute_ms: float  # of the GPU: the network
    d2h_ms: float  # of the GPU: outputs to the host
    end_to_end_ms: float  # of the host, from the first copy until all outputs are there


class BoundRun(Protocol):
    """One batch, ready to be run again and again."""

    def run(self) -> None:
        """Run the batch; return when its outputs are on the host."""
        ...

    def outputs(self) -> list[Array]:
        """The outputs of the last run, in arrays that the caller owns."""
        ...

    def time_parts(self) -> RunParts | None:
        """Run once and time the parts; None without a GPU."""
        ...


class PlainRun:
    """Runs of a session that reads the caller's arrays where they are: on a processor there is nothing to copy."""

    def __init__(self, run: Callable[[Mapping[str, Array]], list[Array]], inputs: Mapping[str, Array]) -> None:
        self._run, self._inputs = run, inputs
        self._outputs: list[Array] = []

    def run(self) -> None:
        self._outputs = self._run(self._inputs)

    def outputs(self) -> list[Array]:
        return self._outputs

    def time_parts(self) -> RunParts | None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffers:
    """Memory for one batch and its outputs. On a device without a stream (a processor) all copies are immediate."""

    host_inputs: Mapping[str, Any]  # torch tensors by name; pinned for a GPU
    inputs: Mapping[str, Any]  # the same on the device
    outputs: Mapping[str, Any]
    host_outputs: Mapping[str, Any]
    stream: Any | None  # torch.cuda.Stream; None: a processor

    @classmethod
    def allocate(
        cls, batch: Mapping[str, Array], outputs: Mapping[str, Any], device: str, stream: Any | None
    ) -> "Buffers":
        """Buffers that hold the batch already. outputs: for each a (shape, numpy type)."""
        import torch

        is_pinned = stream is not None
        kinds = {name: (array.shape, array.dtype) for name, array in batch.items()}
        host_inputs = {name: _empty(*kind, device="cpu", is_pinned=is_pinned) for name, kind in kinds.items()}
        for name, array in batch.items():
            host_inputs[name].numpy()[...] = array
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            return cls(
                host_inputs=host_inputs,
                inputs={name: _empty(*kind, device=device) for name, kind in kinds.items()},
                outputs={name: _empty(*kind, device=device) for name, kind in outputs.items()},
                host_outputs={name: _empty(*kind, device="cpu", is_pinned=is_pinned) for name, kind in outputs.items()},
                stream=stream,
            )

    def on_stream(self) -> AbstractContextManager[Any]:
        if self.stream is None:
            return nullcontext()
        import torch

        manager: AbstractContextManager[Any] = torch.cuda.stream(self.stream)
        return manager

    def copy_inputs(self) -> None:
        for name, tensor in self.inputs.items():
            tensor.copy_(self.host_inputs[name], non_blocking=True)

    def copy_outputs(self) -> None:
        for name, tensor in self.host_outputs.items():
            tensor.copy_(self.outputs[name], non_blocking=True)

    def wait(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferedRun:
    """Runs in `buffers`. enqueue: start the network on the buffers' stream; it may return before the network ends."""

    buffers: Buffers
    enqueue: Callable[[], object]

    def run(self) -> None:
        with self.buffers.on_stream():
            self.buffers.copy_inputs()
            self.enqueue()
            self.buffers.copy_outputs()
        self.buffers.wait()

    def outputs(self) -> list[Array]:
        return [tensor.numpy().copy() for tensor in self.buffers.host_outputs.values()]

    def time_parts(self) -> RunParts | None:
        if self.buffers.stream is None:
            return None
        import torch

        make_event: Callable[..., Any] = torch.cuda.Event
        begun, copied, computed, ended = (make_event(enable_timing=True) for _ in range(4))
        started = time.perf_counter()
        with self.buffers.on_stream():
            begun.record()
            self.buffers.copy_inputs()
            copied.record()
            before = time.perf_counter()
            self.enqueue()
            after = time.perf_counter()
            computed.record()
            self.buffers.copy_outputs()
            ended.record()
        self.buffers.wait()
        end_to_end = time.perf_counter() - started
        return RunParts(
            enqueue_ms=1e3 * (after - before),
            h2d_ms=begun.elapsed_time(copied),
            compute_ms=copied.elapsed_time(computed),
            d2h_ms=computed.elapsed_time(ended),
            end_to_end_ms=1e3 * end_to_end,
        )


def new_stream(device_index: int) -> Any | None:
    """A stream of its own on a GPU; None if this torch detects no CUDA device."""
    import torch

    make_stream: Callable[..., Any] = torch.cuda.Stream
    return make_stream(device=device_index) if torch.cuda.is_available() else None


def _empty(shape: tuple[int, ...], dtype: Any, *, device: str, is_pinned: bool = False) -> Any:
    import torch

    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=kind, device=device, pin_memory=is_pinned)
