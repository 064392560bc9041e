"""Evaluate the task's metric on each sample, for a network or an exported file: same batches, same code."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploypipe.benchmark.forward_passes import Passes, network_passes, session_passes
from deploypipe.errors import DataError
from deploypipe.runtimes import Runtime
from deploypipe.runtimes.named_arrays import name_outputs
from deploypipe.runtimes.onnxruntime import PROVIDERS, OnnxRuntime
from deploypipe.scheduling.exclusive_measurement import yield_to_measurements
from deploypipe.task import Batch, Task, num_samples


def evaluate_module(
    model: nn.Module, batches: Iterable[Batch], task: Task, *, device: torch.device | None = None
) -> NDArray[np.float64]:
    """(samples,) metric of a network in eval mode. The network's mode is restored.

    device: where a copy of the network and each batch are moved to; the metric gets the outputs on the CPU, as a file
    gives them. None: the batches are on the network's device already.

    The network runs in pieces of a batch (`forward_passes`); the metric is called on each batch as it came.

    Raises DataError for an empty split, for outputs that are not finite, and for a metric that does not return one
    finite value per sample.
    """
    with network_passes(model, device) as passes:
        return evaluate(passes, batches, task, type(model).__name__)


def evaluate_file(
    path: Path, batches: Iterable[Batch], task: Task, runtime: Runtime, num_threads: int
) -> NDArray[np.float64]:
    """(samples,) metric of an exported file; raises as `evaluate_module` does, and what `runtime.open` raises.

    num_threads: of a session that gets whole batches. ONNX Runtime on the CPU gets pieces instead, one for each of
    torch's threads at a time.
    """
    if isinstance(runtime, OnnxRuntime) and runtime.provider == PROVIDERS["cpu"]:
        with runtime.open(path, num_threads=1) as session:
            passes = session_passes(session, num_parallel=torch.get_num_threads())
            return evaluate(passes, batches, task, path.name)
    with runtime.open(path, num_threads=num_threads) as session:
        return evaluate(session_passes(session, is_split=False), batches, task, path.name)


def evaluate(passes: Passes, batches: Iterable[Batch], task: Task, who: str) -> NDArray[np.float64]:
    """(samples,) metric of what `passes` runs; raises as `evaluate_module` does. who: its name in errors."""
    values = []
    number = 0
    for window in _windows(batches, passes):
        yield_to_measurements()
        for (inputs, target), outputs in zip(window, passes.run([inputs for inputs, _ in window]), strict=True):
            values.append(_metric(inputs, target, outputs, task, who, number))
            number += 1
    if not values or sum(map(len, values)) == 0:
        raise DataError(f"{who}: the split has no samples; load_data() must return batches that can be read repeatedly")
    return np.concatenate(values)


def _windows(batches: Iterable[Batch], passes: Passes) -> Iterator[list[Batch]]:
    """Consecutive batches that together keep all threads of `passes` at work; the last ones may be too few."""
    window: list[Batch] = []
    load = 0.0
    for batch in batches:
        window.append(batch)
        load += passes.load_of(batch[0])
        if load >= 1:
            yield window
            window, load = [], 0.0
    if window:
        yield window


def _metric(inputs: object, target: object, outputs: object, task: Task, who: str, number: int) -> NDArray[np.float64]:
    """The metric of one batch's samples. number: of the batch, for errors."""
    for name, tensor in name_outputs(outputs).items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"{who}: output {name!r} holds NaN or infinity on batch {number}; check the inputs")
    metric = task.metric(outputs, target).detach().cpu().to(torch.float64)
    if metric.shape != (num_samples(inputs),):
        raise DataError(
            f"the metric {task.name!r} gives shape {list(metric.shape)} for {num_samples(inputs)} samples; "
            "return one value per sample"
        )
    if not torch.isfinite(metric).all():
        raise DataError(f"{who}: the metric {task.name!r} is NaN or infinite on batch {number}; check the targets")
    values: NDArray[np.float64] = metric.numpy()
    return values
