"""Check that an exported file computes what the network computes, on the user's own batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deploypipe.compute_device import exact_float32, network_on, to_device
from deploypipe.errors import DataError, ParityError
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.numerics.output_differences import difference
from deploypipe.recipe import Export
from deploypipe.records import Parity
from deploypipe.runtimes import Array, Session
from deploypipe.runtimes.named_arrays import feed, name_outputs
from deploypipe.task import Batch, evaluating, forward


def limit_of(settings: Export, precision: str) -> float:
    """The largest error allowed for a file of `precision`: "fp32", "fp16", or any that rounds to integers."""
    limits = {"fp32": settings.max_abs_error, "fp16": settings.max_abs_error_fp16}
    return limits.get(precision, settings.max_abs_error_int8)


def measure_parity(session: Session, inputs: Sequence[Any], expected: Sequence[Sequence[Array]]) -> Parity:
    """Run `session` on each of `inputs` and compare with `expected[batch][output]`, the network's own outputs.

    Raises DataError if the network's outputs are not finite, ParityError if shapes or types differ.
    """
    seen = [session.run(feed(batch, session.input_names)) for batch in inputs]
    for wanted, got in zip(expected, seen, strict=True):
        _require_alike(session.output_names, wanted, got)
    return difference(expected, seen)


def compare_networks(
    reference: nn.Module, network: nn.Module, batches: Sequence[Batch], *, device: torch.device | None = None
) -> Parity:
    """Compare `network` (for example a pruned one) with `reference` in eager torch. Both are left unchanged.

    device: where both compute; None: where they and the batches are. Raises as `measure_parity` does.
    """
    reference, network = network_on(unwrapped(reference), device), network_on(unwrapped(network), device)
    with exact_float32(device):
        names, expected = _outputs(reference, batches, device)
        _, seen = _outputs(network, batches, device)
    for wanted, got in zip(expected, seen, strict=True):
        _require_alike(names, wanted, got)
    return difference(expected, seen)


def require_parity(parity: Parity, settings: Export, path: Path, precision: str = "fp32", *, where: str = "") -> None:
    """ParityError if the file is too far from the network, or NaN. `where`: a text about where they first differ."""
    limit = limit_of(settings, precision)
    # In fp32 the error suffices; on a few samples of an untrained network, classes may tie.
    agrees = precision == "fp32" or parity.top1_agreement is None or parity.top1_agreement >= settings.min_agreement
    if parity.max_abs_error <= limit and agrees:
        return
    top1 = "" if parity.top1_agreement is None else f", top-1 agreement {parity.top1_agreement:.2%}"
    name = "max_abs_error" if precision == "fp32" else f"max_abs_error_{'fp16' if precision == 'fp16' else 'int8'}"
    allowed, setting = f"{limit:.3g}", name
    if parity.max_abs_error <= limit:
        allowed, setting = f"an agreement of {settings.min_agreement:.2%} or more", "min_agreement"
    cause = "look for randomness or state in forward(), or change" if precision == "fp32" else "change"
    raise ParityError(
        f"{path.name}: differs from the network by {parity.max_abs_error:.3g} of its largest output{top1}; the limit "
        f"is {allowed}{f'; {where}' if where else ''}: {cause} export.{setting}"
    )


def _outputs(
    network: nn.Module, batches: Sequence[Batch], device: torch.device | None
) -> tuple[list[str], list[list[Array]]]:
    with evaluating(network), torch.no_grad():
        named = [name_outputs(forward(network, to_device(inputs, device))) for inputs, _ in batches]
    return list(named[0]), [[tensor.cpu().numpy() for tensor in outputs.values()] for outputs in named]


def _require_alike(names: Sequence[str], expected: Sequence[Array], seen: Sequence[Array]) -> None:
    for name, want, got in zip(names, expected, seen, strict=True):
        if want.shape != got.shape or want.dtype != got.dtype:
            raise ParityError(
                f"output {name!r} is {got.dtype}{list(got.shape)} in the file and {want.dtype}{list(want.shape)} "
                "in the network; the shape may depend on the sizes of the dynamic axes only"
            )
        if not np.isfinite(want).all():
            raise DataError(f"the network's output {name!r} holds NaN or infinity; check its weights and its data")
