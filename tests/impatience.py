"""Runs in tests measure for a moment, in one process, and wait for no quiet machine; an export is a third cheaper."""

from contextlib import suppress
from functools import cache

from deploypipe.benchmark import latency, memory


def hurry() -> None:
    """For this process, and those that it forks."""
    latency._SECONDS, latency._PAUSE_SECONDS, latency._MAX_CHECKS = 0.2, 0.0, 0
    memory._NUM_CHILDREN = 1
    with suppress(ImportError):  # it is private to torch, which makes its table of 700 operators again for each file
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
