"""Fine-tune the repaired network for a few epochs, with the dense network as its teacher."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from deploypipe.checked_splits import wrap_splits
from deploypipe.data import set_epoch
from deploypipe.distillation_loss import with_distillation_loss
from deploypipe.memory_order import as_given, find_order_
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.recipe import Finetune
from deploypipe.records import EpochEnded, EpochLog, Notify, TrainLog, silent
from deploypipe.task import Splits, Task, channels_last, count_batches, empty_split, first_of, forward
from deploypipe.training.checkpoint import load_checkpoint
from deploypipe.training.epochs import is_worse, least_samples, mean_loss, mean_or_least, train_epoch, validate
from deploypipe.training.non_finite_numbers import diverged
from deploypipe.training.optimizers import make_optimizer, method_text, with_optimizer
from deploypipe.training.ranks import ALONE, Ranks
from deploypipe.training.schedules import make_schedule
from deploypipe.training.teacher import Teacher
from deploypipe.training.train_step import Lesson, mixing_note, seeded
from deploypipe.training.training_precision import with_precision
from deploypipe.training.training_state import TrainingState, agree_, holding, restore_, store_state, weights_of
from deploypipe.user_code_errors import wrap_forward_errors, wrap_task

_PRECISIONS: dict[str, Any] = {"bf16": "bf16-mixed", "fp32": "32-true"}


@wrap_forward_errors()
def finetune(
    pruned: nn.Module,
    dense: nn.Module,
    splits: Splits,
    task: Task,
    settings: Finetune,
    *,
    checkpoint: Path | str | None = None,
    teacher_outputs: Path | str | None = None,
    seed: int = 0,
    notify: Notify = silent,
    ranks: Ranks = ALONE,
    accelerator: str = "auto",
) -> tuple[nn.Module, TrainLog]:
    """Train a copy of `pruned` on `splits.train`; return the last epoch that is no worse on `splits.val` than the best.

    Loss: (1 - w) * task.loss + w * task.distillation_loss against the outputs of the teacher, `dense`. Samples are
    mixed in pairs, so `task.loss` must be a mean over the batch. `task.training_step` replaces this loss, and the
    mixing. Optimizer and schedule: those of `task`, or those of `settings`, which warm up from zero because a large
    first step destroys the repair. Validated and returned: an exponential moving average of the weights.

    An epoch is worse if the paired interval of the difference says so. The best epoch is often best by chance, and one
    with a smaller learning rate generalises better. If all epochs are worse than the start, the start is returned and
    the log says so.

    DataError, on every rank, for the first loss or gradient that is not finite, with epoch, step, batch and cause. A
    batch of one sample that batch norms cannot train on is left out, and the log says so.

    checkpoint: a folder; training resumes from the last whole epoch in it. teacher_outputs: a folder of this teacher's
    outputs, for trainings with the same seed and precision. Only a single rank on a CPU reads and writes it (on a GPU,
    comparing batches takes longer than the teacher's forward pass).

    accelerator: "cpu", "cuda" or "mps"; "auto" is the best that is there. The trained network is returned on the
    device of `pruned`.

    On several `ranks`, all call this with the same arguments, read every batch, and each passes its part of it.
    Batches, steps, rates and gradients are those of one rank, for any number of ranks, which may change at a resume.
    Two things differ: dropout, and batch norms, which see the samples that are passed at once (on CUDA those of all
    ranks, elsewhere of one; with `settings.accumulate`, one part). Rank 0 writes the checkpoint, and all resume from
    it. RanksError, on every rank, if they read different batches.
    """
    pruned, dense = unwrapped(pruned), unwrapped(dense)
    splits, task = wrap_splits(splits), wrap_task(task)
    settings = ranks.tell(with_optimizer(with_precision(settings, accelerator), dense, task))
    steps = _count_batches(ranks, splits)
    if settings.num_epochs == 0:
        log = TrainLog(epochs=(), chosen_epoch=0, reason="no epochs asked for", precision=settings.precision)
        return copied(pruned), log
    checkpoint, outputs = (Path(folder) if folder else None for folder in (checkpoint, teacher_outputs))
    lesson = _prepare(pruned, dense, splits, task, settings, steps, ranks, outputs, accelerator)
    state = TrainingState(best=weights_of(lesson.student), average=weights_of(lesson.student))
    if note := mixing_note(first_of(splits.val, "val")[0], task, settings):
        state.notes.append(note)
    stored, damage = ranks.tell(load_checkpoint(checkpoint) if checkpoint is not None else (None, ""))
    if stored:
        restore_(state, lesson.student, lesson.optimizer, lesson.schedule, stored)
    elif damage:
        state.notes.append(damage)
    if not state.log:
        started = time.perf_counter()
        state.top = validate(lesson, splits)
        _end_epoch_(state, _epoch(0, 0.0, math.nan, float(state.top.mean()), started), notify)
    for epoch in range(len(state.log), settings.num_epochs + 1):
        started = time.perf_counter()
        with seeded(seed * 1_000 + epoch), lesson.teacher.epoch(epoch):
            set_epoch(splits.train, epoch)
            rate, losses = train_epoch(lesson, state, splits.train, epoch, notify)
        agree_(state.average, ranks)
        if not _are_finite(state.average):
            raise diverged(settings, task, epoch)
        with holding(lesson.student, state.average):
            results = validate(lesson, splits)
        # ResNet-56 at 0.5x: 97.24 % on val after epoch 3 and 97.18 after epoch 5, on test 91.56 and 91.84 (LOG.md).
        if not is_worse(results, state.top):
            state.best, state.best_epoch = {n: t.clone() for n, t in state.average.items()}, epoch
            state.top = max(results, state.top, key=mean_or_least)
        _end_epoch_(state, _epoch(epoch, rate, mean_loss(ranks, losses), float(results.mean()), started), notify)
        if checkpoint is not None and ranks.is_first:
            store_state(state, lesson.student, lesson.optimizer, lesson.schedule, checkpoint)
    tuned = copied(pruned)
    tuned.load_state_dict(state.best)
    return tuned, _log_of(state, lesson)


def _prepare(
    pruned: nn.Module,
    dense: nn.Module,
    splits: Splits,
    task: Task,
    settings: Finetune,
    steps: int,
    ranks: Ranks,
    teacher_outputs: Path | None,
    accelerator: str,
) -> Lesson:
    """The student, its teacher and its optimizer, on the device of this rank."""
    fabric = ranks.fabric(_PRECISIONS[settings.precision], accelerator)
    student, teaching = copied(pruned), copied(dense).eval()
    example = first_of(splits.val, "val")[0]
    least = least_samples(student, example)
    orders = [find_order_(network, example) for network in (student, teaching)]
    student = ranks.with_shared_norms(student, fabric.device)
    teacher = Teacher(
        fabric.to_device(teaching),
        folder=teacher_outputs if ranks.count == 1 and fabric.device.type == "cpu" else None,
    )
    plain = make_optimizer(student, task, settings)
    schedule = make_schedule(plain, task, settings, settings.num_epochs * steps)
    model, optimizer = fabric.setup(_compiled(student) if settings.compile else student, plain)
    return Lesson(
        fabric=fabric,
        ranks=ranks,
        student=student,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        teacher=teacher,
        task=_with_distillation_loss(fabric, teacher, splits, task),
        settings=settings,
        steps=steps,
        arrange=as_given if as_given in orders else channels_last,
        least=least,
    )


def _log_of(state: TrainingState, lesson: Lesson) -> TrainLog:
    return TrainLog(
        epochs=tuple(state.log),
        chosen_epoch=state.best_epoch,
        reason="" if state.best_epoch else "every epoch was worse on val than the start, which is kept",
        precision=lesson.settings.precision,
        notes=tuple(state.notes),
        optimizer=method_text(lesson.task, lesson.settings, lesson.schedule),
    )


def _with_distillation_loss(fabric: Fabric, teacher: Teacher, splits: Splits, task: Task) -> Task:
    if task.distillation_loss is not None:
        return task
    inputs, target = first_of(splits.val, "val")
    with torch.no_grad():
        return with_distillation_loss(task, forward(teacher.dense, fabric.to_device(inputs)), target)


def _are_finite(weights: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def _end_epoch_(state: TrainingState, epoch: EpochLog, notify: Notify) -> None:
    state.log.append(epoch)
    notify(EpochEnded(stage="finetune", epoch=epoch))


def _epoch(number: int, rate: float, loss: float, metric: float, started: float) -> EpochLog:
    seconds = time.perf_counter() - started
    return EpochLog(epoch=number, learning_rate=rate, train_loss=loss, val_accuracy=metric, seconds=seconds)


def _count_batches(ranks: Ranks, splits: Splits) -> int:
    count = count_batches(splits.train)
    if count == 0:
        raise empty_split("train")
    ranks.check_equal({"number of train batches": str(count)}, "give every rank the whole `train`")
    return count


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]  # a module, of a module
