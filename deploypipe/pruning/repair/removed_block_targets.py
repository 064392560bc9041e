"""Repair targets of layers before removed blocks: the outputs that those blocks gave.

The remaining layer then does a part of the blocks' work, and later layers get inputs like those they were trained on.
If the layer were repaired to its own former output, the next remaining block would have to compensate for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.observe.calibration_pass import hooked
from deploypipe.pruning.repair.affine_paths import PathEnd, SignalPath, hook_path_ends
from deploypipe.task import forward

# Functions allowed between the end of a path and a block. The same one must come before and after the block.
_BETWEEN: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, torch.relu)


def layers_before_removed_blocks(
    model: nn.Module, paths: Mapping[str, SignalPath], removed: Sequence[str], inputs: Any
) -> dict[str, str]:
    """Layer whose path ends where removed blocks begin -> layer whose path ends where the last of them ends.

    paths: of `model`, the dense network. inputs: a few samples. The match is detected by values: a block's input equals
    the end of one path and its output the end of another, either both directly or both after a ReLU. Other blocks, such
    as those between layer norms with weights, have no entry.
    """
    modules = dict(model.named_modules())
    ends: dict[str, Tensor] = {}
    around: dict[str, tuple[Tensor, Tensor]] = {}

    def record(end: PathEnd) -> Tensor:
        ends[end.path.layer] = (end.value if end.other is None else end.value + end.other).clone()
        return end.value

    def enter(name: str) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = output[0] if isinstance(output, tuple) else output
            if args and isinstance(args[0], Tensor) and isinstance(given, Tensor):
                around[name] = (args[0].clone(), given.clone())

        return hook

    hooks = [(name, enter(name)) for name in removed if name in modules]
    with torch.no_grad(), hook_path_ends(model, paths, record), hooked(model, hooks):
        forward(model, inputs)
    follows = {}
    for before, behind in around.values():
        for between in _BETWEEN:
            first, last = _ending_with(before, ends, between), _ending_with(behind, ends, between)
            if first and last:
                follows[first] = last
    return {layer: _last(layer, follows) for layer in follows if layer not in follows.values()}


def _ending_with(value: Tensor, ends: Mapping[str, Tensor], between: Callable[[Tensor], Tensor]) -> str:
    found = [name for name, end in ends.items() if end.shape == value.shape and torch.equal(between(end), value)]
    return found[-1] if found else ""


def _last(layer: str, follows: Mapping[str, str]) -> str:
    """Follow a run of removed blocks to its end."""
    while layer in follows:
        layer = follows[layer]
    return layer
