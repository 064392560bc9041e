"""Sequential removal and selection equal results from explicit covariances, group by group."""

import pytest
import torch
from torch import Tensor

from deploypipe.numerics.grouped_gaussian_mi import SequentialRemoval, SequentialSelection

NOISE = 1e-2


def random_problem(p: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(p, p + 3, generator=generator, dtype=torch.float64)
    return root @ root.T / p, torch.randn(p, m, generator=generator, dtype=torch.float64)


def unexplained(covariance: Tensor, weights: Tensor, kept: list[int]) -> float:
    """logdet of the noise floor plus Cov(Y | kept regressors)."""
    output = weights.T @ covariance @ weights
    floor = torch.eye(len(output), dtype=torch.float64) * NOISE * output.diagonal().mean()
    if kept:
        cross = weights.T @ covariance[:, kept]
        output = output - cross @ torch.linalg.solve(covariance[kept][:, kept], cross.T)
        return float(torch.logdet(output + floor))
    return float(torch.logdet(output + floor))


@pytest.mark.parametrize(("size", "m", "seed"), [(1, 5, 0), (1, 20, 1), (3, 4, 2), (4, 1, 3)])
def test_losses_equal_explicit_conditional_covariances_after_every_removal(size: int, m: int, seed: int) -> None:
    covariance, weights = random_problem(12, m, seed)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [shuffled[i : i + size] for i in range(0, 12, size)]
    removal = SequentialRemoval(covariance, weights, groups, noise=NOISE, ridge=0.0)
    left = list(range(len(groups)))
    while left:
        kept = [i for g in left for i in groups[g]]
        now = unexplained(covariance, weights, kept)
        expected = []
        for group in left:
            rest = [i for i in kept if i not in groups[group]]
            expected.append(0.5 * (unexplained(covariance, weights, rest) - now))
        torch.testing.assert_close(
            removal.losses(left), torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=1e-8
        )
        assert torch.isfinite(removal.losses()).all()
        removal.remove_(left.pop(seed % len(left)))


def test_arguments_are_unchanged() -> None:
    covariance, weights = random_problem(6, 3, 0)
    before = covariance.clone(), weights.clone()
    removal = SequentialRemoval(covariance, weights, [[i] for i in range(6)], noise=NOISE)
    removal.remove_(2)
    assert torch.equal(covariance, before[0])
    assert torch.equal(weights, before[1])


def test_one_of_two_duplicates_costs_nothing_until_the_other_is_removed() -> None:
    covariance, weights = random_problem(6, 4, 4)
    twice = [0, 1, 2, 3, 4, 5, 2]
    removal = SequentialRemoval(covariance[twice][:, twice], weights[twice], [[i] for i in range(7)], noise=NOISE)
    losses = removal.losses()
    assert losses[2] < 1e-3
    assert losses[6] < 1e-3
    removal.remove_(6)
    assert removal.losses()[2] > 0.1


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_singular_covariances_give_finite_nonnegative_losses(rank: int) -> None:
    root = torch.randn(10, rank, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights = torch.randn(10, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    removal = SequentialRemoval(root @ root.T, weights, [[i, i + 1] for i in range(0, 10, 2)], noise=NOISE)
    for group in range(5):
        losses = removal.losses(range(group, 5))
        assert torch.isfinite(losses).all()
        assert (losses > -1e-6).all()
        removal.remove_(group)


def test_groups_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="same size"):
        SequentialRemoval(*random_problem(3, 2, 0), [[0], [1, 2]], noise=NOISE)


def information(covariance: Tensor, weights: Tensor, chosen: list[int]) -> float:
    """I(chosen regressors; Y) from the joint covariance of both."""
    output = weights.T @ covariance @ weights
    output = output + torch.eye(len(output), dtype=torch.float64) * NOISE * output.diagonal().mean()
    own, cross = covariance[chosen][:, chosen], covariance[chosen] @ weights
    joint = torch.cat([torch.cat([own, cross], dim=1), torch.cat([cross.T, output], dim=1)])
    return 0.5 * float(torch.logdet(own) + torch.logdet(output) - torch.logdet(joint))


@pytest.mark.parametrize(("size", "m", "seed"), [(1, 5, 0), (1, 20, 1), (3, 4, 2), (4, 1, 3)])
def test_gains_equal_explicit_joint_covariances_after_every_choice(size: int, m: int, seed: int) -> None:
    """Also if a regressor belongs to no group; it then counts as unknown."""
    covariance, weights = random_problem(13, m, seed)
    shuffled = torch.randperm(13, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [shuffled[i : i + size] for i in range(0, 12, size)]
    selection = SequentialSelection(covariance, weights, groups, noise=NOISE, ridge=0.0)
    left, chosen = list(range(len(groups))), []
    while left:
        before = information(covariance, weights, chosen) if chosen else 0.0
        expected = [information(covariance, weights, chosen + groups[group]) - before for group in left]
        gains = selection.gains(left)
        torch.testing.assert_close(gains, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=1e-8)
        best = left.pop(int(gains.argmax()))
        selection.choose_(best)
        chosen += groups[best]


@pytest.mark.parametrize(("number", "size"), [(150, 1), (60, 3)])
def test_delayed_changes_equal_explicit_ones_across_panels(number: int, size: int) -> None:
    """More removals than one panel holds; the regressors in no group stay."""
    p = number * size + 5
    covariance, weights = random_problem(p, 7, 0)
    covariance += torch.eye(p, dtype=torch.float64)
    groups = [list(range(i, i + size)) for i in range(0, number * size, size)]
    removal = SequentialRemoval(covariance, weights, groups, noise=NOISE, ridge=0.0)
    selection = SequentialSelection(covariance, weights, groups, noise=NOISE, ridge=0.0)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0)).tolist()
    gone: list[int] = []
    for step, group in enumerate(order):
        if step % 29 == 28:
            kept = [i for i in range(p) if i not in gone]
            rest = [i for i in kept if i not in groups[group]]
            loss = 0.5 * (unexplained(covariance, weights, rest) - unexplained(covariance, weights, kept))
            gain = information(covariance, weights, gone + groups[group]) - information(covariance, weights, gone)
            assert float(removal.losses([group])) == pytest.approx(loss, rel=1e-8)
            assert float(selection.gains([group])) == pytest.approx(gain, rel=1e-8)
        removal.remove_(group)
        selection.choose_(group)
        gone += groups[group]
    assert torch.isfinite(removal.losses()).all()


def test_of_two_duplicates_one_is_chosen_early_and_the_other_last() -> None:
    covariance, weights = random_problem(6, 4, 4)
    twice = [0, 1, 2, 3, 4, 5, 2]
    selection = SequentialSelection(covariance[twice][:, twice], weights[twice], [[i] for i in range(7)], noise=NOISE)
    assert float(selection.gains([2])) == pytest.approx(float(selection.gains([6])))
    selection.choose_(6)
    gains = selection.gains(range(6))
    assert int(gains.argmin()) == 2
    assert 0 <= float(gains[2]) < 1e-3


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_singular_covariances_give_finite_nonnegative_gains(rank: int, noise: float) -> None:
    root = torch.randn(10, rank, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights = torch.randn(10, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    selection = SequentialSelection(root @ root.T, weights, [[i, i + 1] for i in range(0, 10, 2)], noise=noise)
    for group in range(5):
        gains = selection.gains(range(group, 5))
        assert torch.isfinite(gains).all()
        assert (gains > -1e-6).all()
        selection.choose_(group)


@pytest.mark.parametrize(("number", "size"), [(150, 1), (30, 3)])
def test_stacked_problems_are_solved_independently(number: int, size: int) -> None:
    """Each problem removes groups in its own order, over more than one panel; one is singular."""
    p = number * size + 2
    problems = [random_problem(p, 5, seed) for seed in range(3)]
    problems[1][0][0] = problems[1][0][:, 0] = 0.0
    covariance, weights = (torch.stack(parts) for parts in zip(*problems, strict=True))
    groups = [list(range(i, i + size)) for i in range(2, p, size)]
    orders = torch.stack([torch.randperm(number, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    for kind, step_name, amounts_name in (
        (SequentialRemoval, "remove_", "losses"),
        (SequentialSelection, "choose_", "gains"),
    ):
        together = kind(covariance, weights, groups, noise=NOISE)
        alone = [kind(*problem, groups, noise=NOISE) for problem in problems]
        for step in range(number - 1):
            getattr(together, step_name)(orders[:, step])
            for problem, unit in zip(alone, orders[:, step].tolist(), strict=True):
                getattr(problem, step_name)(unit)
            if step % 20 == 0:
                expected = torch.stack([getattr(problem, amounts_name)() for problem in alone])
                torch.testing.assert_close(getattr(together, amounts_name)(), expected)
