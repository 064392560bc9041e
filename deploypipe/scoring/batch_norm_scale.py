"""Score units by the gain of their batch norms (network slimming, arXiv:1708.06519)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import BatchNormScale
from deploypipe.records import ChannelGroup, ScoreTable, Structures
from deploypipe.scoring.magnitude import completed_by_magnitude

WITHOUT_GAIN = "no batch norm with a gain scales its units; scored by magnitude"


def score_batch_norm_scale(
    model: nn.Module, structures: Structures, moments: Moments, config: BatchNormScale, seed: int
) -> ScoreTable:
    """Score = sum of |gamma| over a group's batch norms, by unit. Groups without one are scored by magnitude.

    The paper trains with an L1 penalty on gamma first; without it the gains separate units less sharply.
    """
    modules = dict(model.named_modules())
    gains = {group.name: _gains(group, modules) for group in structures.groups}
    channels = {name: tuple(torch.stack(each).sum(0).tolist()) for name, each in gains.items() if each}
    reasons = {name: WITHOUT_GAIN for name, each in gains.items() if not each}
    return completed_by_magnitude(model, structures, ScoreTable(scorer=config.kind, channels=channels), reasons)


def _gains(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> list[Tensor]:
    """|gamma| by unit, (units,) float64, of each batch norm in the group."""
    gains = []
    for member in group.members:
        module = modules[member.module]
        if isinstance(module, _BatchNorm) and module.affine:
            gain = module.weight.detach().double().abs()
            gains.append(torch.stack([gain[list(unit)].sum() for unit in member.units]))
    return gains
