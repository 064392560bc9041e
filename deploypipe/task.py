"""What the user's network is for: its data, its loss and its measure of quality."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.errors import DataError

Batch: TypeAlias = tuple[Any, Any]  # (inputs, target); inputs: a tensor, a tuple or a dict of tensors
Slices: TypeAlias = Callable[[Any, Any], dict[str, Tensor]]
Divergence: TypeAlias = Callable[[Any, Any, float], Tensor]  # (outputs, expected, temperature) -> scalar
RealTokens: TypeAlias = Callable[[Any], Tensor]  # inputs -> (n, tokens) bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Four re-iterable sources of (inputs, target) batches.

    calib: statistics, repair and loss curves (labels unused). train: fine-tuning. val: every choice. test: the final
    figures, never a choice. Batches of calib, val and test must come in the same order every time.
    """

    calib: Iterable[Batch]
    train: Iterable[Batch]
    val: Iterable[Batch]
    test: Iterable[Batch]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """loss(outputs, target) -> scalar; metric(outputs, target) -> one value per sample, higher is better.

    The mean of `metric` over a split is the accuracy that is reported, as a fraction. real_tokens(inputs) -> bool (n,
    tokens), True for what is no padding: statistics and repair leave the rest out. A dict's "attention_mask" is used
    without being asked for. slices(inputs, target) -> named parts of the batch, bool (n,) each, that a budget may hold
    to a limit of their own (`slice_drop_pp`). divergence(outputs, the dense network's, temperature) -> scalar: how far
    the answers are apart, in the unit of `loss`; fine-tuning and loss curves go by it. Found from a batch where it is
    not given: that of classes for integer targets, that of values for all others (`deploypipe.answers`).
    """

    loss: Callable[[Any, Any], Tensor]
    metric: Callable[[Any, Any], Tensor]
    name: str = "accuracy"
    real_tokens: RealTokens | None = None
    class_names: tuple[str, ...] = ()  # in the order of a classifier's outputs; they go into the exported file
    slices: Slices | None = None
    divergence: Divergence | None = None


def _is_correct(outputs: Any, target: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or outputs.shape[1] < 2:
        found = f"shape {['n', *outputs.shape[1:]]}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(
            f"classification() reads logits, one tensor of shape [n, classes], and the network returns {found}; "
            "give task() a loss and a metric for these outputs: Task(loss=..., metric=...)"
        )
    return (outputs.argmax(dim=1) == target).to(torch.float32)


def classification() -> Task:
    """Cross-entropy and top-1 accuracy, for logits (n, classes) and integer labels (n,); a slice for each class."""
    return Task(loss=F.cross_entropy, metric=_is_correct, name="top-1 accuracy", slices=_by_class)


def _by_class(inputs: Any, target: Tensor) -> dict[str, Tensor]:
    return {f"class {label}": target == label for label in sorted(set(target.tolist()))}


def find_slices(batches: Iterable[Batch], slices: Slices | None) -> dict[str, tuple[int, ...]]:
    """The numbers of a split's samples that are in each slice."""
    found: dict[str, list[int]] = {}
    start = 0
    for inputs, target in batches if slices else ():
        for name, mask in slices(inputs, target).items() if slices else ():
            if mask.shape != (num_samples(inputs),):
                raise DataError(
                    f"task().slices gives a tensor of shape {tuple(mask.shape)} for slice {name!r} and "
                    f"{num_samples(inputs)} samples; return one bool for each sample"
                )
            found.setdefault(name, []).extend((start + mask.nonzero().flatten()).tolist())
        start += num_samples(inputs)
    return {name: tuple(found[name]) for name in sorted(found)}


def forward(model: nn.Module, inputs: Any) -> Any:
    """Call `model` with one batch of inputs, however they are packed."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def tensors(inputs: Any) -> list[Tensor]:
    """The tensors of one batch of inputs, in order."""
    if isinstance(inputs, dict):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """The same batch of inputs (or targets) with `function` applied to each of its tensors."""
    if isinstance(inputs, dict):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return tuple(map(function, inputs)) if isinstance(inputs, (tuple, list)) else function(inputs)


def num_samples(inputs: Any) -> int:
    """The batch size."""
    return len(tensors(inputs)[0])


def find_real_tokens(inputs: Any, real_tokens: RealTokens | None) -> Tensor | None:
    """(n, tokens) bool, False for padding, as `Task.real_tokens` has it; None where every position counts."""
    if real_tokens is not None:
        mask = real_tokens(inputs)
        if mask.dim() != 2 or len(mask) != num_samples(inputs):
            raise DataError(
                f"task().real_tokens gives a tensor of shape {tuple(mask.shape)} for {num_samples(inputs)} samples; "
                "return one of shape (samples, tokens), True for what is no padding"
            )
        return mask.bool()
    given = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    return given.bool() if isinstance(given, Tensor) and given.dim() == 2 else None


def take(inputs: Any, end: int, start: int = 0) -> Any:
    """The samples from `start` to before `end` of a batch."""
    return map_tensors(lambda tensor: tensor[start:end], inputs)


def first_of(batches: Iterable[Batch], split: str) -> Batch:
    """The first batch of a split; DataError where it has none."""
    for batch in batches:
        return batch
    raise empty_split(split)


def empty_split(split: str) -> DataError:
    """The error to raise for a split without batches."""
    return DataError(f"the {split} split is empty; return at least one batch as `{split}` from load_data()")


def take_calib(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first `count` samples of the calibration split, in its own batches; fewer where it is smaller.

    DataError where it has none.
    """
    taken: list[Batch] = []
    for inputs, target in batches:
        left = count - sum(num_samples(i) for i, _ in taken)
        if left <= 0:
            break
        taken.append((take(inputs, left), take(target, left)))
    if not taken:
        raise empty_split("calib")
    return taken


def stack_batches(inputs: list[Any]) -> Any:
    """Several batches of inputs as one."""
    if isinstance(inputs[0], dict):
        return {name: torch.cat([i[name] for i in inputs]) for name in inputs[0]}
    if isinstance(inputs[0], (tuple, list)):
        return tuple(torch.cat(parts) for parts in zip(*inputs, strict=True))
    return torch.cat(inputs)


def channels_last(inputs: Any) -> Any:
    """A batch of images in the memory order that CPUs and tensor cores want; everything else as it is."""
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; the training flag of every module is given back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
