"""What the user's network is for: its data, its loss and its measure of quality."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Batch: TypeAlias = tuple[Any, Any]  # (inputs, target); inputs: a tensor, a tuple of tensors or a dict of keyword tensors


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

    The mean of `metric` over a split is the accuracy that is reported, as a fraction.
    """

    loss: Callable[[Any, Any], Tensor]
    metric: Callable[[Any, Any], Tensor]
    name: str = "accuracy"


def _is_correct(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs.argmax(dim=1) == target).to(torch.float32)


def classification() -> Task:
    """Cross-entropy and top-1 accuracy, for logits (n, classes) and integer labels (n,)."""
    return Task(loss=F.cross_entropy, metric=_is_correct, name="top-1 accuracy")
