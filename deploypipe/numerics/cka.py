"""Unbiased minibatch CKA (Nguyen, Raghu, Kornblith 2021; HSIC_1 of Song et al. 2012)."""

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 2**15  # features multiplied at once: a centred copy of them stays in the cache
_MIN_SPREAD = 0.1  # share of the squared features that is variance; with less, float32 products lose digits to the mean


def gram_of(features: Tensor) -> Tensor:
    """Inner products (n, n) float64 of features (n, d), multiplied in float32.

    They are centred first if the features are mostly mean. A shift of the features does not change HSIC, but the
    digits that a large mean would cost do.
    """
    gram = _products(features, is_centred=False)
    trace = gram.trace()
    is_mostly_mean = trace - gram.sum() / len(gram) < _MIN_SPREAD * trace
    return _products(features, is_centred=True) if is_mostly_mean else gram


def _products(features: Tensor, *, is_centred: bool) -> Tensor:
    gram = torch.zeros(len(features), len(features), dtype=torch.float64, device=features.device)
    for part in torch.split(features, _CHUNK, dim=1):
        values = part - part.mean(0) if is_centred else part
        gram += values @ values.T
    return gram


def _centred(grams: Tensor) -> Tensor:
    """K~ of grams K (*, n, n), such that <K~, L~> / (n (n - 3)) is the unbiased HSIC_1 of K and L. n >= 4."""
    n = grams.shape[-1]
    is_own = torch.eye(n, dtype=torch.bool, device=grams.device)
    grams = grams.masked_fill(is_own, 0)
    means = grams.sum(-1) / (n - 2)
    means -= means.sum(-1, keepdim=True) / (2 * (n - 1))
    return (grams - means.unsqueeze(-1) - means.unsqueeze(-2)).masked_fill_(is_own, 0)


class HsicAccumulator:
    """All pairs of HSIC_1 between several representations, summed over batches, so that their ratio is unbiased.

    Never average CKA over batches: average its three terms.
    """

    def __init__(self, count: int) -> None:
        self.total = torch.zeros(count, count, dtype=torch.float64)

    def add_(self, grams: Sequence[Tensor]) -> None:
        """Add one batch: one `gram_of` (n samples, n) per representation. Ignored if n < 4."""
        n = len(grams[0])
        if n < 4:
            return
        rows = _centred(torch.stack(list(grams))).flatten(1)
        self.total = self.total.to(rows.device) + rows @ rows.T / (n * (n - 3))


def cka(hsic: Tensor) -> Tensor:
    """CKA (count, count) float64 from all pairs of HSIC; 0 if a self term is not positive."""
    scale = hsic.diagonal().clamp_min(0).sqrt()
    product = torch.outer(scale, scale)
    return torch.where(product > 0, hsic / product.clamp_min(1e-300), torch.zeros_like(product))
