"""Squared error of linear outputs when their regressors go one group after another and the rest is fitted anew.

Legend: X (p,) regressors with covariance S; Y = X B, B (p, m); W = diag(output_weights). P = S^-1; C = B W B' (p, p).
G: one group of regressors, R: all others. All float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deploypipe.numerics.gaussian_mi import DelayedMatrix, divide, grouped_rows, pivot_columns, ridged_cholesky


class SequentialErrorRemoval:
    """Remove groups of regressors one after another, each time with the best linear repair.

    Removing G raises the weighted squared error sum_o W_o E(Y_o - fit_o)^2 by tr(P_GG^-1 C_GG), and the coefficients of
    the rest become B_R - P_RG P_GG^-1 B_G (optimal brain surgeon, Hassibi and Stork 1993, for groups and many outputs).
    Only C, not B, is carried along, so that nothing after the set-up, O(p^3 + p^2 m), depends on m: all losses are
    O(p |G|^2), removing every group is O(p^3) together. The limit of `SequentialRemoval` for a large noise floor.
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
        self._precision = DelayedMatrix(precision[rows][:, rows], size)
        self._coefficients = DelayedMatrix((weights[rows] * output_weights) @ weights[rows].T, size)

    def losses(self, some: Sequence[int] | None = None) -> Tensor:
        """Error that removing each group (or each of `some`) alone, now, would add. Meaningless for removed groups."""
        solved = torch.linalg.solve(self._precision.blocks, self._coefficients.blocks)
        return self._precision.by_group(solved.diagonal(dim1=1, dim2=2).sum(1), some)

    def remove_(self, group: int) -> None:
        """Take a group out for good.

        With P_GG = L L', U = P_.G L^-T, V = C_.G L^-T - U K / 2 and K = L^-1 C_GG L^-T, the changed B gives
        P <- P - U U' and C <- C - U V' - V U'.
        """
        panel, factor = pivot_columns(self._precision, group)
        scaled = divide(self._coefficients.columns(group), factor)
        own = divide(scaled[self._coefficients.rows(group)].T, factor)
        rest = scaled - 0.5 * panel @ own
        self._precision.remove_(group, panel, panel)
        self._coefficients.remove_(group, torch.cat([panel, rest], dim=1), torch.cat([rest, panel], dim=1))
