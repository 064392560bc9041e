"""How far a network's answers are from those of the dense one: what fine-tuning and loss curves go by."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deploypipe.errors import DataError, ModelError
from deploypipe.networks.batch_trees import leaves, map_leaves, tensors
from deploypipe.runtimes.named_arrays import name_outputs
from deploypipe.task import Divergence, Task, map_samples

_ALIKE = 1e-8  # of an output's mean square: a variance below it is that of rounding


def of_classes(dim: int = -1) -> Divergence:
    """T^2 KL(expected || seen) of the classes along `dim` at temperature T (arXiv:1503.02531): a mean over samples and
    positions, in nats. For outputs that are one tensor of logits, alone or in a tuple or a dict."""

    def divergence(seen: Any, expected: Any, temperature: float) -> Tensor:
        def log_probabilities(outputs: Any) -> Tensor:
            (logits,) = _real_ones(outputs).values()
            return (logits / temperature).movedim(dim, -1).flatten(0, -2).log_softmax(-1)

        told = log_probabilities(expected)
        return temperature**2 * F.kl_div(log_probabilities(seen), told, log_target=True, reduction="batchmean")

    return divergence


def of_values(outputs: Any) -> Divergence:
    """Mean squared difference, relative to the variance over the samples of `outputs`, the dense network's for one
    batch; the mean of that over the tensors of real numbers, however they are packed. Knows no temperature. ModelError
    where none is."""
    spreads = {name: _variance(tensor) for name, tensor in _real_ones(outputs).items()}
    if not spreads:
        raise ModelError("the network returns no real numbers; return the scores that its answers are chosen by")

    def divergence(seen: Any, expected: Any, _: float) -> Tensor:
        own, told = _real_ones(seen), _real_ones(expected)
        return torch.stack([F.mse_loss(own[name], told[name]) / spread for name, spread in spreads.items()]).mean()

    return divergence


def with_divergence(task: Task, outputs: Any, target: Any) -> Task:
    """The task with a `divergence`: its own, or what suits the dense network's outputs for one batch.

    DataError where its own gives something else than a finite number, ModelError where no outputs are real numbers.
    """
    if task.divergence is None:
        dim = _dim_of_classes(outputs, target)
        return replace(task, divergence=of_values(outputs) if dim is None else of_classes(dim))
    found = task.divergence(outputs, outputs, 1.0)
    if not isinstance(found, Tensor) or found.dim() or not torch.isfinite(found):
        raise DataError(
            f"task().divergence gives {_told(found)} for the dense network's outputs and themselves; return one finite "
            "number, a mean over the samples, as a tensor without dimensions"
        )
    size = len(next(iter(tensors(outputs))))
    others = map_samples(lambda tensor: tensor.flip(0), outputs, size)
    apart = float(task.divergence(others, outputs, 1.0))
    if apart < float(found) - 1e-4 * abs(float(found)):
        raise DataError(
            f"task().divergence is {apart:.4g} for the outputs of other samples and {float(found):.4g} for the same; "
            "lower has to mean closer"
        )
    return task


def with_outputs_class(task: Task, outputs: Any) -> Task:
    """The task whose metric gets what an exported file gives packed as the network packs it: NamedTuples, dataclasses
    and other classes are kept, and what was None is None. outputs: the network's for any batch."""
    if isinstance(outputs, Tensor):
        return task
    slots = map_leaves(lambda leaf: _SLOT if isinstance(leaf, Tensor) else leaf, outputs)
    count = sum(leaf.value is _SLOT for leaf in leaves(slots))

    def metric(seen: Any, target: Any) -> Tensor:
        given = tensors(seen)
        if len(given) != count:
            return task.metric(seen, target)
        own = iter(given)
        return task.metric(map_leaves(lambda leaf: next(own) if leaf is _SLOT else leaf, slots), target)

    return replace(task, metric=metric)


_SLOT = object()  # where a tensor is


def _told(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}"
    return f"a tensor of shape {tuple(found.shape)}" if found.dim() else str(float(found))


def _dim_of_classes(outputs: Any, target: Any) -> int | None:
    """Which dimension the outputs have beyond those of targets that number classes: torch's place for them, or the
    last."""
    named = list(_real_ones(outputs).values())
    if len(named) != 1 or not isinstance(target, Tensor) or target.is_floating_point():
        return None
    shape = named[0].shape
    if len(shape) != target.dim() + 1:
        return None
    dim = 1 if shape[:1] + shape[2:] == target.shape else len(shape) - 1
    return dim if shape[dim] > 1 else None


def _real_ones(outputs: Any) -> dict[str, Tensor]:
    return {name: _promoted(tensor) for name, tensor in name_outputs(outputs).items() if tensor.is_floating_point()}


def _promoted(tensor: Tensor) -> Tensor:
    """At least in single precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _variance(tensor: Tensor) -> float:
    """The mean over a batch, or what rounding alone may make of outputs that are alike for all samples; never zero."""
    wide = tensor.double()
    return max(float(wide.var(dim=0, correction=0).mean()), _ALIKE * float(wide.square().mean())) or 1.0
