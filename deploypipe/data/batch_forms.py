"""Read a user's batches as pairs (inputs, target): the usual forms by themselves, all others with `Pairs`.

The usual forms are a pair, a tuple or list whose last member is the target, and a mapping with one member called
`labels`, `label`, `targets` or `target`. Arrays of numpy become tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploypipe.errors import DataError
from deploypipe.networks.batch_trees import leaves, map_leaves

_LABELS = ("labels", "label", "targets", "target")
_IDS = ("id", "idx", "index", "uid", "guid", "sample_id")  # number the samples: seldom an input, never the target
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch neither compares nor reduces them
_MAX_SHOWN = 6  # members of a batch, in an error


def as_pair(batch: Any, split: str = "calib") -> tuple[Any, Any]:
    """(inputs, target) of one batch, in tensors. Only `calib` may have batches without a target, which is then None.

    DataError, with the batch's members and the line to write, for anything else.
    """
    inputs, target = _divided(batch, split)
    try:
        inputs, target = _in_tensors(inputs), _in_tensors(target)
    except (TypeError, ValueError) as error:
        raise _unreadable(batch, split, str(error)) from None
    if _is_text(inputs):
        raise _text_only(batch, split, "its inputs are text")
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
    raise _unreadable(batch, split, "it is not a pair (inputs, target)")


def _divided_by_name(batch: Mapping[Any, Any], split: str) -> tuple[Any, Any]:
    names = [name for name in _LABELS if name in batch]
    inputs = {key: value for key, value in batch.items() if key not in names}
    if len(names) > 1:
        raise _unreadable(batch, split, f"{' and '.join(map(repr, names))} may both be the target")
    if not names and split != "calib":
        raise _unreadable(batch, split, f"none is called {', '.join(map(repr, _LABELS))}")
    if texts := [key for key, value in inputs.items() if _is_text(value)]:
        named = f"{', '.join(map(repr, texts))} {'holds' if len(texts) == 1 else 'hold'} text"
        if not _arrays(batch, without=_LABELS):
            raise _text_only(batch, split, named)
        raise _unreadable(batch, split, f"{named}: leave {'it' if len(texts) == 1 else 'them'} out")
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
        f"a batch of the {split} split cannot be read: {problem}; it holds {described(batch)}: "
        f"{example(batch, needs_target=split != 'calib')}"
    )


def _text_only(batch: Any, split: str, problem: str) -> DataError:
    return DataError(
        f"a batch of the {split} split cannot be read: {problem}; it holds {described(batch)}: tokenise the text "
        "first, such as with tokenizer(texts, padding=True, return_tensors='pt') in the loader's collate_fn"
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
        keys = _arrays(batch) or list(batch)
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


def _arrays(batch: Mapping[Any, Any], without: Sequence[str] = ()) -> list[Any]:
    """The members that can be inputs or the target: tensors and arrays, but no text and no numbers of samples."""
    return [
        key
        for key, value in batch.items()
        if isinstance(value, Tensor | np.ndarray) and not _is_text(value) and key not in (*_IDS, *without)
    ]


def described(batch: Any) -> str:
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
