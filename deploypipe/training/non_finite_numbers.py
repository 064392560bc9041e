"""Explain NaN or infinity in a training: where it came from, and what to do."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.errors import DataError
from deploypipe.networks.batch_trees import tensors
from deploypipe.recipe import Finetune
from deploypipe.runtimes.named_arrays import name_outputs
from deploypipe.task import Batch, Task
from deploypipe.training.optimizers import default_rate

_MAX_NAMED = 5  # samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The step of a training that an error names."""

    number: int  # of the whole training, from 1
    epoch: int
    batch: int  # of the epoch, from 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspects:
    """The possible causes of a loss or gradient that is not finite."""

    student: nn.Module
    run_student: Callable[[Any], Any]
    run_teacher: Callable[[Any], Any]
    task: Task
    settings: Finetune


def lost(suspects: Suspects, batch: Batch, step: Step, loss: float, norm: float) -> DataError:
    """The error for a step whose loss or gradients are not finite: the step, and the first cause found."""
    seen = f"the norm of the gradients is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    place = f"epoch {step.epoch}, step {step.number} (batch {step.batch} of the epoch)"
    return DataError(f"fine-tuning: {seen} in {place}: {_cause(suspects, batch)}")


def diverged(settings: Finetune, task: Task, epoch: int) -> DataError:
    """The error for weights that are no longer finite at the end of an epoch."""
    return DataError(
        f"fine-tuning: {_weights_are_lost(settings, task)} in epoch {epoch}; {_lower_rate(settings, task)}"
    )


def _cause(suspects: Suspects, batch: Batch) -> str:
    lower_rate = _lower_rate(suspects.settings, suspects.task)
    for name, part in (("inputs", batch[0]), ("targets", batch[1])):
        if odd := _odd_samples(part):
            named = ", ".join(map(str, odd[:_MAX_NAMED])) + (", ..." if len(odd) > _MAX_NAMED else "")
            return f"the {name} of sample {named} hold NaN or infinity; correct or remove such samples of `train`"
    if not all(bool(torch.isfinite(parameter).all()) for parameter in suspects.student.parameters()):
        return f"{_weights_are_lost(suspects.settings, suspects.task)}; {lower_rate}"
    with torch.no_grad():
        if not _is_finite(suspects.run_teacher(batch[0])):
            return "the dense network's own outputs for this batch are not finite; check the samples and its weights"
        outputs = suspects.run_student(batch[0])
        if not _is_finite(outputs):
            return f"the network's outputs are not finite; {lower_rate}"
        if suspects.task.training_step is not None:
            return "task().training_step is not finite for finite outputs; check it and the targets of this batch"
        if not torch.isfinite(suspects.task.loss(outputs, batch[1])):
            return "task().loss is not finite for finite outputs; check the loss and the targets of this batch"
    return f"neither the samples nor the weights hold any; {lower_rate}"


def _odd_samples(part: Any) -> list[int]:
    """The samples of a batch's inputs or targets that are not finite."""
    odd: set[int] = set()
    for tensor in tensors(part):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim():
            odd.update((~torch.isfinite(tensor)).flatten(1 if tensor.dim() > 1 else 0).cpu().nonzero()[:, 0].tolist())
    return sorted(odd)


def _is_finite(outputs: Any) -> bool:
    named = name_outputs(outputs).values()
    return all(bool(torch.isfinite(tensor).all()) for tensor in named if tensor.is_floating_point())


def _weights_are_lost(settings: Finetune, task: Task) -> str:
    rate = "" if task.optimizer else f" at a learning rate of {settings.learning_rate}"
    return f"training diverged{rate}, and weights are no longer finite"


def _lower_rate(settings: Finetune, task: Task) -> str:
    precision = ", or finetune.precision=fp32" if settings.precision == "bf16" else ""
    if task.optimizer is not None:
        return f"set a lower learning rate in task().optimizer{precision}"
    assert settings.learning_rate is not None
    lower = min(settings.learning_rate / 10, default_rate(settings.optimizer))
    return f"set a lower finetune.learning_rate, such as {lower:g}{precision}"
