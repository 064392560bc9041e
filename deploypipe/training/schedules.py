"""The learning rates of a fine-tuning: the recipe's schedule, or the task's own."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from deploypipe.errors import PipelineError
from deploypipe.recipe import Finetune
from deploypipe.task import Task

# The share of the peak after the warm-up. x: the share of the steps that are done since.
_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "constant": lambda x: 1.0,
}


def rate_share(settings: Finetune, step: int, num_steps: int) -> float:
    """The share of the peak learning rate at a step: linear from zero during the warm-up, then the schedule's decay."""
    warmup = max(1, round(num_steps * settings.warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return _DECAYS[settings.schedule]((step - warmup) / max(1, num_steps - warmup))


def make_schedule(optimizer: Optimizer, task: Task, settings: Finetune, num_steps: int) -> LRScheduler:
    """The schedule, which is stepped after every batch. The optimizer's own learning rates are the peaks.

    PipelineError if the task's schedule changes the learning rates of another optimizer.
    """
    if task.schedule is not None:
        schedule: LRScheduler = task.schedule(optimizer, num_steps)
        if getattr(schedule, "optimizer", None) is not optimizer:
            raise PipelineError(
                "task().schedule returned a schedule of another optimizer, so the learning rates of this training "
                "would never change; make it from the optimizer that it is given: "
                "lambda optimizer, num_steps: OneCycleLR(optimizer, 0.1, num_steps)"
            )
        return schedule
    return LambdaLR(optimizer, lambda step: rate_share(settings, step, num_steps))


def current_rate(schedule: LRScheduler) -> float:
    """The largest learning rate of the next step."""
    return max(map(float, schedule.get_last_lr()))
