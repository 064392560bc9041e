"""Unbiased minibatch CKA (Nguyen, Raghu, Kornblith 2021; HSIC_1 of Song et al. 2012)."""

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 2**15  # features centred at once: the copy stays in the cache


def centred_gram(features: Tensor) -> Tensor:
    """K~ (n, n) of features (n, d), such that <K~, L~> / (n (n - 3)) is the unbiased HSIC_1 of K and L. n >= 4."""
    n = len(features)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for part in torch.split(features, _CHUNK, dim=1):
        centred = part - part.mean(0)  # changes only the digits that a large mean would cost
        gram += centred @ centred.T
    gram.fill_diagonal_(0)
    means = gram.sum(0) / (n - 2)
    means = means - means.sum() / (2 * (n - 1))
    gram = gram - means.unsqueeze(0) - means.unsqueeze(1)
    return gram.fill_diagonal_(0)


class HsicAccumulator:
    """All pairs of HSIC_1 between several representations, summed over batches, so that their ratio is unbiased.

    Never average CKA over batches: average its three terms.
    """

    def __init__(self, count: int) -> None:
        self.total = torch.zeros(count, count, dtype=torch.float64)

    def add_(self, grams: Sequence[Tensor]) -> None:
        """Add one batch: one `centred_gram` (n samples, n) per representation. Ignored if n < 4."""
        n = len(grams[0])
        if n < 4:
            return
        rows = torch.stack([gram.flatten() for gram in grams])
        self.total += rows @ rows.T / (n * (n - 3))


def cka(hsic: Tensor) -> Tensor:
    """CKA (count, count) float64 from all pairs of HSIC; 0 if a self term is not positive."""
    scale = hsic.diagonal().clamp_min(0).sqrt()
    product = torch.outer(scale, scale)
    return torch.where(product > 0, hsic / product.clamp_min(1e-300), torch.zeros_like(product))
