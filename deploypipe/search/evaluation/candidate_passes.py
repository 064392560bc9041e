"""Run a candidate by its file, up to four times as fast as eager torch; by the network where the file cannot run.

Measured by `benchmarks/judging_cost.py`: large images gain most, CIFAR-size networks on an idle core nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploypipe.benchmark.forward_passes import ForwardPasses, Passes, network_passes, piece_size, session_passes
from deploypipe.compute_device import CPU
from deploypipe.errors import DataError, DeploypipeError
from deploypipe.export.onnx_export.dynamic_axes import require_constants
from deploypipe.export.onnx_export.export_onnx import run_eager
from deploypipe.export.onnx_export.parity import measure_parity, require_parity
from deploypipe.recipe import Export
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.task import take

OnFallback = Callable[[str], None]  # is called with the reason


@contextmanager
def candidate_passes(
    network: nn.Module, file: Path, inputs: Any, settings: Export, device: torch.device, on_fallback: OnFallback
) -> Iterator[Passes]:
    """Run `network`, which is on the CPU, on `device`: by its fp32 ONNX file on the CPU, by eager torch on a GPU.

    ONNX Runtime on the CPU runs the file, whatever runtime the target has: accuracies of all targets are comparable.
    The file is first compared with the network on a few samples of `inputs`, a batch. If it cannot be opened, differs
    by more than `settings.max_abs_error`, or rejects a later batch, the network runs itself in eager torch.
    """
    with ExitStack() as stack:
        eager = stack.enter_context(network_passes(network, device))
        if device != CPU:
            yield eager
            return
        try:
            session = stack.enter_context(OnnxRuntime().open(file, num_threads=1))
            few = take(inputs, max(2, piece_size(inputs)))
            _, expected = run_eager(network, [few])
            require_parity(measure_parity(session, [few], expected), settings, file)
        except DeploypipeError as error:
            on_fallback(str(error))
            yield eager
            return
        by_file = session_passes(session, num_parallel=torch.get_num_threads())
        yield _FileFirst(by_file, eager, inputs, on_fallback)


class _FileFirst:
    """Runs batches by the file until it rejects one, and all from there on by the network."""

    def __init__(self, by_file: ForwardPasses, eager: ForwardPasses, example: Any, on_fallback: OnFallback) -> None:
        self._current = by_file
        self._by_file, self._eager, self._example, self._on_fallback = by_file, eager, example, on_fallback

    def load_of(self, inputs: Any) -> float:
        return self._current.load_of(inputs)

    def run(self, batches: Sequence[Any]) -> list[Any]:
        if self._current is self._by_file:
            try:
                require_constants([self._example, *batches])
                return self._by_file.run(batches)
            except DataError as error:  # a length, or a flag, that the file does not have
                self._on_fallback(str(error))
                self._current = self._eager
        return self._eager.run(batches)
