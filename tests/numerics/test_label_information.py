"""Binned information equals a count by hand; forward selection equals explicit determinants."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from deploypipe.numerics.label_information import (
    class_covariances,
    forward_selection,
    joint_counts,
    ledoit_wolf_intensity,
    miller_madow_information,
    plug_in_information,
    quantile_bins,
    scree_width,
)


def labelled(n: int, p: int, classes: int, seed: int, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Correlated units whose means depend on the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    mixing = torch.randn(p, p, generator=generator) / p**0.5
    means = strength * torch.randn(classes, p, generator=generator)
    return torch.randn(n, p, generator=generator) @ mixing + means[y], y


def by_hand(bins: list[int], y: list[int]) -> tuple[float, float]:
    """(plug-in, Miller-Madow) by a double loop over the cells."""
    n, information, joint = len(y), 0.0, 0
    for b in set(bins):
        for c in set(y):
            both = sum(1 for i in range(n) if bins[i] == b and y[i] == c)
            if both:
                joint += 1
                information += both / n * math.log(both * n / (bins.count(b) * y.count(c)))
    return information, information + (len(set(bins)) + len(set(y)) - joint - 1) / (2 * n)


@pytest.mark.parametrize("num_bins", [2, 5, 8])
def test_binned_information_equals_a_double_loop_over_cells(num_bins: int) -> None:
    x, y = labelled(90, 6, 3, seed=num_bins)
    x[:, 0] = x[:, 0].relu()
    x[:, 5] = 2.0
    bins = quantile_bins(x, num_bins)
    counts = joint_counts(bins, y, num_bins, 3)
    assert counts.sum((1, 2)).tolist() == [90] * 6
    plug_in, corrected = plug_in_information(counts), miller_madow_information(counts)
    for unit in range(6):
        expected = by_hand(bins[:, unit].tolist(), y.tolist())
        assert float(plug_in[unit]) == pytest.approx(expected[0], abs=1e-12)
        assert float(corrected[unit]) == pytest.approx(expected[1], abs=1e-12)


def test_bins_hold_equally_many_distinct_values() -> None:
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    bins = quantile_bins(x, 8)
    assert all(torch.bincount(column, minlength=8).tolist() == [10] * 8 for column in bins.T)
    for unit in range(3):
        assert bins[x[:, unit].argsort(), unit].diff().min() >= 0


def test_tied_values_share_a_bin_that_no_other_value_falls_into() -> None:
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)).relu()
    bins = quantile_bins(x, 8)[:, 0]
    assert len(bins[x[:, 0] == 0].unique()) == 1
    assert not torch.isin(bins[x[:, 0] > 0], bins[x[:, 0] == 0]).any()
    assert quantile_bins(torch.full((9, 2), 3.0), 4).unique().numel() == 1


def test_a_constant_has_no_information_and_the_label_has_all() -> None:
    y = torch.arange(64) % 4
    counts = joint_counts(quantile_bins(torch.stack([torch.ones(64), y.float()], dim=1), 8), y, 8, 4)
    torch.testing.assert_close(
        plug_in_information(counts), torch.tensor([0.0, math.log(4)], dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert float(miller_madow_information(counts)[0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("per_cell", "left"), [(1, 0.3), (2, 0.1), (5, 0.01)])
def test_the_bias_after_correction_is_as_documented(per_cell: int, left: float) -> None:
    n = per_cell * 8 * 10
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (n,), generator=generator)
    counts = joint_counts(quantile_bins(torch.randn(n, 200, generator=generator), 8), y, 8, 10)
    assert abs(float(miller_madow_information(counts).mean())) < left
    assert float(plug_in_information(counts).mean()) > 1.5 * left


@pytest.mark.parametrize(("n", "p"), [(300, 9), (30, 12), (8, 20)])
def test_forward_selection_equals_explicit_determinants(n: int, p: int) -> None:
    x, y = labelled(n, p, 3, seed=p)
    total, within, _ = class_covariances(x, y)

    def information(some: list[int]) -> float:
        return 0.5 * float(
            torch.linalg.slogdet(total[some][:, some])[1] - torch.linalg.slogdet(within[some][:, some])[1]
        )

    order, gains = forward_selection(x, y)
    chosen: list[int] = []
    for unit, gain in zip(order, gains.tolist(), strict=True):
        before = information(chosen) if chosen else 0.0
        every = {u: information([*chosen, u]) - before for u in range(p) if u not in chosen}
        assert every[unit] == pytest.approx(max(every.values()), abs=1e-9)
        assert gain == pytest.approx(every[unit], abs=1e-9)
        chosen.append(unit)
    assert sorted(order) == list(range(p))


def test_information_of_one_unit_follows_its_fisher_ratio_at_any_shrinkage() -> None:
    x, y = labelled(40, 30, 2, seed=0)
    _, _, shrinkage = class_covariances(x, y)
    assert shrinkage > 0.1
    means = torch.stack([x[y == c].mean(0) for c in (0, 1)])
    within = (x - means[y]).square().mean(0)
    expected = 0.5 * (x.var(0, correction=0) / within).log().max()
    assert float(forward_selection(x, y)[1][0]) == pytest.approx(float(expected), rel=1e-4)


def test_shrinkage_falls_with_samples_and_is_one_for_independent_units() -> None:
    few, many = (class_covariances(*labelled(n, 20, 2, seed=1))[2] for n in (25, 2500))
    assert many < 0.1 < few
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert ledoit_wolf_intensity(rows, torch.eye(4, dtype=torch.float64)) == 1


@pytest.mark.parametrize("n", [6, 40, 400])
def test_constants_come_last_and_duplicates_add_little(n: int) -> None:
    x, y = labelled(n, 6, 2, seed=2)
    x = torch.cat([x, x[:, :1], torch.full((n, 1), 0.7), torch.zeros(n, 1)], dim=1)
    order, gains = forward_selection(x, y)
    assert set(order[-2:]) == {7, 8}
    assert torch.isfinite(gains).all()
    assert (gains >= 0).all()
    assert gains[-2:].tolist() == [0, 0]
    second = max(order.index(0), order.index(6))
    assert gains[second] < max(0.1 * gains[0], 0.5 * class_covariances(x, y)[2])


def test_a_unit_that_is_the_label_is_first_and_finite() -> None:
    x, y = labelled(60, 4, 3, seed=3, strength=0.1)
    x[:, 2] = y.float()
    order, gains = forward_selection(x, y)
    assert order[0] == 2
    assert math.isfinite(float(gains[0]))


def test_a_suppressor_is_informative_only_together_with_its_unit() -> None:
    """The noise that hides the label in unit 0 has no information alone, but is chosen second."""
    generator = torch.Generator().manual_seed(4)
    y = torch.arange(500) % 2
    noise = torch.randn(500, generator=generator)
    weak = 0.2 * y + torch.randn(500, generator=generator)
    x = torch.stack([y + noise, noise + 0.05 * torch.randn(500, generator=generator), weak], dim=1)
    order, gains = forward_selection(x, y)
    assert order == [0, 1, 2]
    assert gains[1] > 5 * gains[0]


def test_scree_width_is_at_the_largest_drop() -> None:
    gains = torch.tensor([0.9, 0.8, 0.7, 0.02, 0.015, 1e-9, 1e-15])
    assert scree_width(gains, floor=0.01) == 3
    assert scree_width(torch.full((5,), 1e-4), floor=0.01) == 1
    assert scree_width(torch.tensor([0.3]), floor=0.01) == 1
    widths = [scree_width(torch.tensor([0.5] * k + [0.001] * 4), floor=0.002) for k in range(1, 5)]
    assert all(b - a == 1 for a, b in pairwise(widths))
    assert widths[0] == 1
