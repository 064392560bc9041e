"""Treat layers as linear regressions: rows of inputs at sampled output positions, times the weights.

`KINDS` lists all layers that are observed and repaired. A new kind is one more entry there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from deploypipe.records import Side

LinearLike: TypeAlias = Any  # a module of one of the KINDS

# (module, dimension, output places (n, positions, 1), each tap's number (taps,), size of the input) -> the input places
# that the taps read, clamped to the input, and whether they lie outside of it: (n, positions, taps) each
_Reach = Callable[[LinearLike, int, Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How one kind of layer stores its weights, and which inputs an output position reads."""

    fits: Callable[[nn.Module], bool]
    inputs_first: bool = False  # the weight is (inputs, outputs / groups, ...); else (outputs, inputs / groups, ...)
    reach: _Reach | None = None  # None: channels come last, and a position is computed from itself alone
    sides: tuple[Side, Side] = ("in", "out")  # what structures call its inputs and its outputs


def _convolution(m: LinearLike, d: int, places: Tensor, taps: Tensor, size: int) -> tuple[Tensor, Tensor]:
    reached = places * m.stride[d] - _padding_before(m, d) + taps * m.dilation[d]
    if m.padding_mode == "zeros":
        return reached.clamp(0, size - 1), (reached < 0) | (reached >= size)
    return _FOLDS[m.padding_mode](reached, size), torch.zeros_like(reached, dtype=torch.bool)


_FOLDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "reflect": lambda places, size: (size - 1) - ((size - 1) - places.abs()).abs(),
    "replicate": lambda places, size: places.clamp(0, size - 1),
    "circular": lambda places, size: places % size,
}


def _padding_before(m: LinearLike, d: int) -> int:
    if m.padding == "same":
        return int(m.dilation[d] * (m.kernel_size[d] - 1) // 2)
    return 0 if m.padding == "valid" else int(m.padding[d])


def _transposed(m: LinearLike, d: int, places: Tensor, taps: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Input i contributes to output i * stride - padding + tap * dilation; many taps have no input at a position."""
    numerator = places + m.padding[d] - taps * m.dilation[d]
    reached = torch.div(numerator, m.stride[d], rounding_mode="floor")
    return reached.clamp(0, size - 1), (numerator % m.stride[d] != 0) | (reached < 0) | (reached >= size)


def _is_conv1d_of_gpt2(module: nn.Module) -> bool:
    """`transformers.pytorch_utils.Conv1D`: a linear layer with a transposed weight."""
    weight = getattr(module, "weight", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    return getattr(module, "nf", None) == weight.shape[1]


KINDS: tuple[Kind, ...] = (
    Kind(fits=lambda m: isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d), reach=_convolution),
    Kind(
        fits=lambda m: isinstance(m, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d),
        inputs_first=True,
        reach=_transposed,
    ),
    Kind(fits=lambda m: isinstance(m, nn.Linear)),
    Kind(fits=_is_conv1d_of_gpt2, inputs_first=True, sides=("weight.0", "weight.1")),
)


def kind_of(module: nn.Module) -> Kind | None:
    """Which of the `KINDS` a module is."""
    return next((kind for kind in KINDS if kind.fits(module)), None)


def _kind(module: LinearLike) -> Kind:
    kind = kind_of(module)
    assert kind is not None, type(module)
    return kind


def is_linear_like(module: nn.Module) -> bool:
    """Whether the module's output is linear in its weights, so that they are a regression on its inputs."""
    return kind_of(module) is not None


def reads(module: nn.Module, side: Side) -> bool:
    """Whether that side of the module is the inputs of a linear-like layer."""
    kind = kind_of(module)
    return kind is not None and side == kind.sides[0]


def writes(module: nn.Module, side: Side) -> bool:
    """Whether that side of the module is its outputs."""
    kind = kind_of(module)
    return side == ("out" if kind is None else kind.sides[1])


def has_channels_last(module: LinearLike) -> bool:
    """Whether inputs and outputs are (n, ..., channels); else (n, channels, ...)."""
    return _kind(module).reach is None


def num_groups(module: LinearLike) -> int:
    """The number of groups: outputs of one group read no inputs of another."""
    return int(getattr(module, "groups", 1))


def num_taps(module: LinearLike) -> int:
    """Weights per (output, input) channel pair: 9 for a 3x3 convolution, 1 for a linear layer."""
    return prod(module.weight.shape[2:])


def num_inputs(module: LinearLike) -> int:
    """Input channels."""
    return int(module.weight.shape[0] if _kind(module).inputs_first else module.weight.shape[1] * num_groups(module))


def sample_positions(
    module: LinearLike, output: Tensor, count: int, generator: torch.Generator, real: Tensor | None = None
) -> Tensor:
    """Flat output positions, drawn with replacement for each sample: (n samples, at most `count`) int64.

    real: (n, tokens) bool. If the layer's positions are these tokens, only the real ones are drawn. If all are taken,
    shorter samples repeat some of theirs.
    """
    sizes = output.shape[1:-1] if has_channels_last(module) else output.shape[2:]
    total = prod(sizes)
    if real is not None and len(sizes) == 1 and real.shape == (len(output), total):
        return real_positions(real, count, generator)
    if total <= count:
        return torch.arange(total).expand(len(output), total)
    return torch.randint(total, (len(output), count), generator=generator)


def real_positions(real: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` positions per sample at which `real` (n, tokens) is True: int64."""
    in_front = real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    numbers = real.sum(dim=1, keepdim=True).clamp_min(1)  # a sample of padding alone gives its first position
    longest = int(numbers.max())
    if longest <= count:
        return in_front.gather(1, torch.arange(longest) % numbers)
    drawn = torch.rand((len(real), count), generator=generator, dtype=torch.float64)
    return in_front.gather(1, (drawn * numbers).long())


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchPlaces:
    """Which inputs the patches at some output positions read: the same for all layers of one geometry."""

    index: Tensor  # (n, positions, taps) int64, into the flattened dimensions of the input
    inside: Tensor | None  # (n, positions, 1, taps), 0 where a tap reads nothing and 1 elsewhere; None: all read


def geometry(module: LinearLike, inputs: Tensor, output: Tensor) -> tuple[Any, ...]:
    """A key that is equal for layers whose `patch_places` are equal at equal positions."""
    reach = _kind(module).reach
    if reach is None:
        return reach, output.shape[:-1], inputs.device
    own = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
    return reach, own, inputs.shape[2:], output.shape[:1] + output.shape[2:], inputs.dtype, inputs.device


def patch_places(module: LinearLike, inputs: Tensor, output: Tensor, positions: Tensor) -> PatchPlaces:
    """What the module reads at `positions` (n, positions). For layers with channels last, the positions themselves."""
    reach = _kind(module).reach
    if reach is None:
        return PatchPlaces(index=positions.unsqueeze(2), inside=None)
    taps = torch.tensor(list(product(*(range(size) for size in module.kernel_size))))  # (taps, dimensions)
    index = torch.zeros((), dtype=torch.int64)
    outside = torch.zeros((), dtype=torch.bool)
    step = 1
    for dimension in reversed(range(taps.shape[1])):  # the last one runs fastest
        size, num_places = inputs.shape[2 + dimension], output.shape[2 + dimension]
        places = (positions % num_places).unsqueeze(2)
        reached, is_beyond = reach(module, dimension, places, taps[:, dimension], size)
        outside = outside | is_beyond
        index = index + reached * step
        positions, step = positions // num_places, step * size
    inside = (~outside).unsqueeze(2).to(inputs) if outside.any() else None
    return PatchPlaces(index=index.to(inputs.device), inside=inside)


def read_patches(module: LinearLike, inputs: Tensor, places: PatchPlaces, out: Tensor | None = None) -> Tensor:
    """The input patches (n * positions, channels * taps), with the taps of a channel adjacent. No derivatives.

    Values beyond the border are zero, or what the padding mode says. Taps of a transposed convolution without an input
    at a position are zero too. The input is not padded, because copying a whole activation costs more than reading a
    few patches. out: contiguous, where to write them.
    """
    inputs, index = inputs.detach(), places.index
    num_samples, num_positions, num_channels = *index.shape[:2], inputs.shape[-1 if has_channels_last(module) else 1]
    if has_channels_last(module):
        rows = inputs.reshape(num_samples, -1, num_channels)
        patches = rows[torch.arange(num_samples).unsqueeze(1), index[:, :, 0]].unsqueeze(3)
    else:
        read = index.flatten(1).unsqueeze(1).expand(-1, num_channels, -1)
        found = inputs.flatten(2).gather(2, read)
        patches = found.view(num_samples, num_channels, num_positions, -1).transpose(1, 2)
    if out is None:
        out = torch.empty(num_samples * num_positions, patches[0, 0].numel(), dtype=inputs.dtype, device=inputs.device)
    written = out.view(patches.shape)
    if places.inside is None:
        written.copy_(patches)
    else:
        torch.mul(patches, places.inside, out=written)
    return out


def sample_inputs(module: LinearLike, inputs: Tensor, output: Tensor, positions: Tensor) -> Tensor:
    """The input patches read at `positions`: (n * positions, channels * taps), see `read_patches`."""
    return read_patches(module, inputs, patch_places(module, inputs, output, positions))


def sample_outputs(module: LinearLike, output: Tensor, positions: Tensor) -> Tensor:
    """The values at `positions` of a tensor shaped like the module's output: (n * positions, channels)."""
    samples = torch.arange(len(output)).unsqueeze(1)
    rows = output if has_channels_last(module) else output.movedim(1, -1)
    return rows.reshape(len(output), -1, rows.shape[-1])[samples, positions].flatten(0, 1)


def weight_blocks(module: LinearLike) -> Tensor:
    """The weights by group: (groups, outputs / groups, inputs / groups * taps)."""
    weight: Tensor = module.weight
    blocks = weight.reshape(num_groups(module), -1, *weight.shape[1:])
    return (blocks.transpose(1, 2) if _kind(module).inputs_first else blocks).flatten(2)


def from_blocks(module: LinearLike, blocks: Tensor) -> Tensor:
    """The inverse of `weight_blocks`: a tensor shaped like the module's weight."""
    shape: torch.Size = module.weight.shape
    if not _kind(module).inputs_first:
        return blocks.reshape(shape)
    return blocks.reshape(*blocks.shape[:2], -1, num_taps(module)).transpose(1, 2).reshape(shape)


def weight_matrix(module: LinearLike) -> Tensor:
    """The weights as (outputs, inputs * taps), so that `sample_inputs(...) @ weight_matrix(...).T` is the output.

    Zero where an output and an input are of two groups.
    """
    blocks = weight_blocks(module)
    return blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)  # type: ignore[no-untyped-call]


def blocks_of_matrix(module: LinearLike, matrix: Tensor) -> Tensor:
    """The blocks of a matrix (outputs, inputs * taps), shaped as in `weight_blocks`."""
    groups = num_groups(module)
    outputs, regressors = matrix.shape
    cut = matrix.reshape(groups, outputs // groups, groups, regressors // groups)
    return cut.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def within_groups(module: LinearLike, products: Tensor) -> Tensor:
    """Set products between inputs (or outputs) of different groups to zero."""
    groups = num_groups(module)
    if groups == 1:
        return products
    rows, columns = (torch.arange(groups).repeat_interleave(size // groups) for size in products.shape)
    return products.masked_fill((rows.unsqueeze(1) != columns).to(products.device), 0)


def columns(units: Sequence[int], taps: int) -> list[int]:
    """The columns of `sample_inputs` that belong to the given input channels."""
    return [unit * taps + tap for unit in units for tap in range(taps)]
