"""Ridge regression from second moments.

Legend: n rows; X (*, n, p) regressors; Y (*, n, q) targets. Leading axes (*) hold several problems. All
moments are means over rows, in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 4096  # rows multiplied at once in float32 before the sum goes on in float64
_BLOCK = 96  # columns of a Gram matrix computed together; the part above each block is left out
_RIDGE_STEPS = 12


def solve_towards(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """argmin_B  mean ||X B - Y||^2 + r ||B - prior||^2, from moments alone.

    gram = X'X / n (*, p, p); cross = X'Y / n (*, p, q); prior (*, p, q); r = ridge * mean(diag(gram)).
    Shrinking towards the current weights, not towards zero, leaves unchanged what the data does not determine.
    float64; O(p^3 + p^2 q). If X is constant zero, the result is the prior.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(scale > 0, ridge * scale, 1.0)
    return prior + torch.cholesky_solve(cross - gram @ prior, regular_cholesky(gram, added))


def regular_cholesky(gram: Tensor, ridge: float | Tensor) -> Tensor:
    """The Cholesky factor of `regularised(gram, ridge)`."""
    return _with_factor(gram, ridge)[1]


def regularised(gram: Tensor, ridge: float | Tensor) -> Tensor:
    """gram + ridge I, for matrices (*, p, p) and ridges (*).

    Moments of few samples, summed in float32, may have negative eigenvalues. Then the ridge grows tenfold until there
    is a Cholesky factor. Raises LinAlgError if there never is one (NaN).
    """
    return _with_factor(gram, ridge)[0]


def _with_factor(gram: Tensor, ridge: float | Tensor) -> tuple[Tensor, Tensor]:
    ridge = torch.as_tensor(ridge, dtype=gram.dtype).expand(gram.shape[:-2])
    for _ in range(_RIDGE_STEPS):
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
        tried = torch.linalg.cholesky_ex(shifted)
        has_failed = tried.info != 0
        if not has_failed.any():
            return shifted, tried.L
        smallest = 1e-12 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        ridge = torch.where(has_failed, 10 * torch.maximum(ridge, smallest), ridge)
    return shifted, torch.linalg.cholesky(shifted)


def sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """x'y (*, p, q) in float64, multiplied in float32 by chunks of rows: a fraction of the time, 1e-6 of the error."""
    total = torch.zeros(*x.shape[:-2], x.shape[-1], y.shape[-1], dtype=torch.float64, device=x.device)
    for x_part, y_part in zip(torch.split(x, _CHUNK, dim=-2), torch.split(y, _CHUNK, dim=-2), strict=True):
        total += x_part.mT @ y_part
    return total


class GramSum:
    """The sum of x'x (*, p, p) over rows x (*, n, p) that come in parts.

    Products are added in the precision of x for up to `_CHUNK` rows, as in `sum_of_products`, and then in float64. Most
    of the part above the diagonal is left out until the end.
    """

    def __init__(self) -> None:
        self._recent: Tensor | None = None  # of the last `_num_recent` rows
        self._num_recent = 0
        self._earlier: Tensor | None = None  # float64

    def add_(self, x: Tensor) -> None:
        for part in torch.split(x, _CHUNK, dim=-2):
            count, width = part.shape[-2:]
            if self._recent is None:
                self._recent = part.new_zeros(*part.shape[:-2], width, width)
            elif self._num_recent + count > _CHUNK:
                self._earlier = self._recent.double() if self._earlier is None else self._earlier.add_(self._recent)
                self._recent.zero_()
                self._num_recent = 0
            self._num_recent += count
            for start in range(0, width, _BLOCK):
                columns = slice(start, start + _BLOCK)
                _add_product_(self._recent[..., start:, columns], part[..., start:].mT, part[..., columns])

    def total(self) -> Tensor:
        """The sum, in float64. The parts are given up: nothing can be added later."""
        assert self._recent is not None
        total = self._recent.double() if self._earlier is None else self._earlier.add_(self._recent)
        self._recent = self._earlier = None
        for start in range(0, total.shape[-1], _BLOCK):
            own, later = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
            block = total[..., own, own]
            total[..., own, own] = block.tril() + block.tril(-1).mT
            total[..., own, later] = total[..., later, own].mT
        return total


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.addmm_(left, right) if total.dim() == 2 else total.baddbmm_(left, right)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A solved regression: Y ~ X coefficients + intercept."""

    coefficients: Tensor  # (*, p, q)
    intercept: Tensor  # (*, q)
    product_mean: Tensor  # (*, q) of X coefficients
    product_variance: Tensor  # (*, q)


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossMoments:
    """First and second moments of X and Y, centred."""

    x_mean: Tensor  # (*, p)
    y_mean: Tensor  # (*, q)
    gram: Tensor  # (*, p, p)
    cross: Tensor  # (*, p, q)

    @classmethod
    def of(cls, x: Tensor, y: Tensor, *, overwrite: bool = False) -> "CrossMoments":
        """overwrite: `x` may be changed, so that it is not held twice."""
        x_mean, y_mean = x.mean(-2, dtype=torch.float64), y.mean(-2, dtype=torch.float64)
        shift = x_mean.to(x.dtype).unsqueeze(-2)
        xc, yc = x.sub_(shift) if overwrite else x - shift, y - y_mean.to(y.dtype).unsqueeze(-2)
        count = x.shape[-2]
        return cls(
            x_mean=x_mean,
            y_mean=y_mean,
            gram=sum_of_products(xc, xc) / count,
            cross=sum_of_products(xc, yc) / count,
        )

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.gram).all() and torch.isfinite(self.cross).all())

    def fit(self, prior: Tensor, ridge: float, *, has_intercept: bool) -> Fit:
        """Regress Y on X, shrunk towards `prior` (*, p, q). Without an intercept the moments are taken about zero."""
        x_mean, y_mean = self.x_mean, self.y_mean
        gram, cross = self.gram, self.cross
        if not has_intercept:
            gram = gram + x_mean.unsqueeze(-1) * x_mean.unsqueeze(-2)
            cross = cross + x_mean.unsqueeze(-1) * y_mean.unsqueeze(-2)
        solution = solve_towards(gram, cross, prior, ridge)
        product_mean = (x_mean.unsqueeze(-2) @ solution).squeeze(-2)
        return Fit(
            coefficients=solution,
            intercept=y_mean - product_mean if has_intercept else torch.zeros_like(y_mean),
            product_mean=product_mean,
            product_variance=((self.gram @ solution) * solution).sum(-2).clamp_min(0),
        )
