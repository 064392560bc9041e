"""Read the first batches of each split twice: check sizes, labels, NaN, and that the order does not change."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.checked_splits import CheckedSplit, order_error
from deploypipe.errors import DataError, DeploypipeError
from deploypipe.export.onnx_export.dynamic_axes import choose_axes, in_order, input_names
from deploypipe.export.onnx_export.input_sizes import Extremes
from deploypipe.networks.batch_trees import leaves, map_tensors, tensors
from deploypipe.networks.tree_hashes import digest_of
from deploypipe.recipe import Export
from deploypipe.task import Batch, empty_split, has_batch_axis, known_length, num_samples, take_batch

_MAX_SHAPES = 16
_PLAIN = (bool, int, float, complex, str, bytes)
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Extreme:
    """At most two samples of a batch where a value is the largest or smallest so far, or a shape is new."""

    number: int  # of the batch
    what: str  # "target up to 255"; "" for a shape, which an error shows in any case
    value: float
    samples: Batch


@dataclass
class Survey:
    """The findings of one pass over a split, or over its first batches if the whole would take too long."""

    first: Batch
    length: int | None = None  # what len() says, where the split has one
    sizes: list[int] = field(default_factory=list)  # of the batches
    is_whole: bool = True
    labels: tuple[float, float] | None = None  # smallest and largest, if targets are whole numbers
    suspect: tuple[int, Batch] | None = None  # a batch's number and its first sample that holds NaN
    digests: list[str] = field(default_factory=list)
    extremes: dict[Any, Extreme] = field(default_factory=dict)
    shapes: Extremes = field(default_factory=Extremes)

    @property
    def num_batches(self) -> int | None:
        """The number of batches of the whole split; None if it is not known."""
        return len(self.sizes) if self.is_whole and self.length is None else self.length

    @property
    def num_samples(self) -> int | None:
        """The number of samples of the whole split, about; None if it is not known."""
        if self.is_whole:
            return sum(self.sizes)
        return None if self.length is None else self.length * self.sizes[0]

    def __str__(self) -> str:
        count = f"{sum(self.sizes)}{'' if self.is_whole else '+'} samples in {len(self.sizes)} batches"
        return f"{count} of {min(self.sizes)} to {max(self.sizes)}" if len(set(self.sizes)) > 1 else count


def survey(split: CheckedSplit, seconds: float) -> Survey:
    """Read a split for about `seconds`; DataError if it is empty or its order differs the second time."""
    found = _read(split, seconds)
    if split.name != "train":
        _compare(split, found, seconds)
    return found


def _read(split: CheckedSplit, seconds: float) -> Survey:
    found: Survey | None = None
    begun = time.perf_counter()
    with _seeded(0):
        for number, batch in enumerate(split):
            size = num_samples(batch[0])
            if found is None:
                if not size:
                    raise empty_split(split.name)
                found = Survey(first=batch, length=known_length(split))
            elif time.perf_counter() - begun > seconds:
                found.is_whole = False
                break
            found.sizes.append(size)
            if split.name != "train":
                found.digests.append(digest_of(batch))
            found.labels = _widened(found.labels, batch[1])
            if found.suspect is None and size:
                found.suspect = _suspect(batch, number, size)
            _note_extremes_(found, batch, number, size)
            found.shapes.see(batch[0])
    if found is None:
        raise empty_split(split.name)
    return found


def _compare(split: CheckedSplit, found: Survey, seconds: float) -> None:
    begun = time.perf_counter()
    number = -1
    with _seeded(1):  # another seed than in `_read`, so that shuffling by the global generator is detected
        for number, batch in enumerate(split):
            if number >= len(found.digests):
                break
            if digest_of(batch) != found.digests[number]:
                raise order_error(split.name, number)
            if time.perf_counter() - begun > seconds:
                return
    if number + 1 < len(found.digests):
        raise DataError(
            f"the {split.name} split has {len(found.digests)} batches in the first pass and {number + 1} in the "
            "second; give something that can be iterated many times: TensorBatches, a DataLoader or a list"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _widened(known: tuple[float, float] | None, target: Any) -> tuple[float, float] | None:
    if not isinstance(target, Tensor) or not target.numel() or target.is_floating_point() or target.is_complex():
        return known
    least, largest = float(target.min()), float(target.max())
    return (min(known[0], least), max(known[1], largest)) if known else (least, largest)


def _suspect(batch: Batch, number: int, size: int) -> tuple[int, Batch] | None:
    """The first sample with NaN or plus infinity. Minus infinity is allowed, because masks hold it."""
    for leaf in leaves(batch, ""):
        value = leaf.value
        if not isinstance(value, Tensor) or not value.is_floating_point() or not has_batch_axis(value, size):
            continue
        total = float(value.detach().sum())
        if math.isfinite(total):
            continue
        odd = (value.isnan() | (value == math.inf)).reshape(size, -1).any(dim=1).nonzero()
        if len(odd):
            place = int(odd[0])
            return number, take_batch(batch, place + 1, place)
    return None


def _note_extremes_(found: Survey, batch: Batch, number: int, size: int) -> None:
    """Keep samples that may fail though the first ones did not: other shapes, extreme token ids or labels."""
    known = found.extremes
    own = [leaf.value for leaf in leaves(batch[0]) if has_batch_axis(leaf.value, size)]
    shapes = tuple(tuple(value.shape[1:]) for value in own)
    if shapes not in known and len(known) < _MAX_SHAPES:
        known[shapes] = _extreme(batch, number, 0)
    for leaf in (*leaves(batch[0]), *leaves(batch[1], "target")):
        value = leaf.value
        if not has_batch_axis(value, size) or value.dtype not in _WHOLE or not value.numel():
            continue
        rows = value.reshape(size, -1)
        for side, ends in (("down", -rows.amin(dim=1).long()), ("up", rows.amax(dim=1).long())):
            place = int(ends.argmax())
            reached = int(ends[place])
            before = known.get((leaf.place, side))
            if before is None or reached > before.value:
                text = f"{leaf.place} {side} to {reached if side == 'up' else -reached}"
                known[leaf.place, side] = _extreme(batch, number, place, text, reached)


def _extreme(batch: Batch, number: int, place: int, what: str = "", value: float = 0.0) -> Extreme:
    start = max(0, min(place, num_samples(batch[0]) - 2))
    samples = map_tensors(torch.clone, take_batch(batch, start + 2, start))  # a view would keep the whole batch
    return Extreme(number=number, what=what, value=value, samples=samples)


def differs_from_calib(calib: Survey, other: Survey, split: str) -> DeploypipeError | None:
    """The error for a split whose batches do not fit the file that is exported for calib's; None if they fit."""
    sides = list(leaves(calib.first[0])), list(leaves(other.first[0]))
    if odd := sorted({leaf.place for leaf in sides[0]} ^ {leaf.place for leaf in sides[1]}):
        return DataError(
            f"batches of calib and {split} have different members ({', '.join(odd[:3])}); give the same in both"
        )
    for one, leaf in zip(*sides, strict=True):
        if _made_for(one.value) != _made_for(leaf.value):
            return DataError(
                f"{one.place} is {_made_for(one.value)} in calib and {_made_for(leaf.value)} in {split}; the exported "
                "file fits only one of them: give the same in all splits"
            )
    return None


def unlike_the_file(model: nn.Module, surveys: Mapping[str, Survey], settings: Export) -> DeploypipeError | None:
    """The error for test batches of a size that the exported file does not take: it knows calib and val alone."""
    seen = {
        name: [in_order(model, inputs) for inputs in (found.first[0], *found.shapes.inputs())]
        for name, found in surveys.items()
    }
    names = input_names(model, seen["calib"][0])
    axes = choose_axes(names, [*seen["calib"], *seen["val"]], settings)
    for inputs in seen["test"]:
        size = num_samples(inputs)
        for name, known, tensor in zip(names, tensors(seen["calib"][0]), tensors(inputs), strict=True):
            for axis in range(int(has_batch_axis(tensor, size)), tensor.dim()):
                if axis not in axes.get(name, {}) and tensor.shape[axis] != known.shape[axis]:
                    return DataError(
                        f"the test split has inputs {name!r} of shape {list(tensor.shape)}, but calib and val always "
                        f"have {known.shape[axis]} in axis {axis}, which the exported file then fixes; give "
                        f"one size, or write export=Export(dynamic_axes={{{name!r}: {{{axis}: 'size'}}}}) in recipe()"
                    )
    return None


def _made_for(value: Any) -> str:
    """The part of a value that the exported file fixes: a tensor's type and number of axes, any other value itself."""
    if isinstance(value, Tensor):
        return f"a tensor with {value.dim()} axes of {value.dtype}"
    return f"{value!r:.40}" if value is None or isinstance(value, _PLAIN) else f"a {type(value).__name__}"


def remarks(found: Survey, split: str) -> Iterator[str]:
    """Notes on a split's length."""
    count = f"{len(found.sizes)}{'' if found.is_whole else ' or more'}"
    if found.length is None and not found.is_whole:
        yield (
            f"the {split} split has no length and did not end after {len(found.sizes)} batches; a run reads it to "
            "its end: limit it if it is endless"
        )
    elif found.length is not None and (
        len(found.sizes) > found.length or (found.is_whole and len(found.sizes) < found.length)
    ):
        yield (
            f"the {split} split reports {found.length} batches but has {count}; correct its __len__ (learning rates "
            "depend on it)"
        )


def check_labels(target: Any, split: str, num_classes: int, labels: tuple[float, float] | None) -> None:
    """DataError if these targets do not fit `classification()`. labels: the smallest and largest of the split."""
    problem = _problem_of_labels(target)
    if problem:
        raise DataError(f"classification() needs class numbers, but the {split} split has {problem}")
    if labels and (labels[0] < 0 or labels[1] >= num_classes):
        raise DataError(
            f"the {split} split has labels from {labels[0]:.0f} to {labels[1]:.0f}, but the network has {num_classes} "
            f"outputs; number labels from 0 to {num_classes - 1}, or give the network more outputs"
        )


def _problem_of_labels(target: Any) -> str:
    if not isinstance(target, Tensor):
        some = next((leaf.value for leaf in leaves(target)), None)
        if isinstance(some, str):
            return f"text ({some!r:.20}); number the names: torch.tensor([names.index(name) for name in labels])"
        return f"a {type(target).__name__}; write torch.tensor(labels)"
    kind, shape = str(target.dtype), list(target.shape)
    if target.dim() == 2 and target.shape[1] > 1:
        return f"{kind} of shape {shape}, one-hot; write y.argmax(dim=1)"
    if target.dim() != 1:
        return f"{kind} of shape {shape}; give one number for each sample: y.flatten()"
    if target.is_floating_point() or target.is_complex():
        return f"{kind}; write y.long()"
    return ""


def too_few_samples(found: Survey, split: str) -> DeploypipeError | None:
    """The error for a split of one sample, too few for an interval or a score's stability; None otherwise."""
    if not found.is_whole or sum(found.sizes) >= 2:
        return None
    return DataError(
        f"the {split} split has one sample, too few for an interval; give at least 2, and hundreds for a decision"
    )
