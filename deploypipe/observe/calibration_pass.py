"""Run one streaming pass over the calibration samples and collect what scores and loss curves need."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.compute_device import CPU, exact_float32, network_on, to_device
from deploypipe.errors import DataError
from deploypipe.memory_order import SafeConvolutions
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.observe.collectors import BlockCollector, GradientCollector, InputCollector, Tokens, UnitCollector
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Observe
from deploypipe.records import Event, Notify, Progress, Structures, silent
from deploypipe.task import (
    Batch,
    RealTokens,
    evaluating,
    find_real_tokens,
    forward,
    num_samples,
    take_batch,
    take_calib,
)


def observe_activations(
    model: nn.Module,
    structures: Structures,
    batches: Sequence[Batch],
    settings: Observe,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    real_tokens: RealTokens | None = None,
    shuffled: bool = False,
    seed: int = 0,
    notify: Notify = silent,
    device: torch.device | None = None,
) -> Moments:
    """Collect second moments of every consumer's input, and statistics of blocks and units.

    One forward pass over at most `settings.num_samples` samples, and with a `loss(outputs, target)` (a mean over the
    batch) a backward pass for the scores that need derivatives. `shuffled` also pairs a layer's input with
    its output for another sample, for the permutation baseline of a score. real_tokens: as `Task.real_tokens`; padding
    is neither drawn nor averaged. Memory does not grow with the number of samples. The model is left unchanged: hooks
    removed, training flag restored, buffers untouched (eval mode).

    device: where a copy of the network computes, and each batch is moved; the moments are returned on the CPU. None:
    where the network and the batches are.
    Raises DataError for an empty split, and for activations that are not finite, with the layer's name.
    """
    model = network_on(unwrapped(model), device)
    taken = take_calib(batches, settings.num_samples)
    modules = dict(model.named_modules())
    tokens = Tokens()
    inputs = InputCollector(structures, modules, settings.positions_per_sample, seed, tokens, shuffled=shuffled)
    units, blocks = UnitCollector(structures, modules, tokens), BlockCollector(structures, tokens)
    gradients = GradientCollector(structures, modules) if loss is not None else None
    hooks = inputs.hooks() + units.hooks() + blocks.hooks() + (gradients.hooks() if gradients else [])
    with (
        hooked(model, hooks),
        hooked(model, blocks.pre_hooks(), before=True),
        evaluating(model),
        exact_float32(device),
        _derivatives(model, loss is not None),
        SafeConvolutions() if loss is not None else nullcontext(),
    ):
        for number, (batch, target) in enumerate(taken, start=1):
            tokens.real = find_real_tokens(batch, real_tokens)  # on the CPU, where positions are drawn
            outputs = forward(model, to_device(batch, device))
            if loss is not None and gradients is not None:
                (loss(outputs, to_device(target, device)) * num_samples(batch)).backward()  # type: ignore[no-untyped-call]
                gradients.end_batch_()
            inputs.end_batch_()
            units.end_batch_(target)
            blocks.end_batch_(num_samples(batch))
            notify(Progress(stage="observe", done=number, total=len(taken)))
    count = sum(num_samples(batch) for batch, _ in taken)
    moments = Moments(
        num_samples=count,
        skipped=inputs.skipped,
        inputs=inputs.moments(),
        units=units.units(),
        labels=units.all_labels(),
        block_hsic=blocks.hsic.total,
        block_inputs=blocks.block_inputs(),
        block_outputs=blocks.block_outputs(),
        shuffled=inputs.shuffled(),
        gates=gradients.mean_gates(count) if gradients else {},
        output_fisher=gradients.mean_fisher(count) if gradients else {},
    )
    return to_device(moments, None if device is None else CPU)


def observe_halves(
    model: nn.Module,
    structures: Structures,
    batches: Sequence[Batch],
    settings: Observe,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    real_tokens: RealTokens | None = None,
    shuffled: bool = False,
    seed: int = 0,
    notify: Notify = silent,
    device: torch.device | None = None,
) -> tuple[Moments, Moments]:
    """One pass in two halves: the moments of the odd and of the even batches. `merge` gives those of all batches.

    The agreement of a score between the halves is its stability. A single batch is split in two.
    """
    model = unwrapped(model)
    taken = take_calib(batches, settings.num_samples)
    if len(taken) == 1:
        taken = _cut_in_two(taken[0])
    halves = []
    for number in (0, 1):

        def report(event: Event, first: int = number) -> None:
            if isinstance(event, Progress):
                event = replace(event, done=event.done + first * len(taken[::2]), total=len(taken))
            notify(event)

        half = taken[number::2]
        halves.append(
            observe_activations(
                model,
                structures,
                half,
                settings,
                loss=loss,
                real_tokens=real_tokens,
                shuffled=shuffled,
                seed=2 * seed + number,
                notify=report,
                device=device,
            )
        )
    return halves[0], halves[1]


@contextmanager
def hooked(
    model: nn.Module, hooks: Sequence[tuple[str, Callable[..., Any]]], *, before: bool = False
) -> Iterator[None]:
    """Register hooks after (or before) forward() of the named modules, and remove them afterwards."""
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name, hook in hooks:
            module = modules[name]
            handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


@contextmanager
def _derivatives(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Enable derivatives through every parameter, frozen or not, or disable all. Flags and `.grad` are restored."""
    parameters = list(model.parameters())
    flags, gradients = [p.requires_grad for p in parameters], [p.grad for p in parameters]
    try:
        for parameter in parameters if wanted else []:
            parameter.grad = None
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.set_grad_enabled(wanted):
            yield
    finally:
        for parameter, flag, gradient in zip(parameters, flags, gradients, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def _cut_in_two(batch: Batch) -> list[Batch]:
    count = num_samples(batch[0])
    if count < 2:
        raise DataError("the calibration split has one sample, but a score's stability needs at least two; add samples")
    half = count // 2
    return [take_batch(batch, half), take_batch(batch, count, half)]
