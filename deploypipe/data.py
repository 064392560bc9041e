"""Read a user's batches as pairs (inputs, target): the usual forms by themselves, all others with `Pairs`.

The usual forms are a pair, a tuple or list whose last member is the target, and a mapping with one member called
`labels`, `label`, `targets` or `target`. Arrays of numpy become tensors.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from deploypipe.errors import DataError, PipelineError
from deploypipe.networks.batch_trees import leaves, map_leaves

# Which part of a batch: a key or an index; several of them (the part is then a dict or a tuple); or a function.
Selector: TypeAlias = str | int | Sequence[str] | Sequence[int] | Callable[[Any], Any]

_LABELS = ("labels", "label", "targets", "target")
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch neither compares nor reduces them
_MAX_SHOWN = 6  # members of a batch, in an error


class Pairs:
    """Batches of any loader as pairs (inputs, target).

        >>> rows = [{"left": torch.ones(2, 3), "right": torch.zeros(2, 3), "score": torch.ones(2), "id": ["a", "b"]}]
        >>> pairs = Pairs(rows, inputs=["left", "right"], target="score")
        >>> inputs, target = next(iter(pairs))
        >>> sorted(inputs), target
        (['left', 'right'], tensor([1., 1.]))

    inputs, target: a key or an index of a batch; a list of keys (gives a dict, which forward() gets by name) or of
    indices (gives a tuple, by position); or a function of the batch. target=None: there is none, for `calib`.

    Length, order and `set_epoch` are the loader's. PipelineError if it cannot be iterated twice; DataError, with the
    members of the batch, if it has no such key or index.
    """

    def __init__(self, loader: Iterable[Any], *, inputs: Selector, target: Selector | None) -> None:
        self.loader = require_repeatable(loader, "Pairs() was given a {}", "loader")
        self.inputs, self.target = inputs, target

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # TypeError without a length, as Python does

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, if the loader can."""
        set_epoch(self.loader, epoch)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self.loader:
            target = None if self.target is None else _selected(batch, self.target, "target")
            yield _selected(batch, self.inputs, "inputs"), target


def _selected(batch: Any, selector: Selector, role: str) -> Any:
    if callable(selector):
        return selector(batch)
    if isinstance(selector, str | int):
        return _member(batch, selector, role)
    found = [_member(batch, key, role) for key in selector]
    names = [key for key in selector if isinstance(key, str)]
    return dict(zip(names, found, strict=True)) if names else tuple(found)


def _member(batch: Any, key: str | int, role: str) -> Any:
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError):
        pass
    raise DataError(
        f"Pairs({role}={key!r}): a batch has no such member, it holds {_described(batch)}; {example(batch)}"
    )


class _Calls:
    """The results of a function without arguments, called again for each pass."""

    def __init__(self, function: Callable[[], Iterable[Any]]) -> None:
        self.function = function

    def __iter__(self) -> Iterator[Any]:
        return iter(self.function())


def require_repeatable(source: Any, given: str, name: str) -> Iterable[Any]:
    """The source, as something that can be iterated many times; PipelineError, with the remedy, if it cannot.

    A function without arguments (one that yields batches, usually) is called for each pass. given: the beginning of the
    error, with {} for the kind of the source. name: of the source, in the remedy.
    """
    if inspect.isroutine(source) or isinstance(source, functools.partial):
        needed = [p.name for p in inspect.signature(source).parameters.values() if p.default is p.empty]
        if not needed:
            return _Calls(source)
        advice = f"it requires {', '.join(needed)}: write {name}=lambda: {getattr(source, '__name__', 'batches')}(...)"
    elif isinstance(source, Iterator):
        advice = (
            f"it is exhausted after one pass: write {name}=list(...), a function that yields batches, or a class whose "
            "__iter__ starts again"
        )
    elif _is_dataset(source):
        advice = f"its items are single samples: write {name}=DataLoader(dataset, batch_size=64)"
    elif isinstance(source, Mapping) or _is_one_batch(source):
        advice = f"it is one batch: write {name}=[(inputs, target)], or TensorBatches(inputs, targets, 64)"
    elif isinstance(source, Iterable):
        return source
    else:
        advice = "give something that can be iterated many times"
    kind = type(source).__name__ if source is not None else "None"
    raise PipelineError(f"{given.format(kind)}; {advice} (TensorBatches, DataLoader, list)")


def _is_dataset(source: Any) -> bool:
    """A dataset with an index: torch's, or one of Hugging Face `datasets`."""
    data = torch.utils.data
    if isinstance(source, data.Dataset):
        return not isinstance(source, data.IterableDataset)
    return hasattr(source, "set_format") and hasattr(source, "column_names")


def _is_one_batch(source: Any) -> bool:
    """Whether it is a tensor, or tensors with unlike numbers of axes: those of a pair, not several batches."""
    if isinstance(source, Tensor | np.ndarray):
        return True
    members = list(source) if isinstance(source, tuple | list) else []
    return all(isinstance(member, Tensor | np.ndarray) for member in members) and len({m.ndim for m in members}) > 1


def set_epoch(loader: Any, epoch: int) -> None:
    """Call `set_epoch` of the loader, or of its sampler or dataset; do nothing if none has it."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        getattr(loader, "dataset", None),
    )
    owner = next((owner for owner in owners if callable(getattr(owner, "set_epoch", None))), None)
    if owner is not None:
        owner.set_epoch(epoch)


def as_pair(batch: Any, split: str = "calib") -> tuple[Any, Any]:
    """(inputs, target) of one batch, in tensors. Only `calib` may have batches without a target, which is then None.

    DataError, with the batch's members and the line to write, for anything else.
    """
    inputs, target = _divided(batch, split)
    try:
        inputs, target = _in_tensors(inputs), _in_tensors(target)
    except (TypeError, ValueError) as error:
        raise _unreadable(batch, split, str(error)) from None
    if not any(isinstance(leaf.value, Tensor) for leaf in leaves(inputs)):
        raise _unreadable(
            batch,
            split,
            "its inputs must be tensors: write torch.tensor(...), or dataset.set_format('torch') for Hugging Face's",
        )
    return inputs, _as_labels(target)


def _divided(batch: Any, split: str) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        return _divided_by_name(batch, split)
    if isinstance(batch, tuple | list):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) > 2:
            return tuple(batch[:-1]), batch[-1]
        if len(batch) == 1 and split == "calib":
            return batch[0], None
    if isinstance(batch, Tensor | np.ndarray) and split == "calib":
        return batch, None
    raise _unreadable(batch, split, "it is no pair (inputs, target)")


def _divided_by_name(batch: Mapping[Any, Any], split: str) -> tuple[Any, Any]:
    names = [name for name in _LABELS if name in batch]
    inputs = {key: value for key, value in batch.items() if key not in names}
    if len(names) > 1:
        raise _unreadable(batch, split, f"{' and '.join(map(repr, names))} may both be the target")
    if not names and split != "calib":
        raise _unreadable(batch, split, f"none is called {', '.join(map(repr, _LABELS))}")
    if texts := [key for key, value in inputs.items() if _is_text(value)]:
        raise _unreadable(batch, split, f"{', '.join(map(repr, texts))} holds text: leave it out")
    target = batch[names[0]] if names else None
    if isinstance(target, int | float) or (names and not getattr(target, "ndim", 1)):
        raise _unreadable(
            batch, split, f"{names[0]!r} is one number: it is a single sample, write DataLoader(dataset, batch_size=64)"
        )
    return inputs, target


def _is_text(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "UST"
    return isinstance(value, list | tuple) and any(isinstance(each, str) for each in value)


def _in_tensors(tree: Any) -> Any:
    """The same tree with tensors for the arrays and numbers of numpy; ValueError for an array of objects."""
    if isinstance(tree, Tensor) or not any(isinstance(leaf.value, np.ndarray | np.generic) for leaf in leaves(tree)):
        return tree
    return map_leaves(_in_tensor, tree)


def _in_tensor(value: Any) -> Any:
    if isinstance(value, np.str_ | np.bytes_):
        return value.item()
    if not isinstance(value, np.ndarray | np.generic):
        return value
    if value.dtype.kind not in "biufc":
        raise ValueError(f"it holds a numpy array of {value.dtype}, which has no tensor")
    native = np.ascontiguousarray(value, value.dtype.newbyteorder("=")).reshape(value.shape)
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def _as_labels(target: Any) -> Any:
    """Whole numbers in a type that torch can compute with, and a list of numbers as a tensor; all else as it is."""
    if isinstance(target, Tensor):
        return target.long() if target.dtype in _WIDE_UNSIGNED else target
    if isinstance(target, tuple | list) and target and all(isinstance(each, bool | int | float) for each in target):
        return torch.tensor(target)
    return target


def _unreadable(batch: Any, split: str, problem: str) -> DataError:
    return DataError(
        f"a batch of the {split} split cannot be read: {problem}; it holds {_described(batch)}: "
        f"{example(batch, needs_target=split != 'calib')}"
    )


def example(batch: Any, *, needs_target: bool = True) -> str:
    """The line to write for such a batch, with its own members."""
    inputs, target = _guessed(batch)
    return (
        f"write Pairs(loader, inputs={inputs}, target={target if needs_target else None}) from deploypipe.data, with "
        "the members that are meant"
    )


def _guessed(batch: Any) -> tuple[str, str]:
    if isinstance(batch, Mapping):
        keys = [key for key, value in batch.items() if isinstance(value, Tensor | np.ndarray)] or list(batch)
        named = [key for key in keys if key in _LABELS]
        flat = [key for key in keys if getattr(batch[key], "ndim", 0) == 1]
        target = next(iter([*named, *reversed(flat), *reversed(keys)]), "labels")
        inputs = [key for key in keys if key != target and key not in _LABELS]
        return repr(inputs or ["inputs"]), repr(target)
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return "0", repr(len(batch) - 1)
    names = list(getattr(batch, "__dict__", ()))
    if not isinstance(batch, Tensor) and len(names) > 1:
        return f"lambda batch: batch.{names[0]}", f"lambda batch: batch.{names[-1]}"
    return "lambda batch: ...", "lambda batch: ..."


def _described(batch: Any) -> str:
    """The members of a batch with their shapes and types."""
    if not isinstance(batch, Mapping | tuple | list):
        return f"a {type(batch).__name__}"
    pairs = list(batch.items() if isinstance(batch, Mapping) else enumerate(batch))
    shown = [f"{key if isinstance(key, str) else f'[{key}]'}: {_kind(value)}" for key, value in pairs[:_MAX_SHOWN]]
    return ", ".join(shown + ["..."] * (len(pairs) > _MAX_SHOWN)) or "nothing"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    inner = f" of {type(value[0]).__name__}" if isinstance(value, tuple | list) and value else ""
    return f"{type(value).__name__}{inner}"
