"""Reset attributes in which a network remembers the sizes of its last batch, as detectors do for their anchors.

In `if self.shape != x.shape: self.anchors = ...; self.shape = x.shape` an exporter finds the shape of its example, and
makes the batch size a constant.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.runtimes.named_arrays import name_outputs
from deploypipe.task import evaluating, forward

_Place = tuple[nn.Module, str]


def forget_sizes_(network: nn.Module, batches: Sequence[Any]) -> None:
    """Set attributes that remember input sizes to None, if forward() computes the same without them.

    batches: inputs of several sizes; sizes that the network rejects are skipped. Costs one forward pass for each batch,
    and two for each attribute found.
    """
    seen: list[dict[_Place, Any]] = []
    for inputs in batches:
        try:
            _run(network, inputs)
        except Exception:  # forward() may raise anything on sizes it was not written for
            continue
        seen.append(_sizes(network))
    if len(seen) < 2:
        return
    last = seen[-1]
    found = [place for place, value in last.items() if any(value != other.get(place, value) for other in seen)]
    forgotten = [place for place in found if _is_needless(network, place, last[place], batches[0])]
    for module, name in forgotten:
        setattr(module, name, None)


def _is_needless(network: nn.Module, place: _Place, value: Any, inputs: Any) -> bool:
    """Whether the network computes the same after the attribute was set to None, and sets it again itself."""
    module, name = place
    expected = _run(network, inputs)
    setattr(module, name, None)
    try:
        outputs = _run(network, inputs)
    except Exception:  # forward() may raise anything without a size
        outputs = []
    is_same = len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))
    if not is_same or getattr(module, name) is None:
        setattr(module, name, value)
        return False
    return True


def _run(network: nn.Module, inputs: Any) -> list[Tensor]:
    with evaluating(network), torch.no_grad():
        return list(name_outputs(forward(network, inputs)).values())


def _sizes(network: nn.Module) -> dict[_Place, Any]:
    """The attributes that hold integers, or lists of them."""
    found: dict[_Place, Any] = {}
    for module in network.modules():
        for name, value in vars(module).items():
            is_list = type(value) in (list, tuple, torch.Size) and bool(value) and all(type(v) is int for v in value)
            if is_list or type(value) is int:
                found[module, name] = tuple(value) if is_list else value
    return found
