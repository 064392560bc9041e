"""Gaussian mutual information between groups of regressors and the outputs they predict, in closed form.

Legend: X (p,) regressors with covariance S; Y = X B + noise, B (p, m), noise covariance s^2 I (the noise floor: without
it the information of a deterministic map is infinite). P = S^-1; Q = P + B B' / s^2, the X-block of the inverse of the
covariance of (X, Y) together; C = Q^-1 = Cov(X | Y). G: one group of regressors. All float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deploypipe.numerics.least_squares import regular_cholesky

_PANELS = 16  # parts in which a matrix is worked off: fewer mean less copying and more work on columns
_LEAST_PANEL = 64  # columns of change put off until they are multiplied out: enough for a fast matrix product
_LEAST_NOISE = 1e-9  # share of the outputs' mean variance; a floor of zero would make every information infinite


class SequentialRemoval:
    """Remove groups of regressors one after another; what is left keeps predicting Y as well as it can.

    After removing G the information that the rest has about Y falls by I(X_G; Y | X_rest) = 1/2 [logdet Q_GG - logdet
    P_GG] (arXiv:2411.00147's criterion, closed), and P and Q of what is left are Schur complements. Duplicates cost
    nothing until one of them is gone. Setting up is O(p^3 + p^2 m); after that nothing depends on m: all losses are
    O(p |G|^2), and removing every group, in any order, is O(p^3) together. `ridge` is a share of the mean variance of
    X, so singular covariances are fine. Regressors in no group always stay.
    """

    def __init__(
        self, covariance: Tensor, weights: Tensor, groups: Sequence[Sequence[int]], *, noise: float, ridge: float = 1e-6
    ) -> None:
        rows = grouped_rows(groups)
        precision = torch.cholesky_inverse(ridged_cholesky(covariance, ridge))[rows][:, rows]
        spread = weights[rows] / _noise_floor(covariance, weights, noise).sqrt()
        self._pair = _InformationPair(precision + spread @ spread.T, precision, len(groups[0]))

    def losses(self, some: Sequence[int] | None = None) -> Tensor:
        """Nats that removing each group (or each of `some`) alone, now, would lose. Meaningless for removed groups."""
        return self._pair.nats(some)

    def remove_(self, group: int) -> None:
        """Take a group out for good."""
        self._pair.eliminate_(group)


class SequentialSelection:
    """Choose groups of regressors one after another; what they tell of Y together is the sum of the gains.

    The mirror image of `SequentialRemoval`: given the chosen, I(X_G; Y | X_chosen) = 1/2 [logdet S_GG - logdet C_GG],
    with S and C conditioned on the chosen by Schur complements. Regressors in no group are never chosen, and count as
    part of what is unknown of Y. Costs and `ridge` as there.
    """

    def __init__(
        self, covariance: Tensor, weights: Tensor, groups: Sequence[Sequence[int]], *, noise: float, ridge: float = 1e-6
    ) -> None:
        rows = grouped_rows(groups)
        factor = ridged_cholesky(covariance, ridge)
        image = factor.T @ weights  # (p, m), so that Cov(Y) = image' image + s^2 I
        floor = _noise_floor(covariance, weights, noise)
        output_factor = torch.linalg.cholesky(image.T @ image + floor * torch.eye(image.shape[1], dtype=image.dtype))
        explained = torch.linalg.solve_triangular(output_factor, (factor[rows] @ image).T, upper=False)
        own = factor[rows] @ factor[rows].T
        self._pair = _InformationPair(own, own - explained.T @ explained, len(groups[0]))

    def gains(self, some: Sequence[int] | None = None) -> Tensor:
        """Nats that each group (or each of `some`) would add to the chosen. Meaningless for chosen groups."""
        return self._pair.nats(some)

    def choose_(self, group: int) -> None:
        """Count a group among the chosen."""
        self._pair.eliminate_(group)


def total_information(covariance: Tensor, cross: Tensor, outputs: Tensor, *, noise: float) -> float:
    """I(X; Y + noise) in nats from Cov(X) (p, p), Cov(X, Y) (p, m) and Cov(Y) (m, m); the floor is that of the classes.

    For a linear map cross = S B; for what is independent of X it is sampling error alone, and the information, about
    p m / (2 rows) nats, is what an estimate of it says when there is nothing to know.
    """
    factor = ridged_cholesky(covariance, 1e-6)
    image = torch.linalg.solve_triangular(factor, cross, upper=False)
    floor = max(noise, _LEAST_NOISE) * outputs.diagonal().mean().clamp_min(1e-12)
    noisy = outputs + floor * torch.eye(len(outputs), dtype=outputs.dtype)
    return 0.5 * float(torch.logdet(noisy) - torch.logdet(noisy - image.T @ image))


class _InformationPair:
    """Two positive definite matrices, larger - smaller semidefinite; eliminating a group conditions both on it.

    Eliminating group after group is a Cholesky factorisation of both with one order of pivots; the half difference of
    the pivots' log determinants is the information.
    """

    def __init__(self, larger: Tensor, smaller: Tensor, size: int) -> None:
        self.larger, self.smaller = DelayedMatrix(larger, size), DelayedMatrix(smaller, size)

    def nats(self, some: Sequence[int] | None) -> Tensor:
        nats = 0.5 * (_logdets(self.larger.blocks) - _logdets(self.smaller.blocks))
        return self.larger.by_group(nats, some)

    def eliminate_(self, group: int) -> None:
        for matrix in (self.larger, self.smaller):
            panel = pivot_columns(matrix, group)[0]
            matrix.remove_(group, panel, panel)


class DelayedMatrix:
    """A symmetric matrix that loses low-rank products and groups of rows, one after another.

    M (groups * s, groups * s), ordered by group. What is read between two removals is one group's columns and the
    diagonal blocks (always up to date). So the products L R' are put off until a whole panel of their columns has come
    together, and are then subtracted at once, from the rows that remain: one matrix product instead of many passes over
    memory. Every product must have the same number of columns.
    """

    def __init__(self, matrix: Tensor, size: int) -> None:
        self.matrix, self.size = matrix, size
        self.num_groups = len(matrix) // size
        self.groups = torch.arange(self.num_groups)  # those that have rows here, ascending
        self.blocks = _diagonal_blocks(matrix, size)  # (groups, s, s)
        self.removed: list[int] = []  # since the products were last subtracted; these still have rows
        self.delay = -(-max(len(matrix) // _PANELS, _LEAST_PANEL) // size)  # removals
        self.left = self.right = matrix.new_empty(len(matrix), 0)  # panels
        self.used = 0  # columns of them

    def columns(self, group: int) -> Tensor:
        """(rows, s), up to date."""
        rows = self.rows(group)
        return torch.addmm(self.matrix[:, rows], self.left[:, : self.used], self.right[rows, : self.used].T, alpha=-1)

    def rows(self, group: int) -> slice:
        """Where a group's rows lie now."""
        start = int(torch.searchsorted(self.groups, group)) * self.size
        return slice(start, start + self.size)

    def remove_(self, group: int, left: Tensor, right: Tensor) -> None:
        """M <- M - left right', both (rows, k), and then without the group."""
        if not self.removed:
            self.left = left.new_empty(len(left), self.delay * left.shape[1])
            self.right = self.left if left is right else torch.empty_like(self.left)
        added = slice(self.used, self.used + left.shape[1])
        self.left[:, added], self.right[:, added], self.used = left, right, added.stop
        self.removed.append(group)
        by_group = [side.reshape(-1, self.size, side.shape[1]) for side in (left, right)]
        self.blocks.baddbmm_(by_group[0], by_group[1].transpose(1, 2), alpha=-1)
        place = self.rows(group).start // self.size
        self.blocks[place] = torch.eye(self.size, dtype=left.dtype)  # keeps batched determinants and solves finite
        if len(self.removed) == self.delay:
            self._subtract_()

    def by_group(self, values: Tensor, some: Sequence[int] | None) -> Tensor:
        """Values in the order of `blocks`, as a vector over all groups there ever were (or over `some`)."""
        full = values.new_zeros(self.num_groups)
        full[self.groups] = values
        return full if some is None else full[list(some)]

    def _subtract_(self) -> None:
        stay = ~torch.isin(self.groups, torch.tensor(self.removed))
        rows = stay.repeat_interleave(self.size).nonzero().flatten()
        self.matrix = self.matrix[rows.unsqueeze(1), rows].addmm_(self.left[rows], self.right[rows].T, alpha=-1)
        self.groups, self.blocks = self.groups[stay], self.blocks[stay]
        self.removed, self.used = [], 0
        self.left = self.right = self.matrix.new_empty(len(rows), 0)


def pivot_columns(matrix: DelayedMatrix, group: int) -> tuple[Tensor, Tensor]:
    """(U, L): L the Cholesky factor of the group's block, U = M_.G L^-T (rows, s); M - U U' is the Schur complement."""
    columns = matrix.columns(group)
    factor = regular_cholesky(columns[matrix.rows(group)], 0.0)
    return divide(columns, factor), factor


def divide(columns: Tensor, factor: Tensor) -> Tensor:
    """columns L^-T for a lower triangular L."""
    quotient: Tensor = torch.linalg.solve_triangular(factor.T, columns, upper=True, left=False)
    return quotient


def ridged_cholesky(covariance: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of S + ridge * mean variance * I."""
    return regular_cholesky(covariance, ridge * float(covariance.diagonal().mean().clamp_min(1e-12)))


def grouped_rows(groups: Sequence[Sequence[int]]) -> Tensor:
    """The regressors of all groups, group after group."""
    if any(len(group) != len(groups[0]) for group in groups):
        raise ValueError("all groups of regressors must have the same size")
    return torch.tensor([row for group in groups for row in group])


def _noise_floor(covariance: Tensor, weights: Tensor, noise: float) -> Tensor:
    """s^2: a share of the outputs' mean variance."""
    variance = ((covariance @ weights) * weights).sum(0).mean()
    return max(noise, _LEAST_NOISE) * variance.clamp_min(1e-12)


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    number = len(matrix) // size
    by_group = matrix.reshape(number, size, number, size)
    return by_group.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _logdets(blocks: Tensor) -> Tensor:
    if blocks.shape[1] == 1:  # most linear layers; the factorisation would take most of the time
        return blocks.flatten().log()
    logdets: Tensor = torch.logdet(blocks)
    return logdets
