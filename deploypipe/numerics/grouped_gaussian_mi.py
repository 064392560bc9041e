"""Gaussian mutual information between groups of regressors and the outputs they predict, in closed form.

Legend: X (p,) regressors with covariance S; Y = X B + noise, B (p, m), noise covariance s^2 I (the noise floor: without
it the information of a deterministic map is infinite). P = S^-1; Q = P + B B' / s^2, the X-block of the inverse of the
covariance of (X, Y) together; C = Q^-1 = Cov(X | Y). G: one group of regressors. All float64. (*): leading dimensions,
if any, are problems of one shape with the same groups, solved together; each may remove another group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deploypipe.numerics.least_squares import regular_cholesky, regularised

_PANELS = 16  # parts in which a matrix is processed: fewer parts mean less copying and more work per column
_MIN_PANEL = 64  # columns of changes collected before they are multiplied out: enough for a fast matrix product
_MIN_NOISE = 1e-9  # share of the outputs' mean variance; a floor of zero would make every information infinite


class SequentialRemoval:
    """Remove groups of regressors one after another, and give the information about Y that each removal loses.

    Removing G lowers the information that the rest has about Y by I(X_G; Y | X_rest) = 1/2 [logdet Q_GG - logdet P_GG]
    (the criterion of arXiv:2411.00147 in closed form). P and Q of the rest are Schur complements. Duplicates cost
    nothing until one of them is removed. Setting up is O(p^3 + p^2 m). After that nothing depends on m: all losses are
    O(p |G|^2), and removing every group, in any order, is O(p^3) in total. `ridge` is a share of the mean variance of
    X, so singular covariances are fine. Regressors in no group always stay.
    """

    def __init__(
        self, covariance: Tensor, weights: Tensor, groups: Sequence[Sequence[int]], *, noise: float, ridge: float = 1e-6
    ) -> None:
        rows = grouped_rows(groups)
        precision = between(torch.cholesky_inverse(ridged_cholesky(covariance, ridge)), rows)
        spread = weights[..., rows, :] / _noise_floor(covariance, weights, noise).sqrt()
        self._pair = _InformationPair((spread @ spread.mT).add_(precision), precision, len(groups[0]))

    def losses(self, some: Sequence[int] | None = None) -> Tensor:
        """Nats (*, groups) lost by removing each group (or those in `some`) alone. Undefined for removed ones."""
        return self._pair.nats(some)

    def remove_(self, group: int | Tensor) -> None:
        """Remove a group, or one group per problem (*)."""
        self._pair.eliminate_(group)


class SequentialSelection:
    """Choose groups of regressors one after another; their joint information about Y is the sum of the gains.

    The reverse of `SequentialRemoval`: given the chosen groups, I(X_G; Y | X_chosen) = 1/2 [logdet S_GG - logdet C_GG],
    with S and C conditioned on the chosen by Schur complements. Regressors in no group are never chosen, and
    count as unknown causes of Y. Costs and `ridge` as there.
    """

    def __init__(
        self, covariance: Tensor, weights: Tensor, groups: Sequence[Sequence[int]], *, noise: float, ridge: float = 1e-6
    ) -> None:
        rows = grouped_rows(groups)
        unknown = regularised(covariance, ridge * _mean_variance(covariance))
        cross = unknown @ weights  # (*, p, m)
        outputs = weights.mT @ cross
        outputs.diagonal(dim1=-2, dim2=-1).add_(_noise_floor(covariance, weights, noise).squeeze(-1))
        explained = torch.linalg.solve_triangular(torch.linalg.cholesky(outputs), cross[..., rows, :].mT, upper=False)
        own = between(unknown, rows)
        self._pair = _InformationPair(own, own - explained.mT @ explained, len(groups[0]))

    def gains(self, some: Sequence[int] | None = None) -> Tensor:
        """Nats (*, groups) that each group (or each of `some`) would add now. Undefined for chosen groups."""
        return self._pair.nats(some)

    def choose_(self, group: int | Tensor) -> None:
        """Choose a group, or one group per problem (*)."""
        self._pair.eliminate_(group)


def total_information(covariance: Tensor, cross: Tensor, outputs: Tensor, *, noise: float) -> float:
    """I(X; Y + noise) in nats from Cov(X) (p, p), Cov(X, Y) (p, m) and Cov(Y) (m, m); the noise floor is that of the
    classes above.

    For a linear map cross = S B. If Y is independent of X, cross is sampling error alone. The information is then about
    p m / (2 rows) nats: the value that an estimate gives if there is none.
    """
    factor = ridged_cholesky(covariance, 1e-6)
    image = torch.linalg.solve_triangular(factor, cross, upper=False)
    floor = max(noise, _MIN_NOISE) * outputs.diagonal().mean().clamp_min(1e-12)
    noisy = outputs + floor * torch.eye(len(outputs), dtype=outputs.dtype)
    return 0.5 * float(torch.logdet(noisy) - torch.logdet(noisy - image.T @ image))


class _InformationPair:
    """Two positive definite matrices, larger - smaller semidefinite. Eliminating a group conditions both on it.

    Eliminating group after group is a Cholesky factorisation of both with one order of pivots; the half difference of
    the pivots' log determinants is the information.
    """

    def __init__(self, larger: Tensor, smaller: Tensor, size: int) -> None:
        self.both = DelayedMatrix(torch.stack([larger, smaller]), size)

    def nats(self, some: Sequence[int] | None) -> Tensor:
        logdets = self.both.by_group(_logdets(self.both.blocks), some)
        return 0.5 * (logdets[0] - logdets[1])

    def eliminate_(self, group: int | Tensor) -> None:
        panel = pivot_rows(self.both, group)[0]
        self.both.remove_(group, panel, panel)


class DelayedMatrix:
    """Symmetric matrices (*) from which low-rank products and groups of rows are removed one after another.

    M (*, groups * s, groups * s), ordered by group, is overwritten; leading dimensions are flattened into one. Between
    two removals only one group's rows and the diagonal blocks are read; the blocks are always up to date. So the
    products L'R are collected into a panel and subtracted together: one matrix product instead of many passes over
    memory. Then the last groups move into the places of removed ones, which keeps the active part small without a copy
    of the whole. Every product must have the same number of rows.
    """

    def __init__(self, matrix: Tensor, size: int) -> None:
        self.shape, self.size = matrix.shape[:-2], size
        self.matrix = matrix.reshape(-1, *matrix.shape[-2:])
        number, width = self.matrix.shape[:2]
        self.num_groups = width // size
        self.each = torch.arange(number).unsqueeze(1)
        self.groups = torch.arange(self.num_groups).repeat(number, 1)  # groups that have rows here, in this order
        self.blocks = _diagonal_blocks(self.matrix, size)  # (number, groups, s, s)
        self.removed: list[Tensor] = []  # (number, 1) each, since the products were last subtracted; still have rows
        self.delay = -(-max(width // _PANELS, _MIN_PANEL) // size)  # removals
        self.left = self.right = matrix.new_empty(number, 0, width)  # panels
        self.used = 0  # rows of them

    def rows(self, group: int | Tensor) -> Tensor:
        """(number, s, width), up to date."""
        rows = self._places(group) * self.size + torch.arange(self.size)
        of_right = self.right[:, : self.used].mT[self.each, rows]  # (number, s, used)
        return torch.baddbmm(self.matrix[self.each, rows], of_right, self.left[:, : self.used], alpha=-1)

    def block(self, group: int | Tensor) -> Tensor:
        """(number, s, s), up to date."""
        return self.blocks[self.each, self._places(group)].squeeze(1)

    def remove_(self, group: int | Tensor, left: Tensor, right: Tensor) -> None:
        """M <- M - left' right, both (number, k, width); then remove the group."""
        if not self.removed:
            self.left = left.new_empty(len(left), self.delay * left.shape[1], left.shape[2])
            self.right = self.left if left is right else torch.empty_like(self.left)
        added = slice(self.used, self.used + left.shape[1])
        self.left[:, added], self.right[:, added], self.used = left, right, added.stop
        by_group = [side.view(*side.shape[:2], -1, self.size) for side in (left, right)]  # (number, k, groups, s)
        self.blocks -= torch.einsum("nkgs,nkgt->ngst", *by_group)
        places = self._places(group)
        self.blocks[self.each, places] = torch.eye(self.size, dtype=left.dtype)  # keeps determinants and solves finite
        self.removed.append(self.groups.gather(1, places))
        if len(self.removed) == self.delay:
            self._subtract_()

    def by_group(self, values: Tensor, some: Sequence[int] | None) -> Tensor:
        """Values (number, groups) in the order of `blocks`, as (*, all original groups) (or `some`)."""
        full = values.new_zeros(len(values), self.num_groups).scatter_(1, self.groups, values)
        full = full.reshape(*self.shape, self.num_groups)
        return full if some is None else full[..., list(some)]

    def _places(self, group: int | Tensor) -> Tensor:
        """The position of a group among those that have rows here, (number, 1)."""
        wanted = torch.as_tensor(group).expand(self.shape).reshape(-1, 1)
        return (self.groups == wanted).byte().argmax(1, keepdim=True)

    def _subtract_(self) -> None:
        self.matrix.baddbmm_(self.left.mT, self.right, alpha=-1)
        stays = (self.groups.unsqueeze(2) != torch.cat(self.removed, dim=1).unsqueeze(1)).all(2)
        rest = stays.shape[1] - len(self.removed)
        each, place = (~stays[:, :rest]).nonzero().T
        last = rest + stays[:, rest:].nonzero()[:, 1]  # as many of each matrix
        by_group = _by_group(self.matrix, self.size)
        by_group[each, place] = by_group[each, last]
        by_group[each, :, :, place] = by_group[each, :, :, last]
        for values in (self.groups, self.blocks):
            values[each, place] = values[each, last]
        self.groups, self.blocks = self.groups[:, :rest], self.blocks[:, :rest]
        width = rest * self.size
        self.matrix = self.matrix[:, :width, :width]
        self.removed, self.used = [], 0
        self.left = self.right = self.matrix.new_empty(len(stays), 0, width)


def pivot_rows(matrix: DelayedMatrix, group: int | Tensor) -> tuple[Tensor, Tensor]:
    """(U, L): L the Cholesky factor of the group's block, U = L^-1 M_G. (number, s, width); M - U'U is the Schur
    complement."""
    factor = regular_cholesky(matrix.block(group), 0.0)
    return divide(matrix.rows(group), factor), factor


def divide(rows: Tensor, factor: Tensor) -> Tensor:
    """L^-1 rows for a lower triangular L."""
    quotient: Tensor = torch.linalg.solve_triangular(factor, rows, upper=False)
    return quotient


def ridged_cholesky(covariance: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of S + ridge * mean variance * I."""
    return regular_cholesky(covariance, ridge * _mean_variance(covariance))


def _mean_variance(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)


def grouped_rows(groups: Sequence[Sequence[int]]) -> Tensor:
    """The regressors of all groups, group after group."""
    if any(len(group) != len(groups[0]) for group in groups):
        raise ValueError("all groups of regressors must have the same size")
    return torch.tensor([row for group in groups for row in group])


def between(matrix: Tensor, rows: Tensor) -> Tensor:
    """The part (*, rows, rows) of a matrix, without a copy if it is the whole matrix."""
    if torch.equal(rows, torch.arange(matrix.shape[-1])):
        return matrix
    return matrix.index_select(-2, rows).index_select(-1, rows)


def _noise_floor(covariance: Tensor, weights: Tensor, noise: float) -> Tensor:
    """s^2 (*, 1, 1): a share of the outputs' mean variance."""
    variance = ((covariance @ weights) * weights).sum(-2, keepdim=True).mean(-1, keepdim=True)
    return max(noise, _MIN_NOISE) * variance.clamp_min(1e-12)


def _by_group(matrix: Tensor, size: int) -> Tensor:
    """(number, groups, s, groups, s), a view."""
    groups = matrix.shape[2] // size
    return matrix.view(len(matrix), groups, size, groups, size)


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """(number, groups, s, s)"""
    return _by_group(matrix, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()


def _logdets(blocks: Tensor) -> Tensor:
    if blocks.shape[-1] == 1:  # most linear layers; otherwise the factorization would take most of the time
        return blocks.flatten(-3).log()
    logdets: Tensor = torch.logdet(blocks)
    return logdets
