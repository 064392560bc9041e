"""Try the task's own training functions once, before anything long starts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from deploypipe.errors import DataError, ModelError, PipelineError
from deploypipe.networks.model_copies import copied
from deploypipe.recipe import Finetune
from deploypipe.task import Batch, Task, evaluating, forward
from deploypipe.training.optimizers import make_optimizer, untrained_text, with_optimizer
from deploypipe.training.schedules import make_schedule
from deploypipe.training.training_state import packed, unpack_
from deploypipe.user_code_errors import wrap_user_errors

_NUM_STEPS = 10  # that the schedule is made for if the number of batches is not known
_MAX_STEPS = 100_000  # that the schedule is tried for: about a second


def has_own_training(task: Task) -> bool:
    return any(function is not None for function in (task.optimizer, task.schedule, task.training_step))


def try_own_training(
    network: nn.Module, task: Task, settings: Finetune, batch: Batch, num_batches: int | None = None
) -> list[str]:
    """Make one training step with the task's functions on a copy, then store and restore its state. Return notes.

    task: wrapped by `wrap_task`, so that its exceptions name the function. num_batches: of the train split, None if it
    is not known; the schedule is stepped as often as fine-tuning will. Raises DeploypipeError for the first fault.
    """
    num_steps = _NUM_STEPS if num_batches is None else settings.num_epochs * num_batches
    settings = with_optimizer(settings, network, task)
    student = copied(network).train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        optimizer = make_optimizer(student, task, settings)
        schedule = make_schedule(optimizer, task, settings, num_steps)
        _loss(network, student, task, settings, batch).backward()  # type: ignore[no-untyped-call]
        with wrap_user_errors("the optimizer of task().optimizer, in step(),"):
            optimizer.step()
        if task.schedule is not None:
            _step_through(schedule, num_steps)
    _require_restorable(optimizer, schedule)
    note = untrained_text(optimizer, student)
    return [note] if note else []


def _step_through(schedule: LRScheduler, num_steps: int) -> None:
    what = "the schedule of task().schedule, in step()"
    with wrap_user_errors(f"{what},", "return one whose step() takes nothing"):
        schedule.step()
    for number in range(2, min(num_steps, _MAX_STEPS) + 1):
        with wrap_user_errors(f"{what} number {number} of {num_steps},", "make it for the num_steps that it is given"):
            schedule.step()


def _loss(network: nn.Module, student: nn.Module, task: Task, settings: Finetune, batch: Batch) -> Tensor:
    inputs, target = batch
    if task.training_step is None:
        return task.loss(forward(student, inputs), target)
    expected = None
    if settings.distil_weight:
        with evaluating(network), torch.no_grad():
            expected = forward(network, inputs)
    loss = task.training_step(student, batch, expected)
    if not torch.isfinite(loss):
        raise DataError(f"task().training_step returned {loss.item()} on the first batch of the train split; check it")
    if not loss.requires_grad:
        raise ModelError(
            "the loss of task().training_step cannot be differentiated; use no detach() or no_grad() in it"
        )
    return loss


def _require_restorable(optimizer: Any, schedule: Any) -> None:
    """A killed training resumes from the state of both."""
    for name, part in (("optimizer", optimizer), ("schedule", schedule)):
        with wrap_user_errors(f"storing and restoring the state of task().{name}", "correct its state_dict()"):
            try:
                stored = packed(part)
            except TypeError as error:
                raise PipelineError(
                    f"the {name} of task().{name} keeps more than tensors, numbers and text in its state_dict() "
                    f"({error}), so a killed training could not resume; use another one"
                ) from None
            unpack_(stored, part)
