"""Scores of shuffled data, which contain no information."""

from typing import Any

import networks
import pytest
import torch

from deploypipe.numerics.grouped_gaussian_mi import total_information
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import ConditionalMi, LabelMi, LayerwiseMi, Magnitude, Mipp, Observe
from deploypipe.scoring.permutation_baseline import permutation_baseline_shares


def test_total_information_is_the_joint_log_determinant() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    joint = root @ root.T + torch.eye(9, dtype=torch.float64)
    x, cross, y = joint[:5, :5], joint[:5, 5:], joint[5:, 5:]
    floor = 0.1 * y.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    noisy = joint.clone()
    noisy[5:, 5:] += floor
    expected = 0.5 * (torch.logdet(x) + torch.logdet(y + floor) - torch.logdet(noisy))
    assert total_information(x, cross, y, noise=0.1) == pytest.approx(float(expected), abs=1e-4)


def test_information_of_independent_rows_is_sampling_error() -> None:
    generator = torch.Generator().manual_seed(0)
    n, p, m = 4000, 20, 10
    x, y = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (p, m))
    found = total_information(x.T @ x / n, x.T @ y / n, y.T @ y / n, noise=0.0)
    assert found == pytest.approx(p * m / (2 * n), rel=0.3)


@pytest.mark.parametrize("scorer", [Mipp(), LayerwiseMi(), LabelMi(num_bins=4), ConditionalMi()], ids=lambda s: s.kind)
def test_a_signal_is_separated_from_chance_better_with_more_samples(scorer: Any) -> None:
    model, inputs = networks.build("pad_resnet")
    structures = list_structures(model, inputs)
    shares = []
    for count in (64, 1024):
        generator = torch.Generator().manual_seed(count)
        labels = torch.randint(0, 2, (count,), generator=generator)
        images = torch.randn(count, *inputs.shape[1:], generator=generator) + 2 * labels[:, None, None, None]
        moments = observe_activations(model, structures, [(images, labels)], Observe(num_samples=count), shuffled=True)
        found = permutation_baseline_shares(model, structures, moments, scorer)
        assert found.keys() == {group.name for group in structures.groups}
        shares.append(sum(found.values()) / len(found))
    assert shares[1] < 0.6 * shares[0]
    assert shares[1] < 0.3


def test_scores_that_are_not_information_have_no_baseline() -> None:
    model, inputs = networks.build("pad_resnet")
    structures = list_structures(model, inputs)
    moments = observe_activations(model, structures, [(inputs, torch.zeros(len(inputs)))], Observe(), shuffled=True)
    assert permutation_baseline_shares(model, structures, moments, Magnitude()) == {}
