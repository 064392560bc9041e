"""Squared error of linear outputs when groups of regressors are removed and the rest is fitted again.

Legend: X (p,) regressors with covariance S; Y = X B, B (p, m); W = diag(output_weights). P = S^-1; C = B W B' (p, p).
G: one group of regressors, R: all others. All float64. (*): several problems, as in `grouped_gaussian_mi`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deploypipe.numerics.grouped_gaussian_mi import (
    DelayedMatrix,
    between,
    divide,
    grouped_rows,
    pivot_rows,
    ridged_cholesky,
)
from deploypipe.numerics.least_squares import regular_cholesky


class SequentialErrorRemoval:
    """Remove groups of regressors one after another, each time with the best linear repair.

    Removing G raises the weighted squared error sum_o W_o E(Y_o - fit_o)^2 by tr(P_GG^-1 C_GG), and the coefficients of
    the rest become B_R - P_RG P_GG^-1 B_G (optimal brain surgeon, Hassibi and Stork 1993, for groups and many outputs).
    Only C is updated, not B, so nothing after the set-up, O(p^3 + p^2 m), depends on m: all losses are O(p |G|^2), and
    removing every group is O(p^3) in total. This is the limit of `SequentialRemoval` for a large noise floor.
    `ridge` is a share of the mean variance of X, so singular covariances are fine. Regressors in no group always stay.
    """

    def __init__(
        self,
        covariance: Tensor,
        weights: Tensor,
        groups: Sequence[Sequence[int]],
        *,
        output_weights: Tensor,
        ridge: float = 1e-6,
    ) -> None:
        rows, size = grouped_rows(groups), len(groups[0])
        precision = torch.cholesky_inverse(ridged_cholesky(covariance, ridge))
        own = weights[..., rows, :]
        self._precision = DelayedMatrix(between(precision, rows), size)
        self._coefficients = DelayedMatrix((own * output_weights.unsqueeze(-2)) @ own.mT, size)

    def losses(self, some: Sequence[int] | None = None) -> Tensor:
        """Error (*, groups) added by removing each group (or those in `some`) alone. Undefined for removed ones."""
        factor = regular_cholesky(self._precision.blocks, 0.0)
        solved = torch.cholesky_solve(self._coefficients.blocks, factor)
        return self._precision.by_group(solved.diagonal(dim1=-2, dim2=-1).sum(-1), some)

    def remove_(self, group: int | Tensor) -> None:
        """Remove a group, or one group per problem (*).

        With P_GG = L L', U = L^-1 P_G., K = L^-1 C_GG L^-T and V = L^-1 C_G. - K U / 2, the new B gives
        P <- P - U'U and C <- C - U'V - V'U.
        """
        panel, factor = pivot_rows(self._precision, group)
        own = divide(divide(self._coefficients.block(group), factor).mT, factor)
        rest = divide(self._coefficients.rows(group), factor) - 0.5 * own @ panel
        self._precision.remove_(group, panel, panel)
        self._coefficients.remove_(group, torch.cat([panel, rest], dim=1), torch.cat([rest, panel], dim=1))
