"""Sampled patches times weights are the layer's outputs at the sampled positions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.observe.layer_regressions import (
    blocks_of_matrix,
    columns,
    from_blocks,
    is_linear_like,
    num_inputs,
    reads,
    sample_inputs,
    sample_outputs,
    sample_positions,
    weight_blocks,
    weight_matrix,
    within_groups,
    writes,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Conv1D(nn.Module):
    """As in `transformers.pytorch_utils`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


EVERY = 100_000  # positions: more than any output here has


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def require_regression(layer: Any, inputs: Tensor, count: int = EVERY) -> None:
    with torch.no_grad():
        output = layer(inputs)
    positions = sample_positions(layer, output, count, seeded(1))
    rows = sample_inputs(layer, inputs, output, positions)
    predicted = rows @ weight_matrix(layer).detach().T + (0 if layer.bias is None else layer.bias.detach())
    torch.testing.assert_close(predicted, sample_outputs(layer, output, positions), atol=1e-5, rtol=1e-5)
    assert rows.shape[1] == num_inputs(layer) * layer.weight[0, 0].numel()
    if count == EVERY:
        assert len(rows) == output.numel() // predicted.shape[1]
    assert torch.equal(from_blocks(layer, weight_blocks(layer)), layer.weight)
    assert torch.equal(blocks_of_matrix(layer, weight_matrix(layer)), weight_blocks(layer))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any kind, and an input for it."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    rank, is_transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.integers(1, 3))
    cin, cout = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, dilation = ([draw(st.integers(1, most)) for _ in range(rank)] for most in (3, 2))
    sizes = [draw(st.integers(5, 7)) for _ in range(rank)]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    options: dict[str, Any] = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if is_transposed:
        stride = [draw(st.integers(1, 3)) for _ in range(rank)]
        options["padding"] = [draw(st.integers(0, r)) for r in reach]
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        layer = TRANSPOSED[rank - 1](cin, cout, kernel, stride, output_padding=extra, **options)
    else:
        padding: Any = draw(st.sampled_from(["numbers", "same", "valid"]))
        stride = [1 if padding == "same" else draw(st.integers(1, 3)) for _ in range(rank)]
        options["padding"] = [draw(st.integers(0, r)) for r in reach] if padding == "numbers" else padding
        modes = ["zeros", "replicate", "circular", *(["reflect"] if rank < 3 else [])]
        options["padding_mode"] = draw(st.sampled_from(modes))
        layer = CONVOLUTIONS[rank - 1](cin, cout, kernel, stride, **options)
    return layer, torch.randn(2, cin, *sizes)


@settings(deadline=None, max_examples=100)
@given(convolutions(), st.sampled_from([3, EVERY]))
def test_any_convolution_is_a_regression(problem: tuple[nn.Module, Tensor], count: int) -> None:
    require_regression(*problem, count)


@pytest.mark.parametrize("count", [3, EVERY])
@pytest.mark.parametrize("shape", [(6, 5), (2, 7, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Linear(5, 4, bias=False), Conv1D(4, 5)])
def test_linear_layers_are_regressions(layer: nn.Module, shape: tuple[int, ...], count: int) -> None:
    require_regression(layer, torch.randn(shape, generator=seeded()), count)


def test_rows_of_a_convolution_are_its_unfolded_input() -> None:
    layer, inputs = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 3)), torch.randn(2, 3, 9, 8)
    output = layer(inputs)
    rows = sample_inputs(layer, inputs, output, sample_positions(layer, output, 1000, seeded()))
    unfolded = F.unfold(inputs, (3, 2), padding=(1, 2), stride=(2, 1), dilation=(1, 3))
    assert torch.equal(rows, unfolded.movedim(1, -1).flatten(0, 1))


def test_conv1d_of_transformers_is_linear_like() -> None:
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 5)
    require_regression(module, torch.randn(2, 7, 5))
    assert reads(module, "weight.0") and writes(module, "weight.1")
    assert not reads(module, "weight.1") and not writes(module, "weight.0")


def test_columns_of_a_channel_contain_its_weights() -> None:
    layer = nn.Conv2d(5, 4, 3)
    assert torch.equal(weight_matrix(layer)[:, columns([1, 3], 9)], layer.weight[:, [1, 3]].flatten(1))


def test_products_of_two_groups_are_zero() -> None:
    layer = nn.Conv1d(4, 6, 2, groups=2)
    inputs_by_inputs, inputs_by_outputs = within_groups(layer, torch.ones(8, 8)), within_groups(layer, torch.ones(8, 6))
    assert torch.equal(inputs_by_inputs, torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)))
    assert torch.equal(inputs_by_outputs, torch.block_diag(torch.ones(4, 3), torch.ones(4, 3)))


def test_layers_that_are_not_regressions_are_detected() -> None:
    for other in (
        nn.BatchNorm2d(2),
        nn.Embedding(3, 2),
        nn.Bilinear(2, 2, 2),
        nn.LSTM(2, 2),
        nn.MultiheadAttention(2, 1),
    ):
        assert not is_linear_like(other)


@pytest.mark.parametrize("count", [2, 5, 100])
def test_only_real_tokens_are_drawn(count: int) -> None:
    layer, output = nn.Linear(3, 2), torch.zeros(4, 6, 2)
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    positions = sample_positions(layer, output, count, seeded(), real)
    assert real[:3].gather(1, positions[:3]).all()
    assert positions.shape == (4, min(count, 6))
    if count >= 6:
        assert [set(drawn.tolist()) for drawn in positions[:3]] == [set(range(6)), {1, 3, 4}, {0}]
    tokens_before = nn.Conv1d(3, 2, 1)
    assert real[:3].gather(1, sample_positions(tokens_before, output.mT, count, seeded(), real)[:3]).all()


def test_layers_of_other_positions_take_all_of_them() -> None:
    real = torch.zeros(4, 6, dtype=torch.bool)
    for layer, output in ((nn.Linear(3, 2), torch.zeros(4, 7, 2)), (nn.Linear(3, 2), torch.zeros(8, 6, 2))):
        drawn = sample_positions(layer, output, 4, seeded(), real)
        assert torch.equal(drawn, sample_positions(layer, output, 4, seeded()))
