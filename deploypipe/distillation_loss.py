"""How far a network's outputs are from the dense network's: the loss of fine-tuning and of loss curves."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deploypipe.errors import DataError, ModelError
from deploypipe.networks.batch_trees import leaves, map_leaves, tensors
from deploypipe.runtimes.named_arrays import name_outputs
from deploypipe.task import DistillationLoss, Task, find_logits, map_samples

_MIN_RELATIVE_VARIANCE = 1e-8  # of an output's mean square: rounding alone reaches this variance


def kl_divergence_loss(dim: int = -1) -> DistillationLoss:
    """T^2 KL(expected || seen) of the classes along `dim` at temperature T (arXiv:1503.02531).

    A mean over samples and positions, in nats. The outputs must be one tensor of logits, alone or in a tuple or dict,
    or have one called `logits`.
    """

    def loss(seen: Any, expected: Any, temperature: float) -> Tensor:
        def log_probabilities(outputs: Any) -> Tensor:
            logits = _promoted(_logits(outputs))
            return (logits / temperature).movedim(dim, -1).flatten(0, -2).log_softmax(-1)

        target = log_probabilities(expected)
        return temperature**2 * F.kl_div(log_probabilities(seen), target, log_target=True, reduction="batchmean")

    return loss


def relative_squared_loss(outputs: Any) -> DistillationLoss:
    """Mean squared difference, relative to the variance of the dense network's outputs over the samples of one batch.

    outputs: the dense network's for that batch, packed in any way. The result is the mean over all tensors of real
    numbers. The temperature is ignored. ModelError if no output is a tensor of real numbers.
    """
    spreads = {name: _variance(tensor) for name, tensor in _real_ones(outputs).items()}
    if not spreads:
        raise ModelError(
            "the network's outputs hold no real numbers; return the scores, not the choices made from them"
        )

    def loss(seen: Any, expected: Any, _: float) -> Tensor:
        own, wanted = _real_ones(seen), _real_ones(expected)
        return torch.stack([F.mse_loss(own[name], wanted[name]) / spread for name, spread in spreads.items()]).mean()

    return loss


def with_distillation_loss(task: Task, outputs: Any, target: Any) -> Task:
    """The task with a `distillation_loss`: its own, or the one that fits the dense network's outputs for one batch.

    DataError if its own does not return a finite number, ModelError if no outputs are real numbers.
    """
    if task.distillation_loss is None:
        dim = _dim_of_classes(outputs, target)
        return replace(
            task, distillation_loss=relative_squared_loss(outputs) if dim is None else kl_divergence_loss(dim)
        )
    found = task.distillation_loss(outputs, outputs, 1.0)
    if not isinstance(found, Tensor) or found.dim() or not torch.isfinite(found):
        raise DataError(
            f"task().distillation_loss of the dense network's outputs and themselves is {_described(found)}; return "
            "one finite number, the mean over the samples, as a tensor without dimensions"
        )
    size = len(next(iter(tensors(outputs))))
    others = map_samples(lambda tensor: tensor.flip(0), outputs, size)
    apart = float(task.distillation_loss(others, outputs, 1.0))
    if apart < float(found) - 1e-4 * abs(float(found)):
        raise DataError(
            f"task().distillation_loss is {float(found):.4g} for equal outputs and {apart:.4g} for outputs of other "
            "samples; make it smaller for closer outputs"
        )
    return task


def with_outputs_class(task: Task, outputs: Any) -> Task:
    """The task with a metric that also accepts the flat outputs of an exported file.

    They are packed again as the network packs them: in NamedTuples, dataclasses or other classes, with None where it
    returns None. outputs: the network's for any batch.
    """
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


def _described(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}"
    return f"a tensor of shape {tuple(found.shape)}" if found.dim() else str(float(found))


def _dim_of_classes(outputs: Any, target: Any) -> int | None:
    """The outputs' dimension of classes: torch's (1), or the last. None if the targets are not class numbers."""
    logits = _logits_or_none(outputs)
    if logits is None or not isinstance(target, Tensor) or target.is_floating_point():
        return None
    shape = logits.shape
    if len(shape) != target.dim() + 1:
        return None
    dim = 1 if shape[:1] + shape[2:] == target.shape else len(shape) - 1
    return dim if shape[dim] > 1 else None


def _logits(outputs: Any) -> Tensor:
    found = _logits_or_none(outputs)
    if found is None:
        raise ModelError(
            "a KL divergence needs one output of logits; return one tensor, or call the one that is meant 'logits'"
        )
    return found


def _logits_or_none(outputs: Any) -> Tensor | None:
    """The outputs' logits (see `task.find_logits`), or their only tensor of real numbers."""
    found = find_logits(outputs)
    if found is not None and found.is_floating_point():
        return found
    named = list(_real_ones(outputs).values())
    return named[0] if len(named) == 1 else None


def _real_ones(outputs: Any) -> dict[str, Tensor]:
    return {name: _promoted(tensor) for name, tensor in name_outputs(outputs).items() if tensor.is_floating_point()}


def _promoted(tensor: Tensor) -> Tensor:
    """At least in single precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _variance(tensor: Tensor) -> float:
    """The variance over the samples, averaged over the outputs. Never zero: outputs equal for all samples count as
    having the variance of rounding."""
    wide = tensor.double()
    least = _MIN_RELATIVE_VARIANCE * float(wide.square().mean())
    return max(float(wide.var(dim=0, correction=0).mean()), least) or 1.0
