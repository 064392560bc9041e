"""Gaussian mutual information between groups of regressors and the outputs they predict, in closed form.

Legend: X (p,) regressors with covariance S; Y = X B + noise, B (p, m), noise covariance s^2 I (the noise floor: without
it the information of a deterministic map is infinite). E = covariance of Y that the kept regressors leave unexplained.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deploypipe.numerics.least_squares import regular_cholesky


class SequentialRemoval:
    """Remove groups of regressors one after another; what is left keeps predicting Y as well as it can.

    After removing G the information that the rest has about Y falls by
        1/2 logdet(s^2 I + E_new) - 1/2 logdet(s^2 I + E) = 1/2 [logdet(P_GG + B_G A^-1 B_G') - logdet(P_GG)],
    with P = S^-1 on the remaining regressors and A = s^2 I + E (arXiv:2411.00147's I(X_G; Y | X_rest); the two terms
    are Q_GG and P_GG of the block-inverse form). Duplicates cost nothing until one of them is gone. float64; a step is
    O(p^2 |G| + groups m^2 |G|). `ridge` is a share of the mean variance of X, so singular covariances are fine.
    """

    def __init__(
        self, covariance: Tensor, weights: Tensor, groups: Sequence[Sequence[int]], *, noise: float, ridge: float = 1e-6
    ) -> None:
        size = max(len(group) for group in groups)
        if any(len(group) != size for group in groups):
            raise ValueError("all groups of regressors must have the same size")
        scale = covariance.diagonal().mean().clamp_min(1e-12)
        self.groups = torch.tensor([list(group) for group in groups])  # (groups, size)
        self.precision = torch.cholesky_inverse(regular_cholesky(covariance, ridge * float(scale)))
        self.weights = weights.clone()
        output = weights.T @ covariance @ weights
        floor = noise * output.diagonal().mean().clamp_min(1e-12)
        self.unexplained = torch.eye(weights.shape[1], dtype=torch.float64) * floor

    def losses(self, some: Sequence[int] | None = None) -> Tensor:
        """Nats that removing each group (or each of `some`) alone, now, would lose. Meaningless for removed groups."""
        groups = self.groups if some is None else self.groups[list(some)]
        own = self.precision[groups.unsqueeze(2), groups.unsqueeze(1)]  # (groups, size, size)
        weights = self.weights[groups]  # (groups, size, m)
        explained = torch.cholesky_solve(weights.transpose(1, 2), torch.linalg.cholesky(self.unexplained))
        return 0.5 * (torch.logdet(own + weights @ explained) - torch.logdet(own))

    def remove_(self, group: int) -> None:
        """Take a group out for good: downdate P, B and the unexplained covariance."""
        rows = self.groups[group]
        inverse = torch.linalg.inv(self.precision[rows][:, rows])
        weights, columns = self.weights[rows], self.precision[:, rows]
        self.unexplained += weights.T @ inverse @ weights
        self.weights -= columns @ (inverse @ weights)
        self.precision -= columns @ inverse @ columns.T
        # Removed rows are never read again; a unit block keeps the batched determinants finite.
        self.precision[rows] = 0
        self.precision[:, rows] = 0
        self.precision[rows, rows] = 1
        self.weights[rows] = 0
