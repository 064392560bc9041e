"""Score blocks by MPruner (arXiv:2408.13482): blocks with similar outputs form clusters; the first block stays.

Unlike the published code this uses unbiased CKA on the calibration split, so a threshold of 0.98 is far above the value
of unrelated outputs. CKA measures large directions only. Whether a block can really be removed must be checked by
accuracy (`mpruner_loop`) or by the divergence of the outputs (`logit_divergence`).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Mpruner
from deploypipe.records import BlockRanking, Names, Structures
from deploypipe.scoring.blocks.block_families import families
from deploypipe.task import Batch


def clusters(cka: Tensor, threshold: float) -> tuple[tuple[int, ...], ...]:
    """One scan from left to right over cka (n, n): blocks similar to a cluster's first member join it."""
    found: list[list[int]] = []
    for index in range(len(cka)):
        if found and cka[found[-1][0], index] >= threshold:
            found[-1].append(index)
        else:
            found.append([index])
    return tuple(map(tuple, found))


def cluster_blocks(structures: Structures, moments: Moments, threshold: float) -> tuple[Names, ...]:
    """The clusters of each family, as names."""
    cka, place = moments.block_cka, {name: i for i, name in enumerate(moments.block_names)}
    found: list[Names] = []
    for names in families(structures, moments):
        index = torch.tensor([place[name] for name in names])
        found += [tuple(names[i] for i in cluster) for cluster in clusters(cka[index][:, index], threshold)]
    return tuple(found)


def mpruner_candidates(found: Sequence[Names], stride: int) -> Names:
    """The blocks to remove: every `stride`-th member of each cluster, from the second on."""
    return tuple(name for cluster in found for name in cluster[1::stride])


def rank_by_similarity(
    model: nn.Module, structures: Structures, moments: Moments, batches: Iterable[Batch], config: Mpruner, seed: int
) -> BlockRanking:
    """Importance = 1 - CKA with the block before, whose output replaces this one's if it is removed.

    The first block of a cluster gets 1 more, because it stays. The first of a family has similarity 0.
    """
    cka, place = moments.block_cka, {name: i for i, name in enumerate(moments.block_names)}
    found = cluster_blocks(structures, moments, config.threshold)
    firsts = {cluster[0] for cluster in found}
    importance = {}
    for names in families(structures, moments):
        for before, name in zip((None, *names), names, strict=False):
            similarity = float(cka[place[before], place[name]]) if before else 0.0
            importance[name] = 1 - similarity + (name in firsts)
    return BlockRanking(scorer=config.kind, importance=importance, clusters=found)
