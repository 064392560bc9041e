"""Whose code failed: what a user's network, data or task raises becomes one error that names the function and line.

Task and splits are wrapped once, where they come in. What forward() raises is recognised where it leaves us.
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
    real_tokens_problem,
    slices_problem,
)

SPLITS = ("calib", "train", "val", "test")
_ORDERED = ("calib", "val", "test")
_PACKAGE = Path(__file__).parent
_LIBRARIES = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib"))
_WORKER_FRAME = re.compile(r'File "(?P<filename>[^"]+)", line (?P<lineno>\d+), in (?P<name>\S+)')


@contextmanager
def wrap_user_errors(
    what: str, remedy: str = "correct it", kind: type[DeploypipeError] = PipelineError
) -> Iterator[None]:
    """Around a call of the user's code: whatever it raises becomes one error of `kind`."""
    try:
        yield
    except DeploypipeError:
        raise
    except Exception as error:
        raise_if_exhausted(error)
        raise kind(f"{_place(error)}{what} raised {_said(error)}; {remedy}") from error


@contextmanager
def wrap_forward_errors() -> Iterator[None]:
    """Around a whole stage: what the network's forward() raised names it, however deep it was called."""
    try:
        yield
    except DeploypipeError:
        raise
    except Exception as error:
        if found := find_user_error(error):
            raise found from error
        raise


def find_user_error(error: Exception) -> DeploypipeError | None:
    """The error to report in place of one that the user's code raised; None where it is ours.

    Task and splits have their own errors already. What is left is forward(), and rarer code that a library calls for
    us, such as a network's `__deepcopy__`.
    """
    if find_exhaustion(error):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    ours = [i for i, frame in enumerate(frames) if Path(frame.filename).is_relative_to(_PACKAGE)]
    last = frames[ours[-1]] if ours else None
    if last and last.name == "forward" and Path(last.filename) == _PACKAGE / "task.py":
        return ModelError(
            f"{_place(error)}the network's forward() raised {_said(error)}; correct it. Does it only fail on a pruned "
            "network, please report it"
        )
    theirs = [frame for frame in frames[ours[-1] + 1 if ours else 0 :] if _is_users(frame.filename)]
    if not theirs or theirs[0] is frames[ours[-1] + 1 if ours else 0]:
        return None
    return PipelineError(f"{_place(error)}{theirs[0].name}() raised {_said(error)}; correct it")


def wrap_task(task: Task) -> Task:
    """The task with each of its functions wrapped by `user_code`; `loss` has to give one number."""
    if getattr(task.loss, "is_wrapped", False):
        return task
    for name in ("loss", "metric", "slices", "distillation_loss", "real_tokens"):
        function = getattr(task, name)
        if not callable(function) and (function is not None or name in ("loss", "metric")):
            raise PipelineError(f"task().{name} is {kind_of(function)}; give a function")
    return replace(
        task,
        loss=_guard_loss(task.loss),
        metric=_guard(task.metric, "metric", metric_problem),
        slices=task.slices and _guard(task.slices, "slices", slices_problem),
        distillation_loss=task.distillation_loss
        and _guard(task.distillation_loss, "distillation_loss", distillation_loss_problem),
        real_tokens=task.real_tokens and _guard(task.real_tokens, "real_tokens", real_tokens_problem),
    )


def _guard(function: Callable[..., Any], name: str, problem: Callable[[Any], str]) -> Callable[..., Any]:
    """problem: of what the function returned; "" where it can be used."""

    @wraps(function)
    def guarded(*args: Any) -> Any:
        with wrap_user_errors(f"task().{name}"):
            value = function(*args)
        if found := problem(value):
            raise DataError(f"task().{name} gives {found}")
        return value

    return guarded


def _guard_loss(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    @wraps(loss)
    def guarded(outputs: Any, target: Any) -> Tensor:
        with wrap_user_errors("task().loss", _remedy(target)):
            value = loss(outputs, target)
        if not isinstance(value, Tensor) or value.dim():
            raise DataError(
                f'task().loss gives {kind_of(value)}; return the mean over the batch, as reduction="mean" gives it'
            )
        return value

    guarded.is_wrapped = True  # type: ignore[attr-defined]
    return guarded


def _remedy(target: Any) -> str:
    """What to write where a loss refuses these targets."""
    if not isinstance(target, Tensor):
        return f"the targets are a {type(target).__name__}: give what the loss takes, for classes a tensor of int64"
    if str(target.dtype) in ("torch.int32", "torch.int16", "torch.int8", "torch.uint8", "torch.bool"):
        return f"the targets are {target.dtype}: class numbers have to be int64, write y.long()"
    if target.is_floating_point() and target.dim() == 1:
        return f"the targets are {target.dtype}: class numbers have to be int64, write y.long()"
    return f"the targets are {target.dtype} of shape {tuple(target.shape)}: give what the loss takes"


def wrap_splits(splits: Splits) -> Splits:
    """The splits with each of them wrapped; PipelineError that names all that cannot be read again and again."""
    guarded, problems = {}, []
    for name in SPLITS:
        try:
            guarded[name] = wrap_split(getattr(splits, name), name)
        except PipelineError as error:
            problems.append(str(error))
    if problems:
        raise PipelineError("\n  ".join(problems))
    return Splits(**guarded)


def wrap_split(split: Any, name: str) -> "CheckedSplit":
    if isinstance(split, CheckedSplit):
        return split
    if isinstance(split, Iterator) or not isinstance(split, Iterable):
        given = type(split).__name__ if split is not None else "None"
        advice = (
            f"it is used up after one pass: write {name}=list(...), or a class whose __iter__ begins again"
            if isinstance(split, Iterator)
            else "give something that can be iterated again and again"
        )
        raise PipelineError(
            f"load_data() gives a {given} as split '{name}'; {advice} (TensorBatches, DataLoader, list)"
        )
    return CheckedSplit(split, name)


class CheckedSplit:
    """A split that checks what it gives: pairs, alike in all batches and, but for train, the same in every pass."""

    def __init__(self, split: Iterable[Batch], name: str) -> None:
        self.split, self.name = split, name
        self._kinds: tuple[tuple[str, str], ...] | None = None  # of the members of the inputs: place and kind
        self._first: list[Leaf] = []
        self._targets: list[bytes] = []  # a hash of each batch's targets and shapes, as the first pass gave them

    def __getattr__(self, name: str) -> Any:
        if name == "split":  # of an object that is being copied
            raise AttributeError(name)
        return getattr(self.split, name)

    def __len__(self) -> int:
        with _only_type_errors(self.name):
            return len(self.split)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass, where the split (or its sampler) has one for each epoch."""
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
                f"the {self.name} split gives a {type(batch).__name__}; each batch is a pair (inputs, target)"
            )
        inputs, target = batch
        if not any(isinstance(leaf.value, Tensor) for leaf in leaves(inputs)):
            wanted = "torch.from_numpy(...)" if isinstance(inputs, np.ndarray) else "torch.tensor(...)"
            raise DataError(
                f"the {self.name} split gives inputs of type {type(inputs).__name__}; give tensors: write {wanted}"
            )
        self._check_members(inputs, target, number)
        if self.name in _ORDERED:
            self._check_order(inputs, target, number)
        return inputs, target

    def _check_members(self, inputs: Any, target: Any, number: int) -> None:
        size = num_samples(inputs)
        if not size and number:
            raise DataError(f"the {self.name} split, batch {number}, has no samples; leave such batches out")
        own = list(leaves(inputs))
        for leaf in (*own, *leaves(target, "target")):
            if isinstance(leaf.value, np.ndarray):
                raise DataError(
                    f"the {self.name} split gives {leaf.place} as a numpy array; write torch.from_numpy(...)"
                )
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
                    f"{other.value.dtype} in batch {number}; the file takes one type: write .to({one.value.dtype})"
                )
            if not isinstance(one.value, Tensor) and not same_value(one.value, other.value):
                raise DataError(
                    f"the {self.name} split: {one.place} is {one.value!r:.40} in the first batch and "
                    f"{other.value!r:.40} in batch {number}; what is no tensor becomes a constant of the file: give "
                    "torch.tensor(...), or the same value in every batch"
                )

    def _check_target(self, target: Any, size: int) -> None:
        with_axis = [leaf for leaf in leaves(target, "target") if isinstance(leaf.value, Tensor) and leaf.value.dim()]
        if with_axis and not any(has_batch_axis(leaf.value, size) for leaf in with_axis):
            shapes = ", ".join(f"{leaf.place} {list(leaf.value.shape)}" for leaf in with_axis)
            raise DataError(
                f"the {self.name} split gives {size} samples with {shapes}; give one target for each sample (the batch "
                "size is the first axis of the input with most dimensions)"
            )

    def _check_order(self, inputs: Any, target: Any, number: int) -> None:
        seen = digest_of(target, structure(inputs), num_samples(inputs))
        if number == len(self._targets):
            self._targets.append(seen)
        elif self._targets[number] != seen:
            raise order_error(self.name, number)


def order_error(name: str, number: int) -> DataError:
    return DataError(
        f"the {name} split gives other samples in a second pass, from batch {number} on; calib, val and test have to "
        f"come in the same order every time: write shuffle=False for {name} (or draw its order from a generator that "
        "is seeded anew in each __iter__), and no random augmentation"
    )


def digest_of(*values: Any) -> bytes:
    """A short hash of all that these trees hold."""
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
        return "is no tensor"
    return "has a row for each sample" if has_batch_axis(value, size) else "belongs to the whole batch"


def _difference(first: tuple[tuple[str, str], ...], now: tuple[tuple[str, str], ...], size: int) -> str:
    before = dict(first)
    if [place for place, _ in first] != [place for place, _ in now]:
        odd = sorted(set(before) ^ {place for place, _ in now})
        return f"it holds other members than the first batch ({', '.join(odd[:3]) or 'another order'}); give the same"
    place, kind = next((place, kind) for place, kind in now if before[place] != kind)
    return (
        f"{place} {kind} in this batch of {size}, and in the first batch it {before[place]}; a tensor without a batch "
        "axis must never have as many rows as a batch has samples: choose another batch size, or make the tensor a "
        "buffer of the network"
    )


@contextmanager
def _only_type_errors(name: str) -> Iterator[None]:
    """A length that cannot be told is a TypeError, as Python has it; torch raises other classes too."""
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


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught ") and "worker process" in lines[0]:  # torch's DataLoader
        return lines[-1]
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
