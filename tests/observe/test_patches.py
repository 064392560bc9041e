"""Sampled patches times weights are the layer's outputs at the sampled positions."""

import pytest
import torch
from torch import nn

from deploypipe.observe.patches import columns, is_mixer, sample_inputs, sample_outputs, sample_positions, weight_matrix

LAYERS = {
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (2, 3, 11)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 3)), (2, 3, 9, 8)),
    "conv2d 1x1": (nn.Conv2d(3, 4, 1, stride=2, bias=False), (2, 3, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, (1, 3, 2), stride=(1, 2, 2), padding=(0, 1, 1)), (2, 2, 3, 5, 4)),
    "linear": (nn.Linear(5, 4), (6, 5)),
    "linear on tokens": (nn.Linear(5, 4, bias=False), (2, 7, 5)),
    "linear on a grid": (nn.Linear(5, 4), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("count", [3, 1000])
@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_weights_are_the_outputs(name: str, count: int) -> None:
    layer, shape = LAYERS[name]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = layer(inputs)
    positions = sample_positions(layer, output, count, torch.Generator().manual_seed(1))
    rows = sample_inputs(layer, inputs, output, positions)
    predicted = rows @ weight_matrix(layer).detach().T + (0 if layer.bias is None else layer.bias.detach())
    torch.testing.assert_close(predicted, sample_outputs(layer, output, positions), atol=1e-5, rtol=1e-5)
    if count == 1000:  # more than there are: every position once
        assert len(rows) == output.numel() // 4 if name != "conv3d" else len(rows) == output.numel() // 3


def test_columns_of_a_channel_hold_its_weights() -> None:
    layer = nn.Conv2d(5, 4, 3)
    assert torch.equal(weight_matrix(layer)[:, columns([1, 3], 9)], layer.weight[:, [1, 3]].flatten(1))


def test_layers_that_are_no_plain_regression_are_told_apart() -> None:
    assert is_mixer(nn.Linear(2, 2))
    assert is_mixer(nn.Conv1d(2, 2, 1))
    for other in (
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(2, 2, 3, padding_mode="reflect", padding=1),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.ConvTranspose2d(2, 2, 2),
        nn.BatchNorm2d(2),
    ):
        assert not is_mixer(other)
