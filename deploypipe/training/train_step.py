"""One step of a fine-tuning: mixed samples, the loss against the teacher, and the gradients."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from deploypipe.errors import ModelError
from deploypipe.memory_order import Arrange, SafeConvolutions
from deploypipe.networks.batch_trees import leaves
from deploypipe.recipe import Finetune
from deploypipe.task import Batch, Task, forward, has_batch_axis, map_samples, num_samples
from deploypipe.training.ranks import Part, Ranks
from deploypipe.training.teacher import Teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """The parts of a training that do not change between steps."""

    fabric: Fabric
    ranks: Ranks
    student: nn.Module
    model: Any  # the student in Fabric's wrapper
    optimizer: Any  # in Fabric's wrapper
    schedule: LRScheduler
    teacher: Teacher
    task: Task
    settings: Finetune
    steps: int  # of an epoch
    arrange: Arrange  # the memory order of inputs
    least: int  # samples that a batch needs


def backward(lesson: Lesson, batch: Batch, step: int) -> Tensor:
    """Leave the gradients of the batch's loss in the model. The mean of the returned value over ranks is that loss."""
    if lesson.ranks.count == 1:
        batch = lesson.fabric.to_device(batch)  # once, not again for the samples that are mixed in
    has_own_step = lesson.task.training_step is not None
    share = 0.0 if has_own_step else _draw_share(batch[0], lesson.settings.mix_share)
    parts = lesson.ranks.parts(num_samples(batch[0]), lesson.settings.accumulate, lesson.least)
    losses = []
    with own_dropout(lesson.ranks, step), _compiling(lesson.settings), SafeConvolutions():
        for part in parts:
            with lesson.fabric.no_backward_sync(lesson.model, enabled=part is not parts[-1]):
                found = _task_step(lesson, batch, part) if has_own_step else _distilled_loss(lesson, batch, part, share)
                loss = part.weight * found
                lesson.fabric.backward(loss)
            losses.append(loss.detach())
    return torch.stack(losses).sum()


def _task_step(lesson: Lesson, batch: Batch, part: Part) -> Tensor:
    """The loss that the task's own training step returns for the part's samples."""

    def own(tensor: Tensor) -> Tensor:
        return lesson.fabric.to_device(tensor[part.start : part.end])

    assert lesson.task.training_step is not None
    size = num_samples(batch[0])
    inputs, target = (lesson.fabric.to_device(map_samples(own, tree, size)) for tree in batch)
    inputs = lesson.arrange(inputs)
    expected = _taught(lesson, inputs) if lesson.settings.distil_weight else None
    return lesson.task.training_step(lesson.model, (inputs, target), expected)


def _distilled_loss(lesson: Lesson, batch: Batch, part: Part, share: float) -> Tensor:
    """The mean over the part's samples, each with a share of the one at its mirror place in the batch."""
    task, to_device = lesson.task, lesson.fabric.to_device

    def own(tensor: Tensor) -> Tensor:
        return to_device(tensor[part.start : part.end])

    def mirrored(tensor: Tensor) -> Tensor:
        return to_device(tensor[len(tensor) - part.end : len(tensor) - part.start]).flip(0)

    def mixed(tensor: Tensor) -> Tensor:
        return torch.lerp(own(tensor), mirrored(tensor), share) if share else own(tensor)

    size = num_samples(batch[0])
    inputs = lesson.arrange(to_device(map_samples(mixed, batch[0], size)))
    outputs = forward(lesson.model, inputs)
    loss = task.loss(outputs, to_device(map_samples(own, batch[1], size)))
    if share:
        mirror = to_device(map_samples(mirrored, batch[1], size))
        loss = (1 - share) * loss + share * task.loss(outputs, mirror)
    weight, temperature = lesson.settings.distil_weight, lesson.settings.distil_temperature
    if weight == 0:
        return loss
    expected = _taught(lesson, inputs)
    assert task.distillation_loss is not None
    return (1 - weight) * loss + weight * task.distillation_loss(outputs, expected, temperature)


def _taught(lesson: Lesson, inputs: Any) -> Any:
    """The dense network's outputs."""
    with torch.no_grad(), lesson.fabric.autocast():
        return lesson.teacher(inputs)


def _draw_share(inputs: Any, largest: float) -> float:
    """The share of another sample to mix into each sample of a batch (mixup, arXiv:1710.09412).

    The dense network has memorised the training samples, and its outputs for them say little more than their labels.
    Its outputs for mixed samples say more (arXiv:2106.05237).
    """
    if not largest or find_unmixable(inputs):
        return 0.0
    return largest * float(torch.rand(()))


def mixing_note(inputs: Any, task: Task, settings: Finetune) -> str:
    """Why samples are not mixed although the recipe asks for it; "" if they are."""
    place = find_unmixable(inputs) if settings.mix_share and task.training_step is None else ""
    return f"samples are not mixed in training (finetune.mix_share): {place} holds no floats" if place else ""


def find_unmixable(inputs: Any) -> str:
    """The first member of a batch that cannot be mixed because it is not float (token ids); "" if all can."""
    size = num_samples(inputs)
    samples = (leaf for leaf in leaves(inputs) if has_batch_axis(leaf.value, size))
    return next((leaf.place for leaf in samples if not leaf.value.is_floating_point()), "")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, shuffling and dropout depend on the seed alone; afterwards the caller's random state is restored."""
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


def own_dropout(ranks: Ranks, step: int) -> AbstractContextManager[None]:
    """Give each rank random numbers of its own, so that order and mixing do not depend on the rank or the network."""
    return seeded(torch.initial_seed() + 1 + step * ranks.count + ranks.rank)


@contextmanager
def _compiling(settings: Finetune) -> Iterator[None]:
    """Raise ModelError if torch.compile fails on the network."""
    if not settings.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    try:
        yield
    except TorchDynamoException as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise ModelError(
            f"finetune.compile: torch.compile cannot compile this network here ({reason}); "
            "write finetune.compile=false, or see to what it names"
        ) from error
