"""Turn exceptions of the user's network, data and task into one clear error with the function and line that failed.

Task and splits are wrapped once, when they are passed in. Exceptions of forward() are caught around a whole stage.
"""

import hashlib
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deploypipe.errors import DataError, DeploypipeError, ModelError, PipelineError
from deploypipe.files.exhausted_resources import find_exhaustion, raise_if_exhausted
from deploypipe.networks.batch_trees import Leaf, leaves, same_value, structure
from deploypipe.task import Batch, Splits, Task, has_batch_axis, num_samples
from deploypipe.task_result_checks import (
    distillation_loss_problem,
    kind_of,
    metric_problem,
    optimizer_problem,
    real_tokens_problem,
    schedule_problem,
    slices_problem,
)

SPLITS = ("calib", "train", "val", "test")
_ORDERED = ("calib", "val", "test")
_TASK_FUNCTIONS = (
    "loss",
    "metric",
    "slices",
    "distillation_loss",
    "real_tokens",
    "optimizer",
    "schedule",
    "training_step",
)
_PACKAGE = Path(__file__).parent
_LIBRARIES = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib"))
_WORKER_FRAME = re.compile(r'File "(?P<filename>[^"]+)", line (?P<lineno>\d+), in (?P<name>\S+)')


@contextmanager
def wrap_user_errors(
    what: str, remedy: str = "correct it", kind: type[DeploypipeError] = PipelineError
) -> Iterator[None]:
    """Around a call of the user's code: any exception becomes one error of class `kind`."""
    try:
        yield
    except DeploypipeError:
        raise
    except Exception as error:
        raise_if_exhausted(error)
        raise kind(f"{_place(error)}{what} raised {_summary(error)}; {remedy}") from error


@contextmanager
def wrap_forward_errors() -> Iterator[None]:
    """Around a whole stage: an exception of the network's forward(), however deep, becomes an error that names it."""
    try:
        yield
    except DeploypipeError:
        raise
    except Exception as error:
        if found := find_user_error(error):
            raise found from error
        raise


def find_user_error(error: Exception) -> DeploypipeError | None:
    """The error to report instead of an exception of the user's code; None if the exception is ours.

    Task and splits have their own errors already. What remains is forward(), and rarer code that a library calls for
    us, such as a network's `__deepcopy__`.
    """
    if find_exhaustion(error):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    ours = [i for i, frame in enumerate(frames) if Path(frame.filename).is_relative_to(_PACKAGE)]
    last = frames[ours[-1]] if ours else None
    if last and last.name == "forward" and Path(last.filename) == _PACKAGE / "task.py":
        return ModelError(
            f"{_place(error)}the network's forward() raised {_summary(error)}; correct it, or report it if it only "
            "fails on a pruned network"
        )
    theirs = [frame for frame in frames[ours[-1] + 1 if ours else 0 :] if _is_users(frame.filename)]
    if not theirs or theirs[0] is frames[ours[-1] + 1 if ours else 0]:
        return None
    return PipelineError(f"{_place(error)}{theirs[0].name}() raised {_summary(error)}; correct it")


def wrap_task(task: Task) -> Task:
    """The task with its functions wrapped: exceptions name the function, and results are checked."""
    if getattr(task.loss, "is_wrapped", False):
        return task
    for name in _TASK_FUNCTIONS:
        function = getattr(task, name)
        if not callable(function) and (function is not None or name in ("loss", "metric")):
            raise PipelineError(f"task().{name} must be a function, got {kind_of(function)}; give a function")
    return replace(
        task,
        loss=_wrap_loss(task.loss),
        metric=_wrap_function(task.metric, "metric", metric_problem),
        slices=task.slices and _wrap_function(task.slices, "slices", slices_problem),
        distillation_loss=task.distillation_loss
        and _wrap_function(task.distillation_loss, "distillation_loss", distillation_loss_problem),
        real_tokens=task.real_tokens and _wrap_function(task.real_tokens, "real_tokens", real_tokens_problem),
        optimizer=task.optimizer and _wrap_function(task.optimizer, "optimizer", optimizer_problem),
        schedule=task.schedule and _wrap_function(task.schedule, "schedule", schedule_problem),
        training_step=task.training_step
        and _wrap_function(task.training_step, "training_step", distillation_loss_problem),
    )


def _wrap_function(function: Callable[..., Any], name: str, problem: Callable[[Any], str]) -> Callable[..., Any]:
    """problem: what is wrong with a value that the function returned; "" if it can be used."""

    @wraps(function)
    def wrapped(*args: Any) -> Any:
        with wrap_user_errors(f"task().{name}"):
            value = function(*args)
        if found := problem(value):
            raise DataError(f"task().{name} returned {found}")
        return value

    return wrapped


def _wrap_loss(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    @wraps(loss)
    def wrapped(outputs: Any, target: Any) -> Tensor:
        with wrap_user_errors("task().loss", _remedy(target)):
            value = loss(outputs, target)
        if not isinstance(value, Tensor) or value.dim():
            raise DataError(
                f'task().loss returned {kind_of(value)}; return one number, the mean over the batch (reduction="mean")'
            )
        return value

    wrapped.is_wrapped = True  # type: ignore[attr-defined]
    return wrapped


def _remedy(target: Any) -> str:
    """What to write when a loss fails on these targets."""
    if not isinstance(target, Tensor):
        return f"the targets are a {type(target).__name__}: give what the loss accepts, for classes a tensor of int64"
    if str(target.dtype) in ("torch.int32", "torch.int16", "torch.int8", "torch.uint8", "torch.bool"):
        return f"the targets are {target.dtype}: class numbers must be int64, write y.long()"
    if target.is_floating_point() and target.dim() == 1:
        return f"the targets are {target.dtype}: class numbers must be int64, write y.long()"
    return f"the targets are {target.dtype} of shape {tuple(target.shape)}: give what the loss accepts"


def wrap_splits(splits: Splits) -> Splits:
    """The splits, each wrapped in a `CheckedSplit`; PipelineError lists all that cannot be iterated many times."""
    wrapped, problems = {}, []
    for name in SPLITS:
        try:
            wrapped[name] = wrap_split(getattr(splits, name), name)
        except PipelineError as error:
            problems.append(str(error))
    if problems:
        raise PipelineError("\n  ".join(problems))
    return Splits(**wrapped)


def wrap_split(split: Any, name: str) -> "CheckedSplit":
    if isinstance(split, CheckedSplit):
        return split
    if isinstance(split, Iterator) or not isinstance(split, Iterable):
        given = type(split).__name__ if split is not None else "None"
        advice = (
            f"it is exhausted after one pass: write {name}=list(...), or a class whose __iter__ starts again"
            if isinstance(split, Iterator)
            else "give something that can be iterated many times"
        )
        raise PipelineError(
            f"load_data() returned a {given} as split '{name}'; {advice} (TensorBatches, DataLoader, list)"
        )
    return CheckedSplit(split, name)


class CheckedSplit:
    """A split that checks its batches: pairs, of one structure and, except for train, the same in every pass."""

    def __init__(self, split: Iterable[Batch], name: str) -> None:
        self.split, self.name = split, name
        self._kinds: tuple[tuple[str, str], ...] | None = None  # of the members of the inputs: place and kind
        self._first: list[Leaf] = []
        self._targets: list[bytes] = []  # a hash of each batch's targets and shapes in the first pass

    def __getattr__(self, name: str) -> Any:
        if name == "split":  # of an object that is being copied
            raise AttributeError(name)
        return getattr(self.split, name)

    def __len__(self) -> int:
        with _only_type_errors(self.name):
            return len(self.split)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, if the split (or its sampler) has `set_epoch`."""
        owner = next((o for o in (self.split, getattr(self.split, "sampler", None)) if hasattr(o, "set_epoch")), None)
        if owner is not None:
            with wrap_user_errors(f"set_epoch() of the {self.name} split"):
                owner.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        what = f"reading the {self.name} split"
        with wrap_user_errors(what, "correct load_data()", DataError):
            batches = iter(self.split)
        number = 0
        while True:
            with wrap_user_errors(f"{what}, batch {number},", "correct load_data()", DataError):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield self._checked(batch, number)
            number += 1

    def _checked(self, batch: Any, number: int) -> Batch:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(
                f"a batch of the {self.name} split must be a pair (inputs, target), got a {type(batch).__name__}; "
                "give pairs"
            )
        inputs, target = batch
        if not any(isinstance(leaf.value, Tensor) for leaf in leaves(inputs)):
            wanted = "torch.from_numpy(...)" if isinstance(inputs, np.ndarray) else "torch.tensor(...)"
            raise DataError(
                f"inputs of the {self.name} split must be tensors, got a {type(inputs).__name__}; write {wanted}"
            )
        self._check_members(inputs, target, number)
        if self.name in _ORDERED:
            self._check_order(inputs, target, number)
        return inputs, target

    def _check_members(self, inputs: Any, target: Any, number: int) -> None:
        size = num_samples(inputs)
        if not size and number:
            raise DataError(f"the {self.name} split, batch {number}, has no samples; leave out empty batches")
        own = list(leaves(inputs))
        for leaf in (*own, *leaves(target, "target")):
            if isinstance(leaf.value, np.ndarray):
                raise DataError(f"the {self.name} split has {leaf.place} as a numpy array; write torch.from_numpy(...)")
        self._check_target(target, size)
        if size < 2:  # one row may belong to the one sample or to the batch
            return
        kinds = tuple((leaf.place, _kind(leaf.value, size)) for leaf in own)
        if self._kinds is None:
            self._kinds, self._first = kinds, own
        elif kinds != self._kinds:
            raise DataError(f"the {self.name} split, batch {number}: {_difference(self._kinds, kinds, size)}")
        for one, other in zip(self._first, own, strict=True) if self.name in _ORDERED else ():
            if isinstance(one.value, Tensor) and one.value.dtype != other.value.dtype:
                raise DataError(
                    f"the {self.name} split: {one.place} is {one.value.dtype} in the first batch and "
                    f"{other.value.dtype} in batch {number}; the file accepts one type: write .to({one.value.dtype})"
                )
            if not isinstance(one.value, Tensor) and not same_value(one.value, other.value):
                raise DataError(
                    f"the {self.name} split: {one.place} is {one.value!r:.40} in the first batch and "
                    f"{other.value!r:.40} in batch {number}; a value that is not a tensor becomes a constant of the "
                    "file: give torch.tensor(...), or the same value in every batch"
                )

    def _check_target(self, target: Any, size: int) -> None:
        with_axis = [leaf for leaf in leaves(target, "target") if isinstance(leaf.value, Tensor) and leaf.value.dim()]
        if with_axis and not any(has_batch_axis(leaf.value, size) for leaf in with_axis):
            shapes = ", ".join(f"{leaf.place} {list(leaf.value.shape)}" for leaf in with_axis)
            raise DataError(
                f"the {self.name} split has {size} samples with {shapes}; give one target for each sample (the batch "
                "size is the first axis of the input with the most dimensions)"
            )

    def _check_order(self, inputs: Any, target: Any, number: int) -> None:
        seen = digest_of(target, structure(inputs), num_samples(inputs))
        if number == len(self._targets):
            self._targets.append(seen)
        elif self._targets[number] != seen:
            raise order_error(self.name, number)


def order_error(name: str, number: int) -> DataError:
    return DataError(
        f"the {name} split has other samples in a second pass, from batch {number} on; calib, val and test must have "
        f"the same order every time: write shuffle=False for {name} (or draw its order from a generator that is seeded "
        "again in each __iter__), and no random augmentation"
    )


def digest_of(*values: Any) -> bytes:
    """A short hash of the contents of these trees."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in leaves(values, ""):
        if isinstance(tensor := leaf.value, Tensor):
            digest.update(f"{leaf.place} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(np.ascontiguousarray(_plain(tensor)).data)
        elif leaf.value is None or isinstance(leaf.value, bool | int | float | str):
            digest.update(f"{leaf.place} {leaf.value!r}".encode())
    return digest.digest()


def _plain(tensor: Tensor) -> Any:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _kind(value: Any, size: int) -> str:
    if not isinstance(value, Tensor):
        return "is not a tensor"
    return "has a row for each sample" if has_batch_axis(value, size) else "belongs to the whole batch"


def _difference(first: tuple[tuple[str, str], ...], now: tuple[tuple[str, str], ...], size: int) -> str:
    before = dict(first)
    if [place for place, _ in first] != [place for place, _ in now]:
        odd = sorted(set(before) ^ {place for place, _ in now})
        return (
            f"its members differ from those of the first batch ({', '.join(odd[:3]) or 'another order'}); give the "
            "same members in every batch"
        )
    place, kind = next((place, kind) for place, kind in now if before[place] != kind)
    return (
        f"{place} {kind} in this batch of {size}, but in the first batch it {before[place]}; a tensor without a batch "
        "axis must not have as many rows as a batch has samples: choose another batch size, or make the tensor a "
        "buffer of the network"
    )


@contextmanager
def _only_type_errors(name: str) -> Iterator[None]:
    """Raise TypeError for a split without a length, as Python does; torch raises other classes too."""
    try:
        yield
    except NotImplementedError as error:
        raise TypeError(f"the {name} split has no length") from error


def _is_users(filename: str) -> bool:
    path = str(Path(filename).resolve())
    return Path(path).is_file() and not path.startswith((str(_PACKAGE), *_LIBRARIES))


def _place(error: Exception) -> str:
    """`file, line N (in f()): ` of the user's innermost frame, also of one in a DataLoader's worker; "" without one."""
    frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(error.__traceback__)]
    frames += [(m["filename"], int(m["lineno"]), m["name"]) for m in _WORKER_FRAME.finditer(str(error))]
    theirs = [frame for frame in frames if _is_users(frame[0])]
    return "{}, line {} (in {}): ".format(*theirs[-1]) if theirs else ""


def _summary(error: Exception) -> str:
    """Class and first line of an error; of one from a DataLoader's worker, the last line, which names the cause."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught ") and "worker process" in lines[0]:  # torch's DataLoader
        return lines[-1]
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
