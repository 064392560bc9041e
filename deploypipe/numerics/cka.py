"""Unbiased minibatch CKA (Nguyen, Raghu, Kornblith 2021; HSIC_1 of Song et al. 2012)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def centred_gram(features: Tensor) -> Tensor:
    """K~ (n, n) of features (n, d), such that <K~, L~> / (n (n - 3)) is the unbiased HSIC_1 of K and L. n >= 4."""
    n = len(features)
    features = features - features.mean(0)  # changes nothing but the digits that a large mean would eat
    gram = (features @ features.T).double()
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

    def add_(self, representations: Sequence[Tensor]) -> None:
        """Add one batch: as many tensors (n samples, features) as were announced. Fewer than 4 samples say nothing."""
        n = len(representations[0])
        if n < 4:
            return
        grams = torch.stack([centred_gram(r).flatten() for r in representations])
        self.total += grams @ grams.T / (n * (n - 3))


def cka(hsic: Tensor) -> Tensor:
    """CKA (count, count) float64 from all pairs of HSIC; 0 where a self term is not positive (a constant one)."""
    scale = hsic.diagonal().clamp_min(0).sqrt()
    product = torch.outer(scale, scale)
    return torch.where(product > 0, hsic / product.clamp_min(1e-300), torch.zeros_like(product))
