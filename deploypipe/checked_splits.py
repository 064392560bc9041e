"""Check all data of a run where it enters: `wrap_splits` reads a user's batches as pairs and checks each of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from deploypipe.data import as_pair, require_repeatable, set_epoch
from deploypipe.errors import DataError, PipelineError
from deploypipe.networks.batch_trees import Leaf, leaves, same_value, structure
from deploypipe.networks.tree_hashes import digest_of
from deploypipe.task import Batch, Splits, has_batch_axis, num_samples
from deploypipe.user_code_errors import wrap_user_errors

SPLITS = ("calib", "train", "val", "test")
_ORDERED = ("calib", "val", "test")


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
    return CheckedSplit(require_repeatable(split, f"load_data() returned a {{}} as split '{name}'", name), name)


class CheckedSplit:
    """A split that checks its batches: pairs, of one structure and, except for train, the same in every pass."""

    def __init__(self, split: Iterable[Batch], name: str) -> None:
        self.split, self.name = split, name
        self._kinds: tuple[tuple[str, str], ...] | None = None  # of the members of the inputs: place and kind
        self._first: list[Leaf] = []
        self._targets: list[str] = []  # a hash of each batch's targets and shapes in the first pass

    def __getattr__(self, name: str) -> Any:
        if name == "split":  # of an object that is being copied
            raise AttributeError(name)
        return getattr(self.split, name)

    def __len__(self) -> int:
        with _only_type_errors(self.name):
            return len(self.split)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, if the split (or its sampler or dataset) has `set_epoch`."""
        with wrap_user_errors(f"set_epoch() of the {self.name} split"):
            set_epoch(self.split, epoch)

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
        inputs, target = as_pair(batch, self.name)
        self._check_members(inputs, target, number)
        if self.name in _ORDERED:
            self._check_order(inputs, target, number)
        return inputs, target

    def _check_members(self, inputs: Any, target: Any, number: int) -> None:
        size = num_samples(inputs)
        if not size and number:
            raise DataError(f"the {self.name} split, batch {number}, has no samples; leave out empty batches")
        own = list(leaves(inputs))
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
