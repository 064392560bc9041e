"""Score blocks: which to remove first. One file per method, one line in `BLOCK_SCORERS`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from deploypipe.compute_device import exact_float32, network_on, to_device
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import BlockMi, BlockScorer, LogitDivergence, Mpruner
from deploypipe.records import BlockRanking, Structures
from deploypipe.scoring.blocks.block_mi import rank_by_information
from deploypipe.scoring.blocks.logit_divergence import rank_by_divergence
from deploypipe.scoring.blocks.mpruner import rank_by_similarity
from deploypipe.task import Batch

RankFunction = Callable[[nn.Module, Structures, Moments, Iterable[Batch], Any, int], BlockRanking]

BLOCK_SCORERS: dict[type[BlockScorer], RankFunction] = {
    Mpruner: rank_by_similarity,
    BlockMi: rank_by_information,
    LogitDivergence: rank_by_divergence,
}


def rank_blocks(
    model: nn.Module,
    structures: Structures,
    moments: Moments,
    batches: Iterable[Batch],
    scorer: BlockScorer,
    *,
    seed: int = 0,
    device: torch.device | None = None,
) -> BlockRanking:
    """Give every removable block one finite importance; higher = keep. `batches`: of the calibration split.

    device: where networks compute; None: where the network and the batches are.
    """
    model = network_on(unwrapped(model), device)
    there = (to_device(batch, device) for batch in batches)
    with exact_float32(device):
        return BLOCK_SCORERS[type(scorer)](model, structures, moments, there, scorer, seed)
