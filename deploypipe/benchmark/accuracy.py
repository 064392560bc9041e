"""Evaluate the task's metric on each sample, for a network or an exported file: same batches, same code."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploypipe.compute_device import CPU, exact_float32, network_on, to_device
from deploypipe.errors import DataError
from deploypipe.runtimes import Runtime
from deploypipe.runtimes.named_arrays import feed, name_outputs, repack
from deploypipe.scheduling.exclusive_measurement import yield_to_measurements
from deploypipe.task import Batch, Task, evaluating, forward, num_samples


def evaluate_module(
    model: nn.Module, batches: Iterable[Batch], task: Task, *, device: torch.device | None = None
) -> NDArray[np.float64]:
    """(samples,) metric of a network in eval mode. The network's mode is restored.

    device: where a copy of the network and each batch are moved to; the metric gets the outputs on the CPU, as a file
    gives them. None: the batches are on the network's device already.

    Raises DataError for an empty split, for outputs that are not finite, and for a metric that does not return one
    finite value per sample.
    """
    there, back = network_on(model, device), CPU if device else None

    def call(inputs: Any) -> Any:
        return to_device(forward(there, to_device(inputs, device)), back)

    with evaluating(there), torch.no_grad(), exact_float32(device):
        return _evaluate(call, batches, task, type(model).__name__)


def evaluate_file(
    path: Path, batches: Iterable[Batch], task: Task, runtime: Runtime, num_threads: int
) -> NDArray[np.float64]:
    """(samples,) metric of an exported file; raises as `evaluate_module` does, and what `runtime.open` raises."""
    with runtime.open(path, num_threads=num_threads) as session:

        def call(inputs: Any) -> Any:
            return repack(session.output_names, session.run(feed(inputs, session.input_names)))

        return _evaluate(call, batches, task, path.name)


def _evaluate(call: Callable[[Any], Any], batches: Iterable[Batch], task: Task, who: str) -> NDArray[np.float64]:
    values = []
    for number, (inputs, target) in enumerate(batches):
        yield_to_measurements()
        outputs = call(inputs)
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
        values.append(metric.numpy())
    if not values or sum(map(len, values)) == 0:
        raise DataError(f"{who}: the split has no samples; load_data() must return batches that can be read repeatedly")
    return np.concatenate(values)
