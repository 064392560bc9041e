"""Squared weights of a unit, over everything that produces or reads it (group L2, arXiv:2301.12900 section 3.3)."""

import torch
from torch import Tensor, nn

from deploypipe.observe.moments import Moments
from deploypipe.recipe import Magnitude
from deploypipe.records import ChannelGroup, Member, ScoreTable, Structures


def score_magnitude(
    model: nn.Module, structures: Structures, moments: Moments, config: Magnitude, seed: int
) -> ScoreTable:
    """Sum of the squared weights of all members with a weight matrix, by unit."""
    modules = dict(model.named_modules())
    channels = {group.name: tuple(_group_energy(group, modules).tolist()) for group in structures.groups}
    return ScoreTable(scorer=config.kind, channels=channels)


def _group_energy(group: ChannelGroup, modules: dict[str, nn.Module]) -> Tensor:
    energies = [_member_energy(modules[member.module], member) for member in group.members]
    return torch.stack(energies).sum(0)


def _member_energy(module: nn.Module, member: Member) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:  # norms scale what the convolutions already show
        return torch.zeros(len(member.units), dtype=torch.float64)
    square = weight.detach().double().square()
    is_transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    is_first_axis = (member.side == "out") != is_transposed and not isinstance(module, nn.Embedding)
    if is_first_axis or weight.shape[1] == 1:  # depthwise: both sides are one
        per_index = square.flatten(1).sum(1)
    else:  # the second axis counts within each group of a grouped convolution
        grouped = square.reshape(getattr(module, "groups", 1), -1, *square.shape[1:])
        per_index = grouped.transpose(1, 2).flatten(2).sum(2).flatten()
    return torch.stack([per_index[list(unit)].sum() for unit in member.units])
