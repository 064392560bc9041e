"""The layer before removed blocks is repaired to give their output."""

import pytest
import torch
from torch import Tensor, nn

from deploypipe.pruning.repair.affine_paths import find_paths
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.repair.removed_block_targets import layers_before_removed_blocks
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Repair
from deploypipe.records import ScoreTable


class Block(nn.Module):
    """A residual block, with a ReLU after the sum or without."""

    def __init__(self, relu_behind: bool, norm: bool = False) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)
        self.relu_behind = relu_behind
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + self.outer(torch.relu(self.inner(x))))
        return torch.relu(y) if self.relu_behind else y


def network(relu_behind: bool, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Linear(6, 8), nn.ReLU() if relu_behind else nn.Identity())
    return nn.Sequential(stem, *[Block(relu_behind, norm) for _ in range(5)], nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("relu_behind", [True, False])
def test_the_layer_before_removed_blocks_is_paired_with_their_last_layer(relu_behind: bool) -> None:
    model = network(relu_behind)
    inputs = torch.randn(4, 6)
    paths = find_paths(model, inputs)
    assert layers_before_removed_blocks(model, paths, ["1"], inputs) == {"0.0": "1.outer"}
    assert layers_before_removed_blocks(model, paths, ["2", "3"], inputs) == {"1.outer": "3.outer"}
    assert layers_before_removed_blocks(model, paths, ["1", "3", "5"], inputs) == {
        "0.0": "1.outer",
        "2.outer": "3.outer",
        "4.outer": "5.outer",
    }


def test_norms_with_weights_prevent_a_pair() -> None:
    model = network(False, norm=True)
    nn.init.normal_(model[1].norm.weight)
    inputs = torch.randn(4, 6)
    assert layers_before_removed_blocks(model, find_paths(model, inputs), ["2"], inputs) == {}


def test_a_linear_block_is_compensated_exactly() -> None:
    model = network(False)
    with torch.no_grad():
        model[1].inner.bias.fill_(50.0)  # its ReLU lets all through
    structures = list_structures(model, torch.randn(4, 6))
    plan = make_plan(
        structures,
        ScoreTable(scorer="none", channels={g.name: (0.0,) * g.num_units for g in structures.groups}),
        {},
        ["1"],
    )
    inputs = torch.randn(64, 6)
    repaired, _ = repair(
        model, apply_plan(model, plan), plan, [(inputs, torch.zeros(64))], Repair(num_samples=64, ridge=1e-9)
    )
    with torch.no_grad():
        torch.testing.assert_close(repaired[:2](inputs), model[:2](inputs), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(repaired(inputs), model(inputs), atol=1e-3, rtol=1e-3)
