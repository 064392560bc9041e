"""Images in channels-last order: where a network runs in it, and without the convolution that corrupts memory."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.memory_order import SafeConvolutions, as_given, find_order, find_order_
from deploypipe.task import channels_last

# Narrow strided convolutions, as modules and as functions, in the memory order that torch alone ends with an abort in.
CHILD = """
import torch
from torch import nn
from deploypipe.recipe import Finetune
from deploypipe.task import Splits, classification
from deploypipe.training.finetune import finetune
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bare = nn.Conv2d(3, 6, 3, padding=1), nn.Parameter(torch.randn(4, 6, 1, 1))
        self.down, self.head = nn.Conv2d(6, 12, 1, 2), nn.Linear(16, 3)
    def forward(self, x):
        x = self.first(x).relu()
        down = torch.cat([self.down(x), nn.functional.conv2d(x, self.bare, stride=2)], 1)
        return self.head(down.relu().mean((2, 3)))
torch.manual_seed(0)
torch.set_num_threads(1)
batch = [(torch.randn(32, 3, 8, 8), torch.randint(0, 3, (32,)))]
model, data = Net(), Splits(calib=batch, train=batch * 150, val=batch, test=batch)
finetune(model, model, data, classification(), Finetune(num_epochs=1, precision="fp32"))
print("trained")
"""


class Viewing(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x.view(len(x), -1))


def test_training_never_meets_the_convolution_that_corrupts_memory() -> None:
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # as on a processor without AVX-512
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env={**os.environ, **limits}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr[-500:]


@pytest.mark.parametrize(
    ("convolve", "shape", "weight", "options"),
    [
        (F.conv1d, (2, 6, 9), (4, 6, 1), {"stride": 2}),
        (F.conv2d, (2, 6, 9, 7), (4, 6, 1, 1), {"stride": (2, 3)}),
        (F.conv2d, (2, 6, 9, 7), (4, 3, 1, 1), {"stride": 2, "padding": (2, 1), "groups": 2}),
        (F.conv2d, (6, 9, 7), (4, 6, 1, 1), {"stride": (1, 2), "padding": "valid"}),
        (F.conv3d, (2, 6, 3, 5, 4), (4, 6, 1, 1, 1), {"stride": 2, "padding": 1}),
        (F.conv2d, (2, 6, 9, 7), (4, 6, 3, 3), {"stride": 2}),
    ],
)
def test_strides_without_taps_between_are_read_first_to_the_same_end(
    convolve: Any, shape: tuple[int, ...], weight: tuple[int, ...], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, weight, weight[:1])]
    plain = convolve(*tensors, **options)
    with SafeConvolutions():
        safe = convolve(*tensors, **options)
    torch.testing.assert_close(safe, plain)
    slope = torch.randn_like(plain)
    for own, expected in zip(
        torch.autograd.grad(safe, tensors, slope), torch.autograd.grad(plain, tensors, slope), strict=True
    ):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_views_its_activations_stays_in_the_plain_order(channels: int) -> None:
    model, images = Viewing(channels), torch.randn(4, channels, 4, 4)
    assert find_order_(model, images) is as_given
    assert model.conv.weight.is_contiguous()
    model(images)


def test_images_of_two_axes_are_reordered_and_nothing_else() -> None:
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    assert find_order(flat, torch.randn(4, 3, 4, 4)) is channels_last
    assert flat[0].weight.is_contiguous()
    assert find_order_(flat, torch.randn(4, 3, 4, 4)) is channels_last
    assert flat[0].weight.is_contiguous(memory_format=torch.channels_last)
    deep = nn.Sequential(nn.Conv3d(3, 4, 3), nn.Flatten(), nn.Linear(32, 3))
    assert find_order_(deep, torch.randn(4, 3, 4, 4, 4)) is as_given
    both = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 2, 2))
    assert find_order_(both, torch.randn(4, 3, 4, 4)) is channels_last
