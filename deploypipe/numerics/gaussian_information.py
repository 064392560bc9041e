"""Gaussian mutual information between two sets of columns, from their joint covariance.

Legend: n rows; X (n, p) and Y (n, q); S their joint covariance;
    Sy|x = Syy - Syx Sxx^-1 Sxy, the part that X does not explain;
    I(X; Y) = 1/2 [logdet(Syy + f I) - logdet(Sy|x + f I)]
with a noise floor f on Y: without one the information of a deterministic map is infinite. For variables that are not
Gaussian it counts linear dependence only.
"""

import torch
from torch import Tensor

from deploypipe.numerics.least_squares import regular_cholesky

_ROWS_A_COLUMN = 10  # with fewer rows per column of X and Y, chance correlations look like information
_RIDGE = 1e-6  # share of the mean variance of X; far below any noise floor


def gaussian_information(covariance: Tensor, num_x: int, *, floor: float = 0.0, ridge: float = 0.0) -> float:
    """Information in nats of the first `num_x` columns of the joint covariance (p + q, p + q) about the rest.

    floor, ridge: variances added to Y and X. float64; O((p + q)^3). A singular X is fine; a singular Y needs a floor.
    """
    own, cross = covariance[num_x:, num_x:], covariance[:num_x, num_x:]
    factor = regular_cholesky(covariance[:num_x, :num_x], ridge)
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    return 0.5 * (_logdet(own, floor) - _logdet(own - half.T @ half, floor))


def redundancy(x: Tensor, y: Tensor, noise: float) -> float:
    """I(X; Y) as a share of its maximum 1/2 logdet(I + Syy / f). O(n (p + q)^2).

    1 if Y is a linear map of X; 0 if X has no information about Y or Y is constant. f = `noise` * mean variance of Y.
    """
    rows = torch.cat([x, y], dim=1).double()
    rows = rows - rows.mean(0)
    covariance, num_x = rows.T @ rows / len(rows), x.shape[1]
    variances = covariance.diagonal()
    floor = noise * float(variances[num_x:].mean())
    if floor <= 0:
        return 0.0
    ridge = _RIDGE * float(variances[:num_x].mean())
    maximum = 0.5 * _logdet(covariance[num_x:, num_x:] / floor, 1.0)
    return gaussian_information(covariance, num_x, floor=floor, ridge=ridge) / maximum


def principal_rows(rows: Tensor) -> Tensor:
    """Rows (n, d) in their leading principal components (n, r) float64, r = n / 20 or d if that is smaller.

    Two such matrices have enough rows for their joint covariance. O(n d min(n, d)).
    """
    centred = rows.double() - rows.double().mean(0)
    width = max(1, len(rows) // (2 * _ROWS_A_COLUMN))
    if width >= rows.shape[1]:
        return centred
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    leading: Tensor = left[:, :width] * scale[:width]
    return leading


def _logdet(covariance: Tensor, floor: float) -> float:
    return 2 * float(regular_cholesky(covariance, floor).diagonal().log().sum())
