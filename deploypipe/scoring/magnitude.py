"""Score units by the size of the weights that produce or read them (group norm, arXiv:2301.12900 section 3.3)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Magnitude
from deploypipe.records import ChannelGroup, Member, ScoreTable, Structures


def score_magnitude(
    model: nn.Module, structures: Structures, moments: Moments, config: Magnitude, seed: int
) -> ScoreTable:
    """Score = sum of |w| or w^2 (`config.power`) over all members with a weight matrix, by unit; float64."""
    return score_magnitudes(model, structures, config)


def score_magnitudes(model: nn.Module, structures: Structures, config: Magnitude | None = None) -> ScoreTable:
    """`score_magnitude`, which needs no observations."""
    config = config or Magnitude()
    modules = dict(model.named_modules())
    channels = {group.name: _group_size(group, modules, config.power) for group in structures.groups}
    return ScoreTable(scorer=config.kind, channels=channels)


def completed_by_magnitude(
    model: nn.Module, structures: Structures, table: ScoreTable, reasons: Mapping[str, str]
) -> ScoreTable:
    """Complete `table`: score the groups in `reasons`, which its method cannot score, by squared weights."""
    modules = dict(model.named_modules())
    missing = [group for group in structures.groups if group.name in reasons]
    return replace(
        table,
        channels=table.channels | {group.name: _group_size(group, modules, 2) for group in missing},
        reasons=table.reasons | {group.name: reasons[group.name] for group in missing},
    )


def weight_rows(module: nn.Module, member: Member) -> Tensor | None:
    """The weights of each of the module's indices on the member's side, (indices, weights); None without a matrix.

    Norms have none; they only scale what convolutions produce.
    """
    if member.side not in ("in", "out"):  # an axis of one tensor, or a count
        name, _, axis = member.side.rpartition(".")
        tensor = getattr(module, name, None)
        if not isinstance(tensor, nn.Parameter) or tensor.dim() < 2:
            return None
        return tensor.detach().movedim(int(axis), 0).flatten(1)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    weight = weight.detach()
    is_transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    is_first_axis = (member.side == "out") != is_transposed and not isinstance(module, nn.Embedding)
    if is_first_axis or weight.shape[1] == 1:  # depthwise: both sides are the same
        return weight.flatten(1)
    # The second axis counts within each group of a grouped convolution.
    grouped = weight.reshape(getattr(module, "groups", 1), -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(2).flatten(0, 1)


def _group_size(group: ChannelGroup, modules: Mapping[str, nn.Module], power: int) -> tuple[float, ...]:
    total = torch.stack([_member_size(modules[member.module], member, power) for member in group.members]).sum(0)
    return tuple(total.tolist())


def _member_size(module: nn.Module, member: Member, power: int) -> Tensor:
    rows = weight_rows(module, member)
    if rows is None:
        return torch.zeros(len(member.units), dtype=torch.float64)
    per_index = rows.double().abs().pow(power).sum(1)
    return torch.stack([per_index[list(unit)].sum() for unit in member.units])
