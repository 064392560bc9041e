"""`deploypipe.prune`: what it promises to those who only want a smaller module."""

import doctest
from copy import deepcopy

import pytest
import torch
from networks import PadResNet
from torch import Tensor, nn

import deploypipe
from deploypipe import one_call_pruning
from deploypipe.errors import BudgetError, ConfigError, DataError, PipelineError
from deploypipe.pruning.modules.count_macs import count_macs

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 3, 16, 16), torch.randint(10, (16,))) for _ in range(count)]


@pytest.fixture
def dense() -> nn.Module:
    torch.manual_seed(0)
    return PadResNet().eval()


def difference(one: nn.Module, other: nn.Module) -> float:
    inputs = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((one(inputs) - other(inputs)).square().mean())


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(one_call_pruning).attempted and not doctest.testmod(one_call_pruning).failed


def test_a_ratio_removes_that_share_of_every_group_and_leaves_the_model(dense: nn.Module) -> None:
    before = deepcopy(dense.state_dict())
    dense.train()
    small = deploypipe.prune(dense, IMAGES, ratio=0.5)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    structures = deploypipe.list_structures(dense.eval(), IMAGES)
    halved = {group.name: round(group.num_units * 0.5) for group in structures.groups}
    left = {group.name: group.num_units for group in deploypipe.list_structures(deepcopy(small).eval(), IMAGES).groups}
    assert left == halved
    assert small.training  # as it was given
    small(IMAGES).square().mean().backward()  # it trains


def test_calibration_batches_repair_what_is_left(dense: nn.Module) -> None:
    plain = deploypipe.prune(dense, IMAGES, ratio=0.5).eval()
    repaired = deploypipe.prune(dense, IMAGES, ratio=0.5, calib=batches()).eval()
    assert difference(repaired, dense) < 0.7 * difference(plain, dense)


@pytest.mark.parametrize("calib", [None, batches(2)], ids=["uniform widths", "widths by loss curves"])
def test_macs_are_those_of_the_network_that_comes_out(
    dense: nn.Module, calib: list[tuple[Tensor, Tensor]] | None
) -> None:
    small = deploypipe.prune(dense, IMAGES, macs="0.5x", calib=calib)
    share = count_macs(small.eval(), IMAGES)[1] / count_macs(dense, IMAGES)[1]
    assert 0.3 < share <= 0.5


def test_what_is_asked_wrongly_is_one_error(dense: nn.Module) -> None:
    for arguments in ({}, {"ratio": 0.5, "macs": "0.5x"}):
        with pytest.raises(ConfigError, match="ratio, macs: are both"):
            deploypipe.prune(dense, IMAGES, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ratio: must be > 0 and < 1, got 50"):
        deploypipe.prune(dense, IMAGES, ratio=50)
    with pytest.raises(ConfigError, match=r"macs: macs = 'half' is not a number with a unit; write '0\.5x'"):
        deploypipe.prune(dense, IMAGES, macs="half")
    with pytest.raises(BudgetError, match=r"0\.0001x of the dense network is out of reach"):
        deploypipe.prune(dense, IMAGES, macs="0.0001x")
    with pytest.raises(PipelineError, match=r"calib is a Tensor; it is one batch: write calib=\[\(inputs, target\)\]"):
        deploypipe.prune(dense, IMAGES, ratio=0.5, calib=IMAGES)
    with pytest.raises(DataError, match=r"it holds \[0\]: str, \[1\]: str: write Pairs\(loader, inputs=0"):
        deploypipe.prune(dense, IMAGES, ratio=0.5, calib=[("a", "b")])
