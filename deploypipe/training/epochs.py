"""One epoch of a fine-tuning: a step for each batch, and the metric on val."""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploypipe.benchmark.forward_passes import network_passes
from deploypipe.errors import DataError
from deploypipe.networks.model_copies import copied
from deploypipe.numerics.intervals import seems_worse
from deploypipe.records import Note, Notify, Progress
from deploypipe.scheduling.exclusive_measurement import yield_to_measurements
from deploypipe.split_fingerprints import fingerprint_of
from deploypipe.task import Batch, Splits, forward, num_samples, take
from deploypipe.training.non_finite_numbers import Step, Suspects, lost
from deploypipe.training.ranks import Ranks
from deploypipe.training.schedules import current_rate
from deploypipe.training.train_step import Lesson, backward, seeded
from deploypipe.training.training_state import TrainingState, average_
from deploypipe.user_code_errors import wrap_user_errors


def train_epoch(
    lesson: Lesson, state: TrainingState, batches: Iterable[Batch], epoch: int, notify: Notify
) -> tuple[float, list[Tensor]]:
    """Train one step for each batch; return the last learning rate and the losses of this rank."""
    settings, optimizer, total = lesson.settings, lesson.optimizer, lesson.settings.num_epochs * lesson.steps
    rate, losses = 0.0, []
    lesson.model.train()
    for number, batch in enumerate(_in_one_order(lesson.ranks, batches, epoch)):
        yield_to_measurements()
        done = (epoch - 1) * lesson.steps + number
        if num_samples(batch[0]) < lesson.least:
            _note_left_out_(state, number, num_samples(batch[0]), notify)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a schedule that is stepped before the optimizer
                _step_schedule(lesson)
            continue
        rate = current_rate(lesson.schedule)
        optimizer.zero_grad(set_to_none=True)
        losses.append(backward(lesson, batch, done))
        # A network that lost much starts far from its teacher: its first gradients are 20 times the later ones,
        # and without a limit one narrow network ended at 17 % where it now ends at 48 (pipelines/LOG.md).
        norm = lesson.fabric.clip_gradients(
            lesson.model, optimizer, max_norm=settings.max_gradient_norm, error_if_nonfinite=False
        )
        _require_finite(lesson, batch, Step(number=done + 1, epoch=epoch, batch=number), float(losses[-1]), norm)
        with _wrap_errors_of(lesson.task.optimizer, "the optimizer of task().optimizer"):
            optimizer.step()
        _step_schedule(lesson)
        average_(state.average, lesson.student, min(settings.average_decay, (done + 1) / (done + 10)))
        notify(Progress(stage="finetune", done=done + 1, total=total, message=f"epoch {epoch}"))
    if not losses:
        raise DataError(
            f"`train` gave no batch of {lesson.least} or more samples in epoch {epoch}; return a source that can be "
            "read again, with larger batches"
        )
    return rate, losses


def _step_schedule(lesson: Lesson) -> None:
    with _wrap_errors_of(lesson.task.schedule, "the schedule of task().schedule"):
        lesson.schedule.step()


def _wrap_errors_of(users: object, name: str) -> AbstractContextManager[None]:
    """Around a step of what the task's function returned; ours is left alone."""
    return wrap_user_errors(f"{name}, in step(),") if users is not None else nullcontext()


def _note_left_out_(state: TrainingState, number: int, size: int, notify: Notify) -> None:
    note = f"batch {number} of an epoch was left out: it holds {size} sample, and the network trains on two or more"
    if note not in state.notes:
        state.notes.append(note)
        notify(Note(stage="finetune", text=note))


def _require_finite(lesson: Lesson, batch: Batch, step: Step, loss: float, norm: Any) -> None:
    """Raise DataError if the step's loss or gradients are not finite; on all ranks, which share the gradients."""
    if math.isfinite(loss) and math.isfinite(float(norm)):
        return
    to_device = lesson.fabric.to_device
    suspects = Suspects(
        student=lesson.student,
        run_student=lambda inputs: forward(lesson.model, lesson.arrange(to_device(inputs))),
        run_teacher=lambda inputs: forward(lesson.teacher.dense, lesson.arrange(to_device(inputs))),
        task=lesson.task,
        settings=lesson.settings,
    )
    raise lost(suspects, to_device(batch), step, loss, float(norm))


def _in_one_order(ranks: Ranks, batches: Iterable[Batch], epoch: int) -> Iterator[Batch]:
    """The batches of an epoch; RanksError if ranks start with different batches."""
    for number, (inputs, target) in enumerate(batches):
        if number == 0 and ranks.count > 1:
            ranks.check_equal(
                {f"first train batch in epoch {epoch}": fingerprint_of([((), target)])},
                "let `train` draw its order from set_epoch(epoch) or torch's own generator alone",
            )
        yield inputs, target


def mean_loss(ranks: Ranks, losses: list[Tensor]) -> float:
    return sum(ranks.gather(sum(map(float, losses)) / len(losses))) / ranks.count


def validate(lesson: Lesson, splits: Splits) -> NDArray[np.float64]:
    """The metric of each val sample, (samples,). Whole batches are distributed over the ranks; on a CPU each rank runs
    them in pieces (`benchmark.forward_passes`)."""
    ranks, to_device = lesson.ranks, lesson.fabric.to_device
    lesson.model.eval()
    # Compiling again for validation would take longer than it saves.
    eager = torch.compiler.set_stance("force_eager") if lesson.settings.compile else nullcontext()
    with network_passes(lesson.model) as passes, eager:
        own = {
            number: lesson.task.metric(passes.run([lesson.arrange(to_device(inputs))])[0], to_device(y)).cpu()
            for number, (inputs, y) in enumerate(splits.val)
            if number % ranks.count == ranks.rank
        }
    parts = {number: values for rank in ranks.gather(own) for number, values in rank.items()}
    return torch.cat([parts[number] for number in sorted(parts)]).double().numpy()


def is_worse(results: NDArray[np.float64], top: NDArray[np.float64]) -> bool:
    """Whether an epoch's val results are worse than another's, both (samples,)."""
    if not np.isfinite(results).all():
        return True
    if mean_or_least(results) >= mean_or_least(top):
        return False
    return seems_worse(results, top)


def mean_or_least(results: NDArray[np.float64]) -> float:
    return float(results.mean()) if np.isfinite(results).all() else -math.inf


def least_samples(model: nn.Module, inputs: Any) -> int:
    """The number of samples that a batch needs: 2 if one sample fails, like batch norms of vectors; otherwise 1."""
    probe = copied(model).train()
    try:
        with torch.no_grad(), seeded(0):
            forward(probe, take(inputs, 1))
    except (ValueError, RuntimeError, IndexError):
        return 2
    return 1
