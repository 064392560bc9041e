"""Choose how many samples are observed at once, from the sizes of two samples' activations."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.memory_budget import LiveBytes, tree_bytes
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.observe.collectors import MAX_COLUMNS
from deploypipe.observe.layer_regressions import is_linear_like, weight_blocks
from deploypipe.records import ObserveFit
from deploypipe.task import Batch, forward, num_samples, take_batch

_FEW = 2  # samples whose activations are measured
_LEAST_SAMPLES = 8  # at once: similarities of blocks are estimated within a batch
_SLACK = 1.1  # for what operations need while they run


def fit_observe(
    model: nn.Module, batches: Sequence[Batch], allowed: int, *, loss: Callable[[Any, Any], Tensor] | None = None
) -> ObserveFit:
    """The most samples that `observe_halves` can pass at once within `allowed` bytes.

    One forward pass over two samples is measured, with a `loss` also its backward pass. The moments of all layers that
    could have some are counted, for both halves. `num_bytes` exceeds `allowed` if `_LEAST_SAMPLES` do not fit.
    """
    model = copied(unwrapped(model)).eval()
    fixed = _moment_bytes(model)
    if loss is not None:
        fixed += tree_bytes(list(model.parameters()))  # their gradients
    each = _SLACK * _pass_bytes(model, take_batch(batches[0], _FEW), loss)
    largest = max(num_samples(inputs) for inputs, _ in batches)
    if fixed + largest * each <= allowed:
        return ObserveFit(num_bytes=int(fixed + largest * each))
    count = int(max(_LEAST_SAMPLES, min(largest, (allowed - fixed) // each)))
    return ObserveFit(max_samples=count, num_bytes=int(fixed + count * each))


def _moment_bytes(model: nn.Module) -> int:
    """Of the half that is finished, of the half at work, whose sums are in float32 and float64, and of the largest
    layer once more while it is finished."""
    finished, at_work = [0], [0]
    for module in model.modules():
        if is_linear_like(module):
            groups, _, inner = weight_blocks(module).shape
            if (width := groups * inner) <= MAX_COLUMNS:
                finished.append(8 * width**2)
                at_work.append(max(8 * width**2, 12 * width * inner))
    return sum(finished) + sum(at_work) + max(finished)


def _pass_bytes(model: nn.Module, batch: Batch, loss: Callable[[Any, Any], Tensor] | None) -> float:
    """What a pass holds at its peak, for one sample. With a loss, layers' inputs are held twice, as observing does."""
    inputs, target = batch
    kept: list[Tensor] = []

    def keep(_m: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        if args and isinstance(args[0], Tensor):
            kept.append(args[0].detach().clone())

    for parameter in model.parameters():
        parameter.requires_grad_(loss is not None and parameter.is_floating_point())
    for module in model.modules() if loss is not None else ():
        if is_linear_like(module):
            module.register_forward_hook(keep)
    with LiveBytes() as live, torch.set_grad_enabled(loss is not None):
        outputs = forward(model, inputs)
        if loss is not None:
            loss(outputs, target).backward()  # type: ignore[no-untyped-call]
    num_bytes: int = live.peak + tree_bytes(inputs)
    return num_bytes / num_samples(inputs)
