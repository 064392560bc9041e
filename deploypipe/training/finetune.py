"""Fine-tune the repaired network for a few epochs, with the dense network as its teacher."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from deploypipe.distillation_loss import with_distillation_loss
from deploypipe.errors import DataError, ModelError
from deploypipe.memory_order import Arrange, SafeConvolutions, as_given, find_order_
from deploypipe.networks.batch_trees import tensors
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.numerics.intervals import seems_worse
from deploypipe.recipe import Finetune
from deploypipe.records import EpochLog, Note, Notify, Progress, TrainLog, silent
from deploypipe.scheduling.exclusive_measurement import yield_to_measurements
from deploypipe.task import (
    Batch,
    Splits,
    Task,
    channels_last,
    count_batches,
    empty_split,
    first_of,
    forward,
    has_batch_axis,
    map_samples,
    num_samples,
    take,
)
from deploypipe.tensor_batches import fingerprint_of
from deploypipe.training.checkpoint import Checkpoint, load_checkpoint, store_checkpoint
from deploypipe.training.non_finite_numbers import Step, Suspects, diverged, lost
from deploypipe.training.ranks import ALONE, Part, Ranks
from deploypipe.training.teacher import Teacher
from deploypipe.training.training_precision import with_precision
from deploypipe.user_code_errors import wrap_forward_errors, wrap_splits, wrap_task

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
) -> tuple[nn.Module, TrainLog]:
    """Train a copy of `pruned` on `splits.train`; return the last epoch that is no worse on `splits.val` than the best.

    Loss: (1 - w) * task.loss + w * task.distillation_loss against the outputs of the teacher, `dense`. Samples are
    mixed in pairs, so `task.loss` must be a mean over the batch. SGD with Nesterov momentum, warm-up from zero and
    cosine decay, because a large first step destroys the repair. Validated and returned: an exponential moving average
    of the weights.

    An epoch is worse if the paired interval of the difference says so. The best epoch is often best by chance, and one
    with a smaller learning rate generalises better. If all epochs are worse than the start, the start is returned and
    the log says so.

    DataError, on every rank, for the first loss or gradient that is not finite, with epoch, step, batch and cause. A
    batch of one sample that batch norms cannot train on is left out, and the log says so.

    checkpoint: a folder; training resumes from the last whole epoch in it. teacher_outputs: a folder of this teacher's
    outputs, for trainings with the same seed and precision. Only a single rank on a CPU reads and writes it (on a GPU,
    comparing batches takes longer than the teacher's forward pass).

    On several `ranks`, all call this with the same arguments, read every batch, and each passes its part of it.
    Batches, steps, rates and gradients are those of one rank, for any number of ranks, which may change at a resume.
    Two things differ: dropout, and batch norms, which see the samples that are passed at once (on CUDA those of all
    ranks, elsewhere of one; with `settings.accumulate`, one part). Rank 0 writes the checkpoint, and all resume from
    it. RanksError, on every rank, if they read different batches.
    """
    pruned, dense = unwrapped(pruned), unwrapped(dense)
    splits, task = wrap_splits(splits), wrap_task(task)
    settings = ranks.tell(with_precision(settings))
    steps = _count_batches(ranks, splits)
    if settings.num_epochs == 0:
        log = TrainLog(epochs=(), chosen_epoch=0, reason="no epochs asked for", precision=settings.precision)
        return copied(pruned), log
    checkpoint, outputs = (Path(folder) if folder else None for folder in (checkpoint, teacher_outputs))
    lesson = _prepare(pruned, dense, splits, task, settings, steps, ranks, outputs)
    state = _State(best=_weights(lesson.student), average=_weights(lesson.student))
    stored, damage = ranks.tell(load_checkpoint(checkpoint) if checkpoint is not None else (None, ""))
    if stored:
        _restore_(state, lesson.student, lesson.optimizer, stored)
    elif damage:
        state.notes.append(damage)
    if not state.log:
        started = time.perf_counter()
        state.top = _validate(lesson, splits)
        state.log.append(_epoch(0, 0.0, math.nan, float(state.top.mean()), started))
    for epoch in range(len(state.log), settings.num_epochs + 1):
        started = time.perf_counter()
        with _seeded(seed * 1_000 + epoch), lesson.teacher.epoch(epoch):
            _tell_epoch(splits.train, epoch)
            rate, losses = _train_epoch(lesson, state, splits.train, epoch, notify)
        _agree_(state.average, ranks)
        if not _are_finite(state.average):
            raise diverged(settings, epoch)
        with _holding(lesson.student, state.average):
            results = _validate(lesson, splits)
        # ResNet-56 at 0.5x: 97.24 % on val after epoch 3 and 97.18 after epoch 5, on test 91.56 and 91.84 (LOG.md).
        if not _is_worse(results, state.top):
            state.best, state.best_epoch = {n: t.clone() for n, t in state.average.items()}, epoch
            state.top = max(results, state.top, key=_mean_or_least)
        state.log.append(_epoch(epoch, rate, _mean(ranks, losses), float(results.mean()), started))
        if checkpoint is not None and ranks.is_first:
            _store(state, lesson.student, lesson.optimizer, checkpoint)
    tuned = copied(pruned)
    tuned.load_state_dict(state.best)
    return tuned, _log_of(state, settings)


def _prepare(
    pruned: nn.Module,
    dense: nn.Module,
    splits: Splits,
    task: Task,
    settings: Finetune,
    steps: int,
    ranks: Ranks,
    teacher_outputs: Path | None,
) -> "_Lesson":
    """The student, its teacher and its optimizer, on the device of this rank."""
    fabric = ranks.fabric(_PRECISIONS[settings.precision])
    student, teaching = copied(pruned), copied(dense).eval()
    example = first_of(splits.val, "val")[0]
    least = least_samples(student, example)
    orders = [find_order_(network, example) for network in (student, teaching)]
    student = ranks.with_shared_norms(student)
    teacher = Teacher(
        fabric.to_device(teaching),
        folder=teacher_outputs if ranks.count == 1 and fabric.device.type == "cpu" else None,
    )
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=0.0,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    model, optimizer = fabric.setup(_compiled(student) if settings.compile else student, optimizer)
    return _Lesson(
        fabric=fabric,
        ranks=ranks,
        student=student,
        model=model,
        optimizer=optimizer,
        teacher=teacher,
        task=_with_distillation_loss(fabric, teacher, splits, task),
        settings=settings,
        steps=steps,
        arrange=as_given if as_given in orders else channels_last,
        least=least,
    )


def _train_epoch(
    lesson: "_Lesson", state: "_State", batches: Iterable[Batch], epoch: int, notify: Notify
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
            continue
        rate = learning_rate(settings, done, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        losses.append(_backward(lesson, batch, done))
        # A network that lost much starts far from its teacher: its first gradients are 20 times the later ones,
        # and without a limit one narrow network ended at 17 % where it now ends at 48 (pipelines/LOG.md).
        norm = lesson.fabric.clip_gradients(
            lesson.model, optimizer, max_norm=settings.max_gradient_norm, error_if_nonfinite=False
        )
        _require_finite(lesson, batch, Step(number=done + 1, epoch=epoch, batch=number), float(losses[-1]), norm)
        optimizer.step()
        _average_(state.average, lesson.student, min(settings.average_decay, (done + 1) / (done + 10)))
        notify(Progress(stage="finetune", done=done + 1, total=total, message=f"epoch {epoch}"))
    if not losses:
        raise DataError(
            f"`train` gave no batch of {lesson.least} or more samples in epoch {epoch}; return a source that can be "
            "read again, with larger batches"
        )
    return rate, losses


def _note_left_out_(state: "_State", number: int, size: int, notify: Notify) -> None:
    note = f"batch {number} of an epoch was left out: it holds {size} sample, and the network trains on two or more"
    if note not in state.notes:
        state.notes.append(note)
        notify(Note(stage="finetune", text=note))


def _log_of(state: "_State", settings: Finetune) -> TrainLog:
    return TrainLog(
        epochs=tuple(state.log),
        chosen_epoch=state.best_epoch,
        reason="" if state.best_epoch else "every epoch was worse on val than the start, which is kept",
        precision=settings.precision,
        notes=tuple(state.notes),
    )


def learning_rate(settings: Finetune, step: int, num_steps: int) -> float:
    """Linear from zero to the peak over the warm-up, then half a cosine to zero."""
    warmup = max(1, round(num_steps * settings.warmup_share))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lesson:
    """The parts of a training that do not change between steps."""

    fabric: Fabric
    ranks: Ranks
    student: nn.Module
    model: Any  # the student in Fabric's wrapper
    optimizer: Any
    teacher: Teacher
    task: Task
    settings: Finetune
    steps: int  # of an epoch
    arrange: Arrange  # the memory order of inputs
    least: int  # samples that a batch needs


def _backward(lesson: _Lesson, batch: Batch, step: int) -> Tensor:
    """Leave the gradients of the batch's loss in the model. The mean of the returned value over ranks is that loss."""
    if lesson.ranks.count == 1:
        batch = lesson.fabric.to_device(batch)  # once, not again for the samples that are mixed in
    share = _draw_share(batch[0], lesson.settings.mix_share)
    parts = lesson.ranks.parts(num_samples(batch[0]), lesson.settings.accumulate, lesson.least)
    losses = []
    with _own_dropout(lesson.ranks, step), _compiling(lesson.settings), SafeConvolutions():
        for part in parts:
            with lesson.fabric.no_backward_sync(lesson.model, enabled=part is not parts[-1]):
                loss = part.weight * _distilled_loss(lesson, batch, part, share)
                lesson.fabric.backward(loss)
            losses.append(loss.detach())
    return torch.stack(losses).sum()


def _distilled_loss(lesson: _Lesson, batch: Batch, part: Part, share: float) -> Tensor:
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
    with torch.no_grad(), lesson.fabric.autocast():
        expected = lesson.teacher(inputs)
    assert task.distillation_loss is not None
    return (1 - weight) * loss + weight * task.distillation_loss(outputs, expected, temperature)


def _require_finite(lesson: _Lesson, batch: Batch, step: Step, loss: float, norm: Any) -> None:
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


def _with_distillation_loss(fabric: Fabric, teacher: Teacher, splits: Splits, task: Task) -> Task:
    if task.distillation_loss is not None:
        return task
    inputs, target = first_of(splits.val, "val")
    with torch.no_grad():
        return with_distillation_loss(task, forward(teacher.dense, fabric.to_device(inputs)), target)


def _draw_share(inputs: Any, largest: float) -> float:
    """The share of another sample to mix into each sample of a batch (mixup, arXiv:1710.09412).

    The dense network has memorised the training samples, and its outputs for them say little more than their labels.
    Its outputs for mixed samples say more (arXiv:2106.05237).
    """
    size = num_samples(inputs)
    if not largest or not all(t.is_floating_point() for t in tensors(inputs) if has_batch_axis(t, size)):
        return 0.0
    return largest * float(torch.rand(()))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, shuffling and dropout depend on the seed alone; afterwards the caller's random state is restored."""
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


def _own_dropout(ranks: Ranks, step: int) -> AbstractContextManager[None]:
    """Give each rank random numbers of its own, so that order and mixing do not depend on the rank or the network."""
    return _seeded(torch.initial_seed() + 1 + step * ranks.count + ranks.rank)


def _in_one_order(ranks: Ranks, batches: Iterable[Batch], epoch: int) -> Iterator[Batch]:
    """The batches of an epoch; RanksError if ranks start with different batches."""
    for number, (inputs, target) in enumerate(batches):
        if number == 0 and ranks.count > 1:
            ranks.check_equal(
                {f"first train batch in epoch {epoch}": fingerprint_of([((), target)])},
                "let `train` draw its order from set_epoch(epoch) or torch's own generator alone",
            )
        yield inputs, target


def _mean(ranks: Ranks, losses: list[Tensor]) -> float:
    return sum(ranks.gather(sum(map(float, losses)) / len(losses))) / ranks.count


def _validate(lesson: _Lesson, splits: Splits) -> NDArray[np.float64]:
    """The metric of each val sample, (samples,). Whole batches are distributed over the ranks."""
    ranks, to_device = lesson.ranks, lesson.fabric.to_device
    lesson.model.eval()
    # Compiling again for validation would take longer than it saves.
    eager = torch.compiler.set_stance("force_eager") if lesson.settings.compile else nullcontext()
    with torch.no_grad(), eager:
        own = {
            number: lesson.task.metric(forward(lesson.model, lesson.arrange(to_device(inputs))), to_device(y)).cpu()
            for number, (inputs, y) in enumerate(splits.val)
            if number % ranks.count == ranks.rank
        }
    parts = {number: values for rank in ranks.gather(own) for number, values in rank.items()}
    return torch.cat([parts[number] for number in sorted(parts)]).double().numpy()


def _is_worse(results: NDArray[np.float64], top: NDArray[np.float64]) -> bool:
    """Whether an epoch's val results are worse than another's, both (samples,)."""
    if not np.isfinite(results).all():
        return True
    if _mean_or_least(results) >= _mean_or_least(top):
        return False
    return seems_worse(results, top)


def _mean_or_least(results: NDArray[np.float64]) -> float:
    return float(results.mean()) if np.isfinite(results).all() else -math.inf


# --- weights, averages, checkpoints -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _State:
    """The state of a training, apart from the model and the optimizer, that a resumed one needs."""

    best: dict[str, Tensor]
    average: dict[str, Tensor]
    top: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # (samples,) on val, of the best mean so far
    best_epoch: int = 0
    log: list[EpochLog] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _are_finite(weights: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _average_(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    weights = model.state_dict()
    real = [name for name, tensor in weights.items() if tensor.is_floating_point()]
    update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # all tensors in one go
    update([average[name] for name in real], [weights[name] for name in real], len(real))
    for name in weights.keys() - set(real):
        average[name].copy_(weights[name])


def _agree_(average: dict[str, Tensor], ranks: Ranks) -> None:
    """Copy rank 0's average to all ranks: on CPUs, batch norms of other ranks saw other samples."""
    if ranks.count > 1:
        for name, tensor in ranks.tell({n: t.cpu() for n, t in average.items()}).items():
            average[name].copy_(tensor)


@contextmanager
def _holding(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Give the model other weights inside the block."""
    own = _weights(model)
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(own)


def _store(state: _State, model: nn.Module, optimizer: Any, folder: Path) -> None:
    flat = {f"model/{n}": t for n, t in _weights(model).items()}
    flat |= {"top": torch.from_numpy(state.top)}
    flat |= {f"best/{n}": t for n, t in state.best.items()} | {f"average/{n}": t for n, t in state.average.items()}
    momenta = optimizer.state_dict()["state"]
    flat |= {f"momentum/{i}": s["momentum_buffer"] for i, s in momenta.items() if s.get("momentum_buffer") is not None}
    log = TrainLog(epochs=tuple(state.log), chosen_epoch=state.best_epoch, notes=tuple(state.notes))
    store_checkpoint(folder, log, flat)


def _restore_(state: _State, model: nn.Module, optimizer: Any, stored: Checkpoint) -> None:
    """Restore the state of a checkpoint."""
    log, flat = stored

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): t for k, t in flat.items() if k.startswith(prefix)}

    state.log, state.best_epoch, state.top = list(log.epochs), log.chosen_epoch, flat["top"].numpy()
    state.notes = list(log.notes)
    for name in state.average:
        state.best[name].copy_(flat[f"best/{name}"])
        state.average[name].copy_(flat[f"average/{name}"])
    model.load_state_dict(part("model/"))
    plain = optimizer.state_dict()
    plain["state"] = {int(i): {"momentum_buffer": t} for i, t in part("momentum/").items()}
    optimizer.load_state_dict(plain)


def _epoch(number: int, rate: float, loss: float, metric: float, started: float) -> EpochLog:
    seconds = time.perf_counter() - started
    return EpochLog(epoch=number, learning_rate=rate, train_loss=loss, val_accuracy=metric, seconds=seconds)


def _count_batches(ranks: Ranks, splits: Splits) -> int:
    count = count_batches(splits.train)
    if count == 0:
        raise empty_split("train")
    ranks.check_equal({"number of train batches": str(count)}, "give every rank the whole `train`")
    return count


def least_samples(model: nn.Module, inputs: Any) -> int:
    """The number of samples that a batch needs: 2 if one sample fails, like batch norms of vectors; otherwise 1."""
    probe = copied(model).train()
    try:
        with torch.no_grad(), _seeded(0):
            forward(probe, take(inputs, 1))
    except (ValueError, RuntimeError, IndexError):
        return 2
    return 1


def _tell_epoch(batches: Any, epoch: int) -> None:
    """Call `set_epoch`: loaders with it (ours, DistributedSampler) draw an order that depends on the epoch alone."""
    batches.set_epoch(epoch)


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]  # a module, of a module


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
