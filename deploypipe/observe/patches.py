"""What a convolution or linear layer reads and writes at sampled output positions, as rows of a matrix."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn

Mixer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def is_mixer(module: nn.Module) -> bool:
    """Whether the module mixes all its input channels linearly, so that its weights are a regression on its input."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def num_taps(module: Mixer) -> int:
    """Weights per (output, input) channel pair: 9 for a 3x3 convolution, 1 for a linear layer."""
    return 1 if isinstance(module, nn.Linear) else module.weight[0, 0].numel()


def _positions_shape(module: Mixer, output: Tensor) -> Sequence[int]:
    return output.shape[1:-1] if isinstance(module, nn.Linear) else output.shape[2:]


def sample_positions(module: Mixer, output: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Flat output positions, drawn with replacement for each sample: (n samples, at most `count`) int64."""
    total = 1
    for size in _positions_shape(module, output):
        total *= size
    if total <= count:
        return torch.arange(total).expand(len(output), total)
    return torch.randint(total, (len(output), count), generator=generator)


def sample_inputs(module: Mixer, inputs: Tensor, output: Tensor, positions: Tensor) -> Tensor:
    """The patches read at `positions`: (n * positions, channels * taps), columns in the order of `weight[o].flatten()`.

    A patch reaching over the border holds the zeros the convolution pads with. The input is not padded for it: copying
    a whole activation costs more than reading a few patches.
    """
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        return rows[torch.arange(len(inputs)).unsqueeze(1), positions].flatten(0, 1)
    taps = torch.tensor(list(product(*(range(size) for size in module.kernel_size))))  # (taps, dimensions)
    index = torch.zeros((), dtype=torch.int64)  # into the flattened dimensions, (n, positions, taps)
    outside = torch.zeros((), dtype=torch.bool)
    step = 1
    for dimension in reversed(range(taps.shape[1])):  # the last one runs fastest
        size, num_places = inputs.shape[2 + dimension], output.shape[2 + dimension]
        corner = positions % num_places * module.stride[dimension] - int(module.padding[dimension])
        reached = corner.unsqueeze(2) + taps[:, dimension] * module.dilation[dimension]
        outside = outside | (reached < 0) | (reached >= size)
        index = index + reached.clamp(0, size - 1) * step
        positions, step = positions // num_places, step * size
    read = index.flatten(1).unsqueeze(1).expand(-1, inputs.shape[1], -1)
    patches = inputs.flatten(2).gather(2, read).view(*inputs.shape[:2], *index.shape[1:])
    return patches.masked_fill_(outside.unsqueeze(1), 0).transpose(1, 2).flatten(2).flatten(0, 1)


def sample_outputs(module: Mixer, output: Tensor, positions: Tensor) -> Tensor:
    """The values at `positions` of a tensor shaped like the module's output: (n * positions, channels)."""
    samples = torch.arange(len(output)).unsqueeze(1)
    rows = output if isinstance(module, nn.Linear) else output.movedim(1, -1)
    return rows.reshape(len(output), -1, rows.shape[-1])[samples, positions].flatten(0, 1)


def weight_matrix(module: Mixer) -> Tensor:
    """The weights as (outputs, channels * taps), so that `sample_inputs(...) @ weight_matrix(...).T` is the output."""
    return module.weight.flatten(1)


def columns(units: Sequence[int], taps: int) -> list[int]:
    """The columns of `sample_inputs` that belong to the given input channels."""
    return [unit * taps + tap for unit in units for tap in range(taps)]
