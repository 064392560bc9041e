"""Sources of batches that can be iterated many times, each pass in a new order."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploypipe.errors import PipelineError


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
